"""A worker: a loaded labeler, the store it writes to, and what it has open. In-process, or as a Ray actor."""

from __future__ import annotations

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError
from depthmill.pipeline.machine import keep_freed_memory
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import Prefetch
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.stages import (
    Labelled,
    label_frames,
    read_segment,
    try_segment,
)
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.types import Frame, FrameSource, Report, WorkerState

_WARNINGS = 100  # that are kept for the next report


class _Warnings(logging.Handler):
    """What this package warns of: on a cluster nobody sees what a worker writes to its log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        """What is new, each once; another thread may warn meanwhile."""
        return tuple(dict.fromkeys(self._lines.popleft() for _ in range(len(self._lines))))


class _DroppedError(Exception):
    """The labels of a task are no longer wanted."""


class _Steps:
    """How far a worker is with a task; two threads take its steps."""

    def __init__(self, doing: str, frames: int) -> None:
        self.state = WorkerState(doing, 0, frames)
        self._lock = threading.Lock()

    def take(self, done: int | None = None) -> WorkerState:
        """One more, with which so many frames are done, if it makes a difference to that."""
        with self._lock:
            frames = self.state.frames if done is None else done
            self.state = replace(self.state, frames=frames, steps=self.state.steps + 1)
            return self.state


class _Job:
    """A task on its way: a thread of its own reads its frames, the worker's one labelling thread labels them.

    Attributes:
        read: Done when the last frame has been read and taken, whatever became of it.
        labelled: Its labels, but for the commit.
        steps: How far it is.
    """

    def __init__(
        self, task: Task, open_source: Callable[[], FrameSource], ahead: int, on_passed: Callable[[_Steps], None]
    ) -> None:
        self.task = task
        self.read: Future[None] = Future()
        self.labelled: Future[Labelled]
        self.steps = _Steps(str(task.segment), task.frames)
        self._open = open_source
        self._ahead = ahead
        self._on_passed = on_passed
        self._source: Future[FrameSource] = Future()
        self._frames: Prefetch[Frame] | None = None
        self._dropped = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start to read; what keeps it from that, such as a limit on threads, is said to whoever labels it."""
        with self._lock:
            if not self._dropped:
                try:
                    self._frames = Prefetch(self._read(), self._ahead, lambda frame: frame.nbytes)
                except Exception as error:
                    self._source.set_exception(error)

    def source(self) -> FrameSource:
        """The source, once it is open."""
        return self._source.result()

    def frames(self) -> Iterator[Frame]:
        """The frames, in order."""
        assert self._frames is not None
        for frame in self._frames:
            if self._dropped:
                raise _DroppedError
            yield frame
        self.end_reading()

    def end_reading(self) -> None:
        """Whoever waits for its turn may read now."""
        if not self.read.done():
            self.read.set_result(None)

    def drop(self) -> None:
        """End it as soon as may be."""
        with self._lock:
            self._dropped = True
        if self.labelled.cancel():
            self.release()

    def release(self) -> None:
        """End the thread that reads."""
        if self._frames is not None:
            self._frames.close()

    def _read(self) -> Iterator[Frame]:
        try:
            self._source.set_result(self._open())
        except BaseException as error:
            self._source.set_exception(error)
            raise
        task = self.task
        on_passed = partial(self._on_passed, self.steps)
        yield from read_segment(self.source(), task.segment, dict(task.skip), task.only or None, on_passed)


