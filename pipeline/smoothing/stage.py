"""Smoothing of one segment, or video: read the source and the store -> compute -> write, in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.smoothing.edges import FIELDS, GAPS, View, segment_edges, view
from depthmill.pipeline.smoothing.filter import REACH, FilterFrame, filter_frames
from depthmill.pipeline.smoothing.solve import solve
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.store.checked import stored_rows
from depthmill.pipeline.store.layout import DEPTH_INVALID, DEPTH_STEP
from depthmill.pipeline.store.temporal import FILTERED, PARTLY, SCALED, UNREAD, Lost, Temporal
from depthmill.pipeline.types import LABELLED, Frame, FrameSource, Segment, WorkerState

Phase = Literal["open", "edges", "solve", "filter"]

_COVERAGE = FIELDS.index("coverage")


@dataclass(frozen=True)
class SmoothTask:
    """Something to do for a worker that smooths.

    Attributes:
        phase: What; `open` says whether the source is there, and then removes what other options made of it.
        uri: Of the source.
        fingerprint: Of the source; another one is refused.
        segment: Which frames; all for `solve`, and of no matter for `open`.
        attempts: How many have failed.
        losses: How many ended with the worker's whole machine.
    """

    phase: Phase
    uri: str
    fingerprint: str
    segment: Segment
    attempts: int = 0
    losses: int = 0

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.segment.frames

    def __str__(self) -> str:
        return f"{self.phase} {self.segment}"


def edges_shape(max_edge: int) -> tuple[int, int]:
    """Gaps and fields of a frame's edges."""
    return sum(gap <= max_edge for gap in GAPS), len(FIELDS)


def _options(config: SmoothConfig) -> dict[str, Any]:
    """Those by which results differ."""
    return {"max_edge": config.max_edge, "flow": config.flow, "leak": config.leak}


def prepare(source_id: str, store: Store, config: SmoothConfig, *, remove: bool = True) -> Lost:
    """Prepare a source's group for these options: see `Temporal.prepare`."""
    shape = edges_shape(config.max_edge)
    return Temporal(store, source_id).prepare(**_options(config), shape=shape, remove=remove)


def write_segment_edges(
    source: FrameSource,
    segment: Segment,
    store: Store,
    config: SmoothConfig,
    on_frame: Callable[[], None],
    on_passed: Callable[[], None] = lambda: None,
) -> str:
    """Compute and commit the edges of a segment, with the `max_edge` frames before it read again.

    A frame whose picture cannot be read again has none; the next run tries them again.

    Returns:
        Why the first of those pictures could not be read; "" if all could.
    """
    run = replace(segment, start=max(0, segment.start - config.max_edge))
    unread: dict[int, str] = {}

    def views() -> Iterator[View | None]:
        status = store.status(run.source_id, run.start, run.stop)
        extents = _extents(store, run)
        rows = stored_rows(store, run.source_id, "depth", run.start, run.stop)
        frames = source.read(run.start, run.stop, on_passed)
        for frame, packed, code, (height, width) in zip(frames, rows, status, extents, strict=True):
            on_frame()
            if code != LABELLED:
                yield None
            elif frame.image is None:
                unread[frame.index] = _why(frame)
                yield None
            else:
                yield view(frame.image, _depth(packed[:height, :width]))

    edges, score = segment_edges(views(), segment.start - run.start, max_edge=config.max_edge, flow=config.flow)
    for frame in unread:
        for row, gap in enumerate(GAPS[: edges.shape[1]]):
            for later in (frame, frame + gap):
                if segment.start <= later < segment.stop:
                    edges[later - segment.start, row, _COVERAGE] = UNREAD
    Temporal(store, segment.source_id, _options(config)).write_edges(segment, edges, score)
    return next(iter(unread.values()), "")


def write_empty_edges(segment: Segment, store: Store, config: SmoothConfig) -> None:
    """Commit a segment that could not be read again, unless an earlier run could: its frames have no edges."""
    temporal = Temporal(store, segment.source_id, _options(config))
    if segment not in temporal.pending("edges"):
        return
    edges = np.full((segment.frames, *edges_shape(config.max_edge)), np.nan, np.float32)
    edges[..., _COVERAGE] = UNREAD
    temporal.write_edges(segment, edges, np.full(segment.frames, np.nan, np.float32))


def solve_source(source_id: str, store: Store, config: SmoothConfig) -> None:
    """Solve a video whose edges are all there; what another leak made of them goes now, and not before."""
    temporal = Temporal(store, source_id, _options(config))
    if prepare(source_id, store, config, remove=False) == "solution":
        prepare(source_id, store, config)
    labelled = store.status(source_id) == LABELLED
    solution = solve(temporal.read("edges"), temporal.read("score"), labelled, leak=config.leak)
    temporal.write_solution(solution.scale, solution.shift, solution.shot)


