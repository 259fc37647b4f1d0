"""The stages of a run on one segment: read -> label -> write -> commit, in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy.typing as npt

from depthmill.pipeline.batches import in_batches
from depthmill.pipeline.errors import VoidError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.model.transfer import Pending
from depthmill.pipeline.plan import Task
from depthmill.pipeline.store import Store
from depthmill.pipeline.store.layout import DEPTH_INVALID
from depthmill.pipeline.store.writer import SegmentWriter
from depthmill.pipeline.types import Frame, FrameSource, Labels, NormalsDtype, Report, Segment


@dataclass(eq=False)
class Labelled:
    """A segment whose frames all have labels, but for a last batch that may still be under way, or a reason.

    Nothing of it is visible in the store before `commit`, which may be called from another thread: meanwhile the device
    goes on with the next segment.
    """

    segment: Segment
    writer: SegmentWriter
    storing: Callable[[], AbstractContextManager[None]]
    labelled: int = 0
    failed: int = 0
    slots: int = 0
    label_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    take_last: Callable[[], None] = lambda: None

    def commit(self) -> Report:
        """Publish it.

        Raises:
            StoreError: If something of it cannot be written.
            VoidError: If the answers for all of its pictures, several or all of its frames, are no numbers.
        """
        take_last, self.take_last = self.take_last, lambda: None  # else it holds a batch of pictures, and a cycle
        take_last()
        with self.storing():
            written = self.writer.commit()
        return Report(
            segment=self.segment,
            labelled=self.labelled,
            failed=self.failed,
            slots=self.slots,
            label_s=self.label_s,
            bytes=written,
            reasons=self.reasons,
        )


def label_frames(
    frames: Iterable[Frame],
    segment: Segment,
    labeler: Labeler,
    store: Store,
    on_frames: Callable[[int], None] = lambda frames: None,
    *,
    rounded: bool,
    only: Sequence[int] | None = None,
    storing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Labelled:
    """Label the frames of a segment and write them, up to its last batch and its commit.

    Frames that share a padded shape are labelled in full batches, in the order in which those fill, in bounded memory
    (`pipeline/batches.py`): which frames meet in a batch depends on the segment alone. Frames that could not be read
    are marked as failed with their reason, and so are those for which the model's answer is no number; but if that is
    so of all, the segment is not committed, since a device that is broken answers so. A batch is asked for before the
    labels of the one before it are taken, so that a GPU is never without work.

    Args:
        frames: As they are read, in order.
        segment: Which they are.
        labeler: Predicts.
        store: Takes the labels.
        on_frames: Told how many frames are done, after each that is read and each batch.
        rounded: Whether the labeler sees them at rounded aspect ratios.
        only: Frames of a committed segment to label again; its others stay as they are.
        storing: Entered around all that may wait for the store.
    """
    with storing():
        writer = store.writer(segment, redo=only)
    done = Labelled(segment, writer, storing)
    packing = store.layout.normals_dtype
    voids = 0

    def fail(index: int, reason: str) -> None:
        with storing():
            writer.fail(index, reason)
        done.failed += 1
        done.reasons[reason] += 1

    def pictures() -> Iterator[Frame]:
        for frame in frames:
            on_frames(done.labelled + done.failed)
            if frame.image is not None:
                yield frame
            else:
                fail(frame.index, frame.error)

    def take(batch: Sequence[Frame], answer: Pending) -> None:
        nonlocal voids
        for frame, labels in zip(batch, answer.result(), strict=True):
            if _is_void(labels):
                voids += 1
                fail(frame.index, f"the model's answer is no number, in {labeler.dtype}: --dtype float32 may help")
                continue
            done.labelled += 1
            with storing():
                writer.put(frame.index, *labels.frame(0))
        done.label_s += answer.seconds
        done.slots += labeler.batch_size
        on_frames(done.labelled + done.failed)

    def take_last(last: tuple[list[Frame], Pending] | None) -> None:
        if last is not None:
            take(*last)
        if not done.labelled and only is None and _tells_of_device(voids, segment):  # frames done again lose nothing
            raise _all_void(labeler)

    asked: tuple[list[Frame], Pending] | None = None
    for batch in _batches(pictures(), labeler, rounded, lambda: writer.waiting_bytes):
        answer = _submit(batch, segment, labeler, rounded, packing)
        if asked is not None:
            take(*asked)
        asked = batch, answer
    done.take_last = partial(take_last, asked)
    return done


def read_segment(
    source: FrameSource,
    segment: Segment,
    skip: Mapping[int, str] = {},
    only: Sequence[int] | None = None,
    on_passed: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """The wanted frames, in order; those to be skipped come with their reason, without being read.

    Args:
        source: Open, the segment's.
        segment: Which frames.
        skip: Frames that are not to be read -> why they fail.
        only: Those of the segment that are wanted; None for all.
        on_passed: Told of what is passed over on the way to a frame.
    """
    wanted = only or range(segment.start, segment.stop)
    at = 0
    while at < len(wanted):
        first = wanted[at]
        if first in skip:
            yield Frame(first, None, skip[first])
            at += 1
            continue
        stop = at + 1
        while stop < len(wanted) and wanted[stop] == wanted[stop - 1] + 1 and wanted[stop] not in skip:
            stop += 1
        yield from source.read(first, wanted[stop - 1] + 1, on_passed)
        at = stop


def try_segment(
    source: FrameSource,
    segment: Segment,
    labeler: Labeler,
    on_frames: Callable[[int], None] = lambda frames: None,
    on_passed: Callable[[], None] = lambda: None,
) -> int:
    """Read and label a segment without writing anything, to see whether it can be done; how many frames could be.

    Answers that are no numbers do not count.

    Raises:
        VoidError: If there are several, or one of one, and no others.
    """
    rounded = labeler.rounds(source.probe())
    done = read = 0

    def pictures() -> Iterator[Frame]:
        for frame in source.read(segment.start, segment.stop, on_passed):
            on_frames(done)
            if frame.image is not None:
                yield frame

    for batch in _batches(pictures(), labeler, rounded):
        done += sum(not _is_void(labels) for labels in _submit(batch, segment, labeler, rounded).result())
        read += len(batch)
        on_frames(done)
    if not done and _tells_of_device(read, segment):
        raise _all_void(labeler)
    return done


def _batches(
    frames: Iterable[Frame], labeler: Labeler, rounded: bool, waiting_bytes: Callable[[], int] = lambda: 0
) -> Iterator[list[Frame]]:
    def shape(frame: Frame) -> tuple[int, int]:
        assert frame.image is not None
        return labeler.batch_shape(*frame.image.shape[:2], rounded=rounded)

    return in_batches(frames, shape, labeler.batch_size, waiting_bytes)


def _tells_of_device(voids: int, segment: Segment) -> bool:
    """Whether so many answers that are no numbers, and no others, are to be tried elsewhere before frames fail."""
    return voids > 1 or voids == segment.frames


def _all_void(labeler: Labeler) -> VoidError:
    return VoidError(
        f"the model's answer is no number for any picture of a segment, in {labeler.dtype}; expected some at least: "
        "see to the device, or try --dtype float32"
    )


def _is_void(packed: Labels) -> bool:
    """Whether the network answered with nothing but NaN, as one does that overflows."""

    def void(labels: npt.NDArray[Any] | None, invalid: int) -> bool:
        # A few first: nearly always that is all.
        return labels is not None and all((part == invalid).all() for part in (labels[:, ::64, ::64], labels))

    return void(packed.depth, DEPTH_INVALID) or void(packed.normals, 0)


def _submit(
    batch: Sequence[Frame], segment: Segment, labeler: Labeler, rounded: bool, packing: NormalsDtype = "int8"
) -> Pending:
    keys = [f"{segment.source_id}/{frame.index}" for frame in batch]
    images = [frame.image for frame in batch if frame.image is not None]
    return labeler.submit(images, keys, rounded=rounded, packing=packing)


def fail_task(task: Task, reason: str, store: Store) -> Report:
    """Commit a segment with its frames marked as failed, when all attempts at it are spent.

    Frames of a committed segment that were to be labelled again stay as they are.
    """
    skip = dict(task.skip)
    reasons = {index: skip.get(index, reason) for index in task.only or range(task.segment.start, task.segment.stop)}
    if not task.only:
        writer = store.writer(task.segment)
        for index, why in reasons.items():
            writer.fail(index, why)
        writer.commit()
    return Report(task.segment, labelled=0, failed=task.frames, reasons=Counter(reasons.values()))