class Worker:
    """Labels segments, one call at a time.

    It may be told of a second task, which it will be called with next: its frames are read and labelled while the first
    one is written and committed and its answer is on the way, so that the device never waits for either. If another
    call comes instead, that work is dropped: nothing of it was visible.
    """

    def __init__(
        self, config: LabelConfig, store: str, digests: tuple[str, ...], sources: OpenSources | None = None
    ) -> None:
        """Nothing is loaded yet.

        Args:
            config: The run's, with `device`, `dtype` and `threads` settled.
            store: Where the store is, which exists.
            digests: sha256 of the run's checkpoints: on another machine the same name could mean other files.
            sources: Where a prober in the same process leaves what it has opened.
        """
        self._config = config
        self._store_uri = store
        self._digests = digests
        self._state = WorkerState("starting")
        self.on_state: Callable[[WorkerState], None] = lambda state: None  # told of each change, in-process
        self._sources = sources or OpenSources(config.max_pixels, config.max_frames)
        # One for all: CUDA graphs belong to the thread that recorded them.
        self._thread = ThreadPoolExecutor(1, "depthmill-label")
        self._warnings = _Warnings()
        logging.getLogger("depthmill").addHandler(self._warnings)
        self._current: _Job | None = None
        self._next: _Job | None = None
        self._storing: set[int] = set()  # threads that wait for the store
        self._labeler: Labeler
        self._store: Store

    def load(self) -> str:
        """Load the checkpoints; returns the device, and how it is used, in words.

        Raises:
            CheckpointError: If they cannot be loaded, or are not those that the run was planned with.
        """
        self._now(WorkerState("loading"))
        on_cpu = self._config.device == "cpu"
        if on_cpu:
            keep_freed_memory()
        backend = self._thread.submit(self._load).result()
        if not on_cpu:
            keep_freed_memory()  # now that weights have gone to the device, and what they took here is given back
        # What is loaded stays: looking through it for garbage again would stop all threads for a fifth of a second.
        gc.collect()
        gc.freeze()
        self._now(WorkerState("idle"))
        return backend

    def _load(self) -> str:
        assert self._config.threads is not None
        torch.set_num_threads(self._config.threads)
        checkpoints = open_checkpoints(self._config)
        for checkpoint, digest in zip(checkpoints, self._digests, strict=True):
            if checkpoint.sha256 != digest:
                raise CheckpointError(
                    f"checkpoint {checkpoint.name} has sha256 {checkpoint.sha256[:12]}… here and {digest[:12]}… where "
                    "the run was started; expected the same files on every machine: copy them"
                )
        self._labeler = Labeler(checkpoints, self._config)
        self._store = open_store(self._store_uri, index=False)
        return self._labeler.backend

    def label(self, task: Task, following: Task | None = None) -> Report:
        """Label and commit a segment.

        Args:
            task: Which.
            following: What the next call will be for, if that is known.

        Raises:
            SourceError: If the source is not, or is no longer, what the run was planned with.
            StoreError: If the labels cannot be written.
        """
        job, self._next = self._next, None
        if job is not None and job.task != task:
            job.drop()
            job = None
        if job is None:
            job = self._queue(task, None)
        else:
            self._now(job.steps.state)
        if following is not None:
            self._next = self._queue(following, job)
        self._current = job
        try:
            return replace(job.labelled.result().commit(), warnings=self._warnings.take())
        finally:
            self._state = WorkerState("idle")

    def try_task(self, task: Task) -> int:
        """Read and label frames without writing anything, to see whether it can be done; how many could be."""
        job, self._next = self._next, None
        if job is not None:
            job.drop()
        steps = _Steps(f"searching {task.segment}", task.frames)
        self._now(steps.state)
        on_frames, on_passed = partial(self._on_frames, steps), partial(self._on_passed, steps)
        try:
            with self._sources.dropping(task.uri):
                source = self._sources.open(task.uri, task.fingerprint)
                on_frames(0)
                trial = self._thread.submit(try_segment, source, task.segment, self._labeler, on_frames, on_passed)
                return trial.result()
        finally:
            self._state = WorkerState("idle")

    def try_noise(self) -> int:
        """Label a small picture of noise, to see whether the device can do anything; 1 if the answer is a number."""
        noise = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
        labels = self._thread.submit(self._labeler, noise).result()
        answers = [one for one in (labels.depth, labels.normals) if one is not None]
        return int(all(np.isfinite(one).any() and one.any() for one in answers))

    def state(self) -> WorkerState:
        """What it is doing now; may be called from another thread."""
        return replace(self._state, storing=bool(self._storing))

    def close(self) -> None:
        """Drop what is under way, and release the open sources."""
        for job in (self._current, self._next):
            if job is not None:
                job.drop()
        self._thread.shutdown(cancel_futures=True)
        self._sources.close()
        logging.getLogger("depthmill").removeHandler(self._warnings)
        gc.unfreeze()

    def _queue(self, task: Task, after: _Job | None) -> _Job:
        """Have a task read when the reading of another has ended, and labelled when its labelling has."""
        open_source = partial(self._sources.open, task.uri, task.fingerprint)
        job = _Job(task, open_source, 2 * self._labeler.batch_size, self._on_passed)
        if after is None:
            self._now(job.steps.state)
            job.begin()
        else:
            after.read.add_done_callback(lambda _: job.begin())
        job.labelled = self._thread.submit(self._label, job)
        return job

    def _label(self, job: _Job) -> Labelled:
        task = job.task
        on_frames = partial(self._on_frames, job.steps)
        try:
            with self._sources.dropping(task.uri):
                rounded = self._labeler.rounds(job.source().probe())
                on_frames(0)
                return label_frames(
                    job.frames(),
                    task.segment,
                    self._labeler,
                    self._store,
                    on_frames,
                    rounded=rounded,
                    only=task.only or None,
                    storing=self._in_store,
                )
        finally:
            job.end_reading()
            job.release()

    @contextmanager
    def _in_store(self) -> Iterator[None]:
        self._storing.add(threading.get_ident())
        try:
            yield
        finally:
            self._storing.discard(threading.get_ident())

    def _on_frames(self, steps: _Steps, done: int) -> None:
        """So many frames are done; first, once the source is open, none.

        Those of a task that is begun ahead count when it is called for: until then the one before is shown as it is.
        """
        state, ahead = steps.take(done), self._next
        if ahead is None or ahead.steps is not steps:
            self._now(state)
        else:
            self._state = replace(self._state, steps=self._state.steps + 1)

    def _on_passed(self, steps: _Steps) -> None:
        """Something was passed over on the way to a frame, perhaps of what is only begun ahead; not worth showing."""
        state = steps.take()
        if self._state.doing == state.doing:
            self._state = state

    def _now(self, state: WorkerState) -> None:
        self._state = state
        self.on_state(state)
