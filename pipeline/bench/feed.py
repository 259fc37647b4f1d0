"""What surrounds the network, each part by itself: reading frames, labelling them, writing labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path

from depthmill.pipeline.batches import in_batches
from depthmill.pipeline.bench.timing import Spent, interleave, typical
from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.model.transfer import Pending
from depthmill.pipeline.sources import shown
from depthmill.pipeline.store import Layout, create
from depthmill.pipeline.types import Frame, FrameSource, Labels, Source

_BATCHES = 2  # are labelled in a round


@dataclass(frozen=True)
class Feed:
    """Time of one frame in each part of the way, one part at a time; medians over rounds.

    Attributes:
        decode: From the input to uint8 frames, by one reader with as many threads as it takes by itself.
        label: In the labeler, packed.
        write: Compressed, written and committed, by one writer.
        bytes: Written of a frame.
    """

    decode: Spent
    label: Spent
    write: Spent
    bytes: int


def first_frames(source: FrameSource, most: int) -> list[Frame]:
    """The first frames that can be read, among as many again.

    Raises:
        SourceError: If there is none.
    """
    probed = source.probe()
    found = list(islice((one for one in source.read(0, min(probed.frames, 2 * most)) if one.image is not None), most))
    if not found:
        raise SourceError(
            f"{shown(probed.uri)}: none of its first frames can be read; expected one that can: give another input"
        )
    return found


def measure_feed(
    source: FrameSource,
    pictures: Sequence[Frame],
    labeler: Labeler,
    layout: Layout,
    folder: Path,
    *,
    frames: int,
    rounds: int,
) -> Feed:
    """Measure each part of the way on the first frames of an input.

    Args:
        source: Open.
        pictures: Of these the most that can share a batch are labelled, repeated until the batch is full, as a run's
            are; their labels, again and again, are what is written.
        labeler: Labels them.
        layout: Of the labels on disk.
        folder: Where stores are written, one a round.
        frames: Most frames that are read, and written, in a round.
        rounds: Counted ones.
    """
    whole = source.probe()
    part = _first(whole, frames)
    rounded = labeler.rounds(whole)  # a corpus is one by all of its pictures

    def shape(frame: Frame) -> tuple[int, int]:
        assert frame.image is not None
        return labeler.batch_shape(*frame.image.shape[:2], rounded=rounded)

    most = max(in_batches(pictures, shape, labeler.batch_size), key=len)
    images = [frame.image for frame in islice(cycle(most), labeler.batch_size) if frame.image is not None]
    labels: list[Labels] = []
    numbers, written = count(), 0

    def decode() -> int:
        return sum(1 for _ in source.read(0, part.frames))

    def label() -> int:
        labels.clear()
        asked: deque[Pending] = deque()  # as a run does it: the next is asked for before one is taken
        for _ in range(_BATCHES):
            asked.append(labeler.submit(images, rounded=rounded, packing=layout.normals_dtype))
            if len(asked) > 1:
                labels.extend(asked.popleft().result())
        labels.extend(asked.popleft().result())
        return len(labels)

    def write() -> int:
        nonlocal written
        store = create(folder / f"{next(numbers)}.zarr", layout, {})
        store.add(part)
        rows, written = cycle(labels), 0
        for segment in store.segments(part.id):
            writer = store.writer(segment)
            for index in range(segment.start, segment.stop):
                row = next(rows)
                writer.put(
                    index,
                    None if row.depth is None else row.depth[0],
                    None if row.normals is None else row.normals[0],
                    None if row.uncertainty is None else row.uncertainty[0],
                )
            written += writer.commit()
        return part.frames

    spent = interleave({"decode": decode, "label": label, "write": write}, rounds, labeler.device)
    return Feed(
        decode=typical(spent["decode"]),
        label=typical(spent["label"]),
        write=typical(spent["write"]),
        bytes=written // part.frames,
    )


def _first(source: Source, frames: int) -> Source:
    """A source that ends after so many frames."""
    return replace(
        source,
        frames=min(frames, source.frames),
        time_s=None if source.time_s is None else source.time_s[:frames],
        keys=None if source.keys is None else source.keys[:frames],
    )
