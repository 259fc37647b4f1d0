"""What surrounds the network: reading frames, labelling them, writing labels, each by itself, and all at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path

from depthmill.pipeline.batches import in_batches
from depthmill.pipeline.bench.timing import Spent, interleave, typical
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import shown
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.store import Layout, Store, create
from depthmill.pipeline.types import Frame, FrameSource, Labels, Source
from depthmill.pipeline.worker import Worker

_BATCHES = 2  # are labelled in a round


@dataclass(frozen=True)
class Feed:
    """Time of one frame in each part of the way, one part at a time, medians over rounds; and all of the way.

    Attributes:
        decode: From the input to uint8 frames, by one reader with as many threads as it takes by itself.
        label: In the labeler, packed.
        write: Compressed, written and committed, by one writer.
        run: All of that overlapped, by one worker, from commit to commit; once.
        fill: How full its batches were, as a share of 1.
        bytes: Written of a frame.
    """

    decode: Spent
    label: Spent
    write: Spent
    run: Spent
    fill: float
    bytes: int

    @property
    def share(self) -> float:
        """Rate of the whole run over the labeler's alone."""
        return self.label.wall_s / self.run.wall_s


class _Loaded(Worker):
    """A worker of a labeler that is loaded, and goes on on the thread that it has been on."""

    def __init__(
        self, config: LabelConfig, store: Store, labeler: Labeler, thread: ThreadPoolExecutor, sources: OpenSources
    ) -> None:
        super().__init__(config, store.uri, (), sources)
        self._labeler, self._store, self._thread = labeler, store, thread


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
    config: LabelConfig,
    labeler: Labeler,
    thread: ThreadPoolExecutor,
    layout: Layout,
    folder: Path,
    *,
    frames: int,
    rounds: int,
) -> Feed:
    """Measure each part of the way on the first frames of an input, and all of it.

    Args:
        source: Open; closed in the end.
        pictures: Of these the most that can share a batch are labelled, repeated until the batch is full, as a run's
            are; their labels, again and again, are what is written.
        config: The run's.
        labeler: Labels them.
        thread: On which it does, one; ended in the end.
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
        # As a run does it: the next is asked for before one is taken.
        asked = [labeler.submit(images, rounded=rounded, packing=layout.normals_dtype) for _ in range(_BATCHES)]
        labels[:] = [one for pending in asked for one in pending.result()]
        return len(labels)

    def write() -> int:
        nonlocal written
        store = create(folder / f"{next(numbers)}.zarr", layout, {})
        store.add(part)
        rows, written = cycle(labels), 0
        for segment in store.segments(part.id):
            writer = store.writer(segment)
            for index in range(segment.start, segment.stop):
                writer.put(index, *next(rows).frame(0))
            written += writer.commit()
        return part.frames

    ways = {"decode": decode, "label": label, "write": write}
    spent = thread.submit(interleave, ways, rounds, labeler.device).result()
    store = create(folder / "run.zarr", layout, {})
    store.add(part)
    sources = OpenSources(config.max_pixels, config.max_frames)
    sources.keep(part.uri, source)
    run, fill = _run(_Loaded(config, store, labeler, thread, sources), store, part)
    return Feed(
        decode=typical(spent["decode"]),
        label=typical(spent["label"]),
        write=typical(spent["write"]),
        run=run,
        fill=fill,
        bytes=written // part.frames,
    )


def _run(loaded: Worker, store: Store, part: Source) -> tuple[Spent, float]:
    """Label a source as a run does, each segment begun before the one before it is committed, after its first one.

    Returns:
        Time of a frame, and how full batches were.
    """
    tasks = [Task(part.uri, part.fingerprint, segment) for segment in store.segments(part.id)]
    with closing(loaded) as worker:
        worker.label(tasks[0], tasks[0])
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        reports = [worker.label(*pair) for pair in zip(tasks, [*tasks[1:], tasks[0]], strict=True)]
        spent = Spent((time.perf_counter() - wall_s) / part.frames, (time.process_time() - cpu_s) / part.frames)
    return spent, sum(one.labelled for one in reports) / max(1, sum(one.slots for one in reports))


def _first(source: Source, frames: int) -> Source:
    """A source that ends after so many frames."""
    return replace(
        source,
        frames=min(frames, source.frames),
        time_s=None if source.time_s is None else source.time_s[:frames],
        keys=None if source.keys is None else source.keys[:frames],
    )
