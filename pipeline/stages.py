"""The stages of a run on one segment: read -> compute -> write, in plain Python. A worker is one of these in a loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError, SourceError
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.sources import open_source, prefetch
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.types import FrameSource, Segment

_OPEN_SOURCES = 2  # kept open by a worker, so that its next segment of the same video goes on where the last ended


@dataclass(frozen=True)
class Report:
    """What became of a segment.

    Attributes:
        segment: Which.
        labelled: Frames with labels.
        failed: Frames without; their reasons are in the store.
        seconds: Wall time from the first read to the commit.
    """

    segment: Segment
    labelled: int
    failed: int
    seconds: float


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing.

    Attributes:
        doing: A word or two: `loading`, `idle`, or the segment.
        frames: Frames of the segment that are done.
        of: Frames of the segment.
    """

    doing: str
    frames: int = 0
    of: int = 0


def label_segment(
    source: FrameSource,
    segment: Segment,
    labeler: Labeler,
    store: Store,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Report:
    """Read, label, write and commit one segment.

    Frames that share a processed size are labelled in full batches, in the order in which those fill: which frames meet
    in a batch depends on the segment alone. Frames that cannot be read are marked as failed with their reason.

    Args:
        source: Open, the segment's.
        segment: Which frames.
        labeler: Predicts.
        store: Takes the labels; nothing of the segment is visible in it before the commit at the end.
        on_frames: Told how many frames are done, after each batch.
    """
    started = time.perf_counter()
    writer = store.writer(segment)
    buckets: dict[tuple[int, int], list[tuple[int, npt.NDArray[np.uint8]]]] = {}
    labelled = failed = 0

    def flush(size: tuple[int, int]) -> None:
        nonlocal labelled
        batch = buckets.pop(size)
        keys = [f"{segment.source_id}/{index}" for index, _ in batch]
        for (index, _), labels in zip(batch, labeler.label([image for _, image in batch], keys), strict=True):
            writer.put(
                index,
                None if labels.depth is None else labels.depth[0],
                None if labels.normals is None else labels.normals[0],
                None if labels.uncertainty is None else labels.uncertainty[0],
            )
        labelled += len(batch)
        on_frames(labelled + failed)

    batch_size = labeler.batch_size
    for frame in prefetch(source.read(segment.start, segment.stop), 2 * batch_size):
        if frame.image is None:
            writer.fail(frame.index, frame.error)
            failed += 1
            continue
        size = labeler.processed_size(*frame.image.shape[:2])
        buckets.setdefault(size, []).append((frame.index, frame.image))
        if len(buckets[size]) == batch_size:
            flush(size)
    for size in list(buckets):
        flush(size)
    writer.commit()
    return Report(segment, labelled, failed, time.perf_counter() - started)


def fail_segment(segment: Segment, store: Store, reason: str) -> Report:
    """Commit a segment with every frame marked as failed, when all attempts at it are spent."""
    writer = store.writer(segment)
    for index in range(segment.start, segment.stop):
        writer.fail(index, reason)
    writer.commit()
    return Report(segment, labelled=0, failed=segment.frames, seconds=0.0)


class Worker:
    """A loaded labeler and the store it writes to. In-process, or as a Ray actor (`workers/actors.py`)."""

    def __init__(self, config: LabelConfig, store: Path, digests: tuple[str, ...]):
        """Nothing is loaded yet.

        Args:
            config: The run's, with `device`, `dtype` and `threads` settled.
            store: Path of the store, which exists.
            digests: sha256 of the run's checkpoints: on another machine the same name could mean other files.
        """
        self._config = config
        self._store_path = store
        self._digests = digests
        self._state = WorkerState("starting")
        self.on_state: Callable[[WorkerState], None] = lambda state: None  # told of each change, in-process
        self._sources: dict[str, FrameSource] = {}

    def load(self) -> str:
        """Load the checkpoints; returns the device and dtype in words.

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
        self._store = open_store(self._store_path)
        self._now(WorkerState("idle"))
        return f"{self._labeler.device}, {str(self._labeler.dtype).removeprefix('torch.')}"

    def label(self, uri: str, fingerprint: str, segment: Segment) -> Report:
        """Label and commit a segment of the source at `uri`.

        Raises:
            SourceError: If the source is not, or is no longer, what the run was planned with.
        """

        def on_frames(frames: int) -> None:
            self._now(WorkerState(str(segment), frames, segment.frames))

        on_frames(0)
        try:
            return label_segment(self._open(uri, fingerprint), segment, self._labeler, self._store, on_frames)
        finally:
            self._state = WorkerState("idle")

    def state(self) -> WorkerState:
        """What it is doing now; may be called from another thread."""
        return self._state

    def _now(self, state: WorkerState) -> None:
        self._state = state
        self.on_state(state)

    def close(self) -> None:
        """Release the open sources."""
        while self._sources:
            self._sources.popitem()[1].close()

    def _open(self, uri: str, fingerprint: str) -> FrameSource:
        if uri in self._sources:
            self._sources[uri] = self._sources.pop(uri)  # last used, last to go
            return self._sources[uri]
        while len(self._sources) >= _OPEN_SOURCES:
            self._sources.pop(next(iter(self._sources))).close()
        source = open_source(uri, max_pixels=self._config.max_pixels)
        if source.probe().fingerprint != fingerprint:
            source.close()
            raise SourceError(
                f"{uri} is not the file that the run was planned with; expected it unchanged, and the same on every "
                "machine: put it back, or label it into another store"
            )
        self._sources[uri] = source
        return source
