"""The stages of a run on one segment: read -> compute -> write, in plain Python. A worker is one of these in a loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from depthmill.pipeline.batches import in_batches
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError, SourceError
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import open_source, prefetch, shown
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.types import Frame, FrameSource, Labels, Segment

_OPEN_SOURCES = 2  # kept open by a worker, so that its next segment of the same video goes on where the last ended


@dataclass(frozen=True)
class Report:
    """What became of a segment.

    Attributes:
        segment: Which.
        labelled: Frames with labels.
        failed: Frames without; their reasons are in the store.
        seconds: Wall time from the first read to the commit.
        batches: Forward passes.
        slots: Frames that those had room for.
        label_s: Seconds spent labelling.
        bytes: Written.
        reasons: Failed frames by reason.
    """

    segment: Segment
    labelled: int
    failed: int
    seconds: float
    batches: int = 0
    slots: int = 0
    label_s: float = 0.0
    bytes: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing.

    Attributes:
        doing: A word or two: `loading`, `idle`, or the segment.
        frames: Frames of the segment that are done.
        of: Frames of the segment.
        steps: Rises with each frame that is read and each batch that is labelled; standing still, it hangs.
    """

    doing: str
    frames: int = 0
    of: int = 0
    steps: int = 0


def label_segment(
    source: FrameSource,
    segment: Segment,
    labeler: Labeler,
    store: Store,
    on_frames: Callable[[int], None] = lambda frames: None,
    *,
    skip: Mapping[int, str] = {},
    only: Sequence[int] | None = None,
) -> Report:
    """Read, label, write and commit one segment.

    Frames that share a padded shape are labelled in full batches, in the order in which those fill, in bounded memory
    (`pipeline/batches.py`): which frames meet in a batch depends on the segment alone. Frames that cannot be read are
    marked as failed with their reason.

    Args:
        source: Open, the segment's.
        segment: Which frames.
        labeler: Predicts.
        store: Takes the labels; nothing of the segment is visible in it before the commit at the end.
        on_frames: Told how many frames are done, after each frame that is read and each batch.
        skip: Frames that are not to be read -> why they fail.
        only: Frames of a committed segment to label again; its others stay as they are.
    """
    started = time.perf_counter()
    writer = store.writer(segment, redo=only)
    labelled = failed = batches = 0
    label_s = 0.0
    reasons: Counter[str] = Counter()

    def pictures() -> Iterator[Frame]:
        nonlocal failed
        wanted = only or range(segment.start, segment.stop)
        for frame in prefetch(_read(source, wanted, skip), 2 * labeler.batch_size):
            on_frames(labelled + failed)
            if frame.image is not None:
                yield frame
                continue
            writer.fail(frame.index, frame.error)
            failed += 1
            reasons[frame.error] += 1

    rounded = labeler.rounds(source.probe())
    for batch in _batches(pictures(), labeler, rounded, lambda: writer.waiting_bytes):
        began = time.perf_counter()
        predicted = _label(batch, segment, labeler, rounded)
        label_s += time.perf_counter() - began
        batches += 1
        for frame, labels in zip(batch, predicted, strict=True):
            writer.put(
                frame.index,
                None if labels.depth is None else labels.depth[0],
                None if labels.normals is None else labels.normals[0],
                None if labels.uncertainty is None else labels.uncertainty[0],
            )
        labelled += len(batch)
        on_frames(labelled + failed)
    written = writer.commit()
    seconds = time.perf_counter() - started
    return Report(segment, labelled, failed, seconds, batches, batches * labeler.batch_size, label_s, written, reasons)


def _read(source: FrameSource, wanted: Sequence[int], skip: Mapping[int, str]) -> Iterator[Frame]:
    """The wanted frames, in order; those to be skipped come with their reason, without being read."""
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
        yield from source.read(first, wanted[stop - 1] + 1)
        at = stop


def try_segment(
    source: FrameSource, segment: Segment, labeler: Labeler, on_frames: Callable[[int], None] = lambda frames: None
) -> None:
    """Read and label a segment without writing anything, to see whether it can be done."""
    rounded = labeler.rounds(source.probe())
    done = 0

    def pictures() -> Iterator[Frame]:
        for frame in source.read(segment.start, segment.stop):
            on_frames(done)
            if frame.image is not None:
                yield frame

    for batch in _batches(pictures(), labeler, rounded):
        _label(batch, segment, labeler, rounded)
        done += len(batch)
        on_frames(done)


def _batches(
    frames: Iterable[Frame], labeler: Labeler, rounded: bool, waiting_bytes: Callable[[], int] = lambda: 0
) -> Iterator[list[Frame]]:
    def shape(frame: Frame) -> tuple[int, int]:
        assert frame.image is not None
        return labeler.batch_shape(*frame.image.shape[:2], rounded=rounded)

    return in_batches(frames, shape, labeler.batch_size, waiting_bytes)


def _label(batch: Sequence[Frame], segment: Segment, labeler: Labeler, rounded: bool) -> list[Labels]:
    keys = [f"{segment.source_id}/{frame.index}" for frame in batch]
    return labeler.label([frame.image for frame in batch if frame.image is not None], keys, rounded=rounded)