def filter_segment(
    source: FrameSource,
    segment: Segment,
    store: Store,
    config: SmoothConfig,
    on_frame: Callable[[], None],
    on_passed: Callable[[], None] = lambda: None,
) -> str:
    """Filter and commit a segment, with `REACH` frames on both sides.

    A frame whose picture cannot be read again is scaled and shifted alone, and counts for nothing in the others; the
    next run does it again.

    Returns:
        Why the first of those pictures could not be read; "" if all could.
    """
    temporal = Temporal(store, segment.source_id, _options(config))
    frames = store.attributes(segment.source_id)["frames"]
    run = replace(segment, start=max(0, segment.start - REACH), stop=min(frames, segment.stop + REACH))
    unread: dict[int, str] = {}
    scaled: dict[int, dict[str, npt.NDArray[np.float32]]] = {}  # labels of those frames, until their turn

    def given() -> Iterator[FilterFrame | None]:
        shot = temporal.read("shot")[run.start : run.stop]
        frames = source.read(run.start, run.stop, on_passed)
        for frame, labels, number in zip(frames, _label_rows(store, run), shot, strict=True):
            on_frame()
            if labels is None:
                yield None
            elif frame.image is None:
                unread[frame.index], scaled[frame.index] = _why(frame), labels
                yield None
            else:
                yield FilterFrame(frame.image, labels.get("depth"), labels.get("normals"), int(number))

    filtered = filter_frames(given(), segment.start - run.start, run.stop - segment.stop, flow=config.flow)

    def named() -> Iterator[tuple[int, Mapping[str, npt.NDArray[np.float32]]] | None]:
        for index, one in enumerate(filtered, segment.start):
            if one is not None:
                labels = {"depth": one.depth, "normals": one.normals}
                code = PARTLY if any(abs(other - index) <= REACH for other in unread) else FILTERED
                yield code, {name: value for name, value in labels.items() if value is not None}
            else:
                yield (SCALED, scaled.pop(index)) if index in scaled else None

    temporal.write_filtered(segment, named())
    return next(iter(unread.values()), "")


def write_unfiltered(segment: Segment, store: Store, config: SmoothConfig) -> None:
    """Commit a segment that could not be read again, unless an earlier run could: scaled and shifted, not filtered."""
    temporal = Temporal(store, segment.source_id, _options(config))
    if segment not in temporal.pending("filter"):
        return
    rows = _label_rows(store, segment)
    temporal.write_filtered(segment, (None if labels is None else (SCALED, labels) for labels in rows))


class Smoother:
    """A worker: no model, no GPU. In-process, or as a Ray actor."""

    def __init__(self, config: SmoothConfig, store: str) -> None:
        """Nothing is opened yet."""
        self._config, self._store_uri = config, store
        self._state = WorkerState("starting")
        self.on_state: Callable[[WorkerState], None] = lambda state: None
        threads = 0 if config.workers == 0 else 1  # on Ray it has one core
        self._sources = OpenSources(config.max_pixels, config.max_frames, threads=threads)

    def load(self) -> str:
        """Open the store. OpenCV gets one thread: workers share the cores, and no rounding depends on their number."""
        cv2.setNumThreads(1)
        self._store = open_store(self._store_uri, index=False)
        self._state = WorkerState("idle")
        return "cpu"

    def smooth(self, task: SmoothTask) -> str:
        """Do a task, whole.

        Returns:
            Why a picture could not be read again, without which it was done; "" if all could.

        Raises:
            SourceError: If the source is not, or is no longer, what was labelled.
            StoreDamagedError: If labels are not as they were committed: nothing is computed of such.
            StoreError: If the store cannot be read or written.
        """
        done = steps = 0

        def on_passed() -> None:
            nonlocal steps
            steps += 1
            self._state = WorkerState(str(task), min(done, task.frames), task.frames, steps)

        def on_frame() -> None:
            nonlocal done
            done += 1
            on_passed()
            self.on_state(self._state)

        try:
            if task.phase == "solve":
                solve_source(task.segment.source_id, self._store, self._config)
                return ""
            if task.phase == "open":
                self._sources.close()  # one that is open may be read on when its file is gone
            with self._sources.dropping(task.uri):
                source = self._sources.open(task.uri, task.fingerprint)
                if task.phase == "open":
                    prepare(task.segment.source_id, self._store, self._config)
                    return ""
                if task.phase == "filter":
                    return filter_segment(source, task.segment, self._store, self._config, on_frame, on_passed)
                return write_segment_edges(source, task.segment, self._store, self._config, on_frame, on_passed)
        finally:
            self._state = WorkerState("idle")

    def state(self) -> WorkerState:
        """What it is doing now; may be called from another thread."""
        return self._state

    def close(self) -> None:
        """Release the open sources."""
        self._sources.close()


def _label_rows(store: Store, run: Segment) -> Iterator[dict[str, npt.NDArray[np.float32]] | None]:
    """Labels of each frame, depth scaled and shifted; None where there are none."""
    temporal = Temporal(store, run.source_id)
    scale, shift = (temporal.read(name)[run.start : run.stop] for name in ("scale", "shift"))
    status = store.status(run.source_id, run.start, run.stop)
    rows = {name: stored_rows(store, run.source_id, name, run.start, run.stop) for name in store.layout.labels}
    for i, (height, width) in enumerate(_extents(store, run)):
        packed = {name: next(one)[:height, :width] for name, one in rows.items()}
        if status[i] != LABELLED:
            yield None
            continue
        labels = {"depth": scale[i] * _depth(packed["depth"]) + shift[i]}
        if "normals" in packed:
            labels["normals"] = _normals(packed["normals"])
        yield labels


def _why(frame: Frame) -> str:
    return f"frame {frame.index}: {frame.error}"


def _extents(store: Store, run: Segment) -> npt.NDArray[Any]:
    """Height and width of each frame's labels: (frames, 2)."""
    if "size" in store.arrays(run.source_id):
        return np.array(list(stored_rows(store, run.source_id, "size", run.start, run.stop)))
    return np.tile(store.attributes(run.source_id)["size"], (run.frames, 1))


def _depth(packed: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    depth = packed.astype(np.float32) * np.float32(DEPTH_STEP)
    depth[packed == DEPTH_INVALID] = np.nan
    return depth


def _normals(packed: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Unit vectors again, (0, 0, 0) where invalid."""
    normals = packed.astype(np.float32)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.asarray(normals / np.where(length > 0, length, 1), np.float32)