def fail_task(task: Task, reason: str, store: Store) -> Report:
    """Commit a segment with its frames marked as failed, when all attempts at it are spent.

    Frames of a committed segment that were to be labelled again stay as they are.
    """
    reasons = Counter(dict(task.skip).get(index, reason) for index in range(task.segment.start, task.segment.stop))
    if not task.only:
        writer, skip = store.writer(task.segment), dict(task.skip)
        for index in range(task.segment.start, task.segment.stop):
            writer.fail(index, skip.get(index, reason))
        writer.commit()
    return Report(task.segment, labelled=0, failed=task.frames, seconds=0.0, reasons=reasons)


class OpenSources:
    """The sources that a worker has open."""

    def __init__(self, max_pixels: int, max_frames: int) -> None:
        """None yet; the limits are `open_source`'s."""
        self._limits = (max_pixels, max_frames)
        self._sources: dict[str, FrameSource] = {}

    def open(self, uri: str, fingerprint: str) -> FrameSource:
        """The source at `uri`; it stays open.

        Raises:
            SourceError: If it is not the one with this fingerprint.
        """
        if uri in self._sources:
            self._sources[uri] = self._sources.pop(uri)  # last used, last to go
            return self._sources[uri]
        while len(self._sources) >= _OPEN_SOURCES:
            self._sources.pop(next(iter(self._sources))).close()
        max_pixels, max_frames = self._limits
        source = open_source(uri, max_pixels=max_pixels, max_frames=max_frames)
        if source.probe().fingerprint != fingerprint:
            source.close()
            raise SourceError(
                f"{shown(uri)} is not the file that the run was planned with; expected it unchanged, and the same on "
                "every machine: put it back, or label it into another store"
            )
        self._sources[uri] = source
        return source

    def close(self) -> None:
        """Release all of them."""
        while self._sources:
            self._sources.popitem()[1].close()


class Worker:
    """A loaded labeler and the store it writes to. In-process, or as a Ray actor (`workers/actors.py`)."""

    def __init__(self, config: LabelConfig, store: str, digests: tuple[str, ...]):
        """Nothing is loaded yet.

        Args:
            config: The run's, with `device`, `dtype` and `threads` settled.
            store: Where the store is, which exists.
            digests: sha256 of the run's checkpoints: on another machine the same name could mean other files.
        """
        self._config = config
        self._store_uri = store
        self._digests = digests
        self._state = WorkerState("starting")
        self.on_state: Callable[[WorkerState], None] = lambda state: None  # told of each change, in-process
        self._sources = OpenSources(config.max_pixels, config.max_frames)

    def load(self) -> str:
        """Load the checkpoints; returns the device, and how it is used, in words.

        Raises:
            CheckpointError: If they cannot be loaded, or are not those that the run was planned with.
        """
        self._now(WorkerState("loading"))
        assert self._config.threads is not None
        torch.set_num_threads(self._config.threads)
        checkpoints = open_checkpoints(self._config)
        for checkpoint, digest in zip(checkpoints, self._digests, strict=True):
            if checkpoint.sha256 != digest:
                raise CheckpointError(
                    f"checkpoint {checkpoint.name} has sha256 {checkpoint.sha256[:12]}… here and {digest[:12]}… where "
                    "the run was started; expected the same files on every machine: copy them"
                )
        self._labeler = Labeler.from_config(self._config, checkpoints)
        self._store = open_store(self._store_uri)
        self._now(WorkerState("idle"))
        return self._labeler.backend

    def label(self, task: Task) -> Report:
        """Label and commit a segment.

        Raises:
            SourceError: If the source is not, or is no longer, what the run was planned with.
            StoreError: If the labels cannot be written.
        """
        on_frames = self._counted(str(task.segment), task.frames)
        try:
            return label_segment(
                self._sources.open(task.uri, task.fingerprint),
                task.segment,
                self._labeler,
                self._store,
                on_frames,
                skip=dict(task.skip),
                only=task.only or None,
            )
        finally:
            self._state = WorkerState("idle")

    def try_task(self, task: Task) -> None:
        """Read and label frames without writing anything, to see whether it can be done."""
        on_frames = self._counted(f"searching {task.segment}", task.frames)
        try:
            try_segment(self._sources.open(task.uri, task.fingerprint), task.segment, self._labeler, on_frames)
        finally:
            self._state = WorkerState("idle")

    def state(self) -> WorkerState:
        """What it is doing now; may be called from another thread."""
        return self._state

    def _counted(self, doing: str, frames: int) -> Callable[[int], None]:
        """What is told how many frames are done, beginning with none."""
        steps = count()

        def on_frames(done: int) -> None:
            self._now(WorkerState(doing, done, frames, next(steps)))

        on_frames(0)
        return on_frames

    def _now(self, state: WorkerState) -> None:
        self._state = state
        self.on_state(state)

    def close(self) -> None:
        """Release the open sources."""
        self._sources.close()
