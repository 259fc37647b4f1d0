"""`depthmill smooth`, whole: edges of every segment, then a solution for every video, then, on demand, the filter."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import (
    ConfigError,
    RunStoppedError,
    SourceError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
)
from depthmill.pipeline.smoothing.stage import (
    Phase,
    Smoother,
    SmoothTask,
    edges_shape,
    write_empty_edges,
    write_unfiltered,
)
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.store.store import READERS
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.types import LABELLED, Segment
from depthmill.workers.crew import Crew
from depthmill.workers.inquest import after, cause_of, words_of
from depthmill.workers.pace import HOPELESS_AFTER, Pace, rest_s
from depthmill.workers.pool import Event, InProcess, Pool
from depthmill.workers.progress import Rate, RunConsole, open_display
from depthmill.workers.standing import Counts
from depthmill.workers.stopping import stoppable

_PHASES: tuple[Phase, ...] = ("edges", "solve", "filter")
_WAIT_S = 0.5
_LOAD_DEATHS = 3
_SHOWN = 8


@dataclass(frozen=True)
class SmoothSummary:
    """How a run ended.

    Attributes:
        store: Where the store is.
        smoothed: Ids of the sources that are smoothed now.
        left_out: Id -> why a source is not.
        unread: Segments that could not be read again, with the reason: they go without edges, or unfiltered, until a
            run of the same command reads them.
        frames: Frames that this run worked on, once a phase.
        seconds: Of this run.
        unasked: Ids of the sources that are no videos, where none were named.
    """

    store: str
    smoothed: tuple[str, ...]
    left_out: dict[str, str]
    unread: dict[str, str]
    frames: int
    seconds: float
    unasked: tuple[str, ...]


def smooth(
    store_uri: str | Path, config: SmoothConfig, *, sources: Sequence[str] = (), console: Console | None = None
) -> SmoothSummary:
    """Smooth a store's videos, or the sources named; what an earlier run did with the same options is kept.

    Args:
        store_uri: A labelled store.
        config: Options of the run.
        sources: Ids; by default every video.
        console: Where progress is shown.

    Raises:
        DepthmillError: If nothing can start.
        RunStoppedError: On Ctrl-C, SIGTERM or SIGHUP, when workers cannot be kept alive or the store not be reached,
            and when the disk is full.
    """
    with ExitStack() as stack:
        stopped = stack.enter_context(stoppable())
        store = open_store(store_uri)
        if "depth" not in store.layout.labels:
            raise ConfigError(f"{store.uri} has no depth to smooth: it holds {', '.join(store.layout.labels)}")
        for one in sources:
            store.attributes(one)  # that there is such a source
        kinds = {} if sources else {one: store.attributes(one)["kind"] for one in store.sources()}
        wanted = list(dict.fromkeys(sources)) or [one for one, kind in kinds.items() if kind == "video"]
        unasked = tuple(one for one, kind in kinds.items() if kind != "video")
        run = _Run(store, config, wanted)
        started_s = time.perf_counter()
        stack.callback(run.close)
        run.display = stack.enter_context(open_display(console or RunConsole(highlight=False), run.rate, "smoothing"))
        try:
            if run.plan(wait=True):
                pool: Pool = InProcess({"labeler": lambda: Smoother(config, store.uri)}, run.show_state)
                if config.workers or (config.workers is None and (config.address or (os.cpu_count() or 1) > 1)):
                    from depthmill.workers.cluster import connect

                    stack.enter_context(connect(config))
                    from depthmill.workers.smooth_actors import smoothers

                    pool = smoothers(config, store.uri)
                stack.callback(pool.close)
                run.go(Crew(pool), stopped.is_set)
        except KeyboardInterrupt:
            raise RunStoppedError(
                "stopped: what was smoothed so far stays; run the same command again to go on from there"
            ) from None
        except StoreFullError as error:
            raise RunStoppedError(
                f"{error}\nThe run was stopped: what was smoothed so far stays; make room, then run the same "
                "command again to go on from there"
            ) from error
    smoothed = tuple(one for one in wanted if one not in run.left_out)
    seconds = time.perf_counter() - started_s
    return SmoothSummary(store.uri, smoothed, run.left_out, run.unread, run.done, seconds, unasked)


def _unfit(store: Store, source_id: str) -> str:
    """Why a source cannot be smoothed; "" if it can."""
    pending = store.pending(source_id)
    if pending:
        return f"{len(pending)} segments are not labelled yet: run the same `depthmill label` again, then smooth"
    if "size" in store.arrays(source_id):
        sizes = store.read(source_id, "size")[store.status(source_id) == LABELLED]
        if len(np.unique(sizes, axis=0)) > 1:
            return "its pictures differ in size: expected the frames of one video, all of one size"
    return ""


@dataclass(frozen=True)
class _Planning:
    """A source that is being looked at.

    Attributes:
        source_id: Which.
        phases: That may be left of it.
        rested: Rests before it was.
        found: Why it cannot be smoothed, and its tasks.
    """

    source_id: str
    phases: Sequence[Phase]
    rested: int
    found: Future[tuple[str, list[SmoothTask]]]


class _Run:
    """A run: sources are looked at while others are worked on, a few at once, since each is many requests."""

    def __init__(self, store: Store, config: SmoothConfig, source_ids: Sequence[str]) -> None:
        self._store, self._config = store, config
        self.queue: deque[SmoothTask] = deque()
        # With the phases that may be left of each.
        self._unplanned: deque[tuple[str, Sequence[Phase]]] = deque((source_id, _PHASES) for source_id in source_ids)
        self._planning: deque[_Planning] = deque()
        self._readers = ThreadPoolExecutor(READERS, "depthmill-plan")
        self._left: Counter[str] = Counter()  # tasks of a source's phase that are not done
        self.left_out: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.rate = Rate()
        self._limits = Pace(config.frame_limit_s, config.frame_limit_s)  # phases differ too much in pace to learn it
        self.display: Any = None
        self.done = self._total = self._load_deaths = 0
        self._rests, self._rests_until_s = 0, float("-inf")
        self._rested = 0  # rests in all

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)

    def plan(self, *, wait: bool = False) -> bool:
        """Queue the tasks of the sources that have been looked at; if so told, wait for some. Whether there are any.

        Raises:
            StoreError: If the store does not answer; what was asked is asked again the next time.
        """
        while self._unplanned or self._planning:
            while self._unplanned and len(self._planning) < READERS:
                source_id, phases = self._unplanned.popleft()
                look = self._readers.submit(self._look, source_id, phases)
                self._planning.append(_Planning(source_id, phases, self._rested, look))
            first = self._planning[0]
            if not first.found.done() and (self.queue or not wait):
                break
            self._planning.popleft()
            try:
                unfit, following = first.found.result()
            except BaseException:
                self._unplanned.append((first.source_id, first.phases))
                if first.rested < self._rested:  # it met what was rested for since
                    continue
                raise
            self._rests = 0
            if unfit:
                self.left_out[first.source_id] = unfit
            self.queue += following
            self._left[first.source_id] = len(following)
            self._total += sum(0 if one.phase == "solve" else one.frames for one in following)
        return bool(self.queue)

    def _look(self, source_id: str, phases: Sequence[Phase]) -> tuple[str, list[SmoothTask]]:
        """Why a source cannot be smoothed, "" if it can, and the tasks of the first of these phases that has any."""
        temporal = Temporal(self._store, source_id)
        try:
            if phases == _PHASES:
                if unfit := _unfit(self._store, source_id):
                    temporal.leave_out(unfit)
                    return unfit, []
                config = self._config
                temporal.prepare(
                    max_edge=config.max_edge, flow=config.flow, leak=config.leak, shape=edges_shape(config.max_edge)
                )
            attributes = self._store.attributes(source_id)
            for phase in phases:
                if segments := self._to_do(source_id, phase):
                    uri, fingerprint = attributes["uri"], attributes["fingerprint"]
                    return "", [SmoothTask(phase, uri, fingerprint, segment) for segment in segments]
        except StoreDamagedError as error:
            temporal.leave_out(str(error))
            return str(error), []
        return "", []

    def _to_do(self, source_id: str, phase: Phase) -> list[Segment]:
        """What is left of a phase whose turn it is: also what an earlier run did without pictures it could not read."""
        temporal = Temporal(self._store, source_id)
        if phase == "solve":
            return [] if temporal.solved() else [Segment(source_id, 0, self._store.attributes(source_id)["frames"])]
        if phase == "filter":
            if not self._config.filter:
                return []
            temporal.prepare_filter()
        return sorted({*temporal.pending(phase), *temporal.unread(phase)}, key=lambda one: one.start)

    def show_state(self, state: Any) -> None:
        self.display(Counts(self._total, 0, self.done, 0), {"this process": state})

    def go(self, crew: Crew, stopped: Callable[[], bool]) -> None:
        """Work until nothing is left.

        Raises:
            KeyboardInterrupt: Once the run is `stopped`.
        """
        while self.queue or self._unplanned or self._planning or crew.busy:
            if stopped():
                raise KeyboardInterrupt
            room = crew.room() if self._config.workers is None else max(1, self._config.workers)
            if crew.now_s >= self._rests_until_s:
                self._assign(crew, room)
            for event in crew.wait(_WAIT_S):
                self._ended(crew, event)
            for event in list(crew.end_overdue()):
                self._ended(crew, event)
            self.display(Counts(self._total, 0, self.done, 0), crew.states(_SHOWN))

    def _assign(self, crew: Crew, room: int) -> None:
        """Give idle workers something to do."""
        try:
            self.plan(wait=not crew.busy)
        except StoreFullError:
            raise
        except StoreError as error:
            self._rest(error, crew.now_s)
        for _ in range(min(room, len(self.queue)) - len(crew.labelers)):
            crew.hire("labeler")
        for worker in list(crew.idle):
            if self.queue:
                task = self.queue.popleft()
                limits = self._limits.to_do(task.frames + self._config.max_edge)
                limits = replace(limits, still_s=None) if task.phase == "solve" else limits
                crew.call(worker, task, limits, "smooth", task)

    def _rest(self, error: BaseException, now_s: float) -> None:
        """Wait for a store that does not answer: longer each time, but once for all that met it together."""
        if now_s < self._rests_until_s:
            return
        if self._rests >= HOPELESS_AFTER:
            raise RunStoppedError(
                f"{error}\nThe run was stopped: what was smoothed so far stays; see to the store, then run the same "
                "command again to go on from there"
            ) from error
        self._rests_until_s = now_s + rest_s(self._rests)
        self._rests += 1
        self._rested += 1

    def _ended(self, crew: Crew, event: Event) -> None:
        running = crew.ended(event)
        if running is None:
            return
        if running.item is None:
            self._loaded(event)
        elif event.error is None:
            self._rests = 0
            if event.answer:
                self.unread[str(running.item)] = event.answer
            self._finished(running.item)
        elif isinstance(cause := cause_of(event.error), StoreFullError):
            raise cause
        elif isinstance(cause, StoreError) and not isinstance(cause, StoreDamagedError):
            self.queue.appendleft(running.item)
            self._rest(cause, crew.now_s)
        else:
            try:
                self._failed(running.item, event)
            except StoreFullError:
                raise
            except StoreError as error:
                self.queue.appendleft(running.item)
                self._rest(error, crew.now_s)

    def _loaded(self, event: Event) -> None:
        if event.error is None:
            self.rate.start()
            self._load_deaths = 0
            return
        self._load_deaths += 1
        if not event.died or self._load_deaths >= _LOAD_DEATHS:
            raise RunStoppedError(
                f"workers cannot start ({words_of(event)}): see to it, and run the same command again; what is "
                "smoothed stays"
            ) from event.error

    def _finished(self, task: SmoothTask) -> None:
        source_id = task.segment.source_id
        if source_id in self.left_out:
            return
        self.done += 0 if task.phase == "solve" else task.frames
        self._left[source_id] -= 1
        if not self._left[source_id]:
            self._unplanned.appendleft((source_id, _PHASES[_PHASES.index(task.phase) + 1 :]))

    def _failed(self, task: SmoothTask, event: Event) -> None:
        source_id = task.segment.source_id
        if source_id in self.left_out:
            return
        tried = after(task, event)
        if tried.attempts < self._config.attempts:
            self.queue.append(tried)
        elif isinstance(cause_of(event.error), SourceError | StoreDamagedError) or task.phase == "solve":
            Temporal(self._store, source_id).leave_out(words_of(event))
            self.left_out[source_id] = words_of(event)
            self.queue = deque(one for one in self.queue if one.segment.source_id != source_id)
        else:
            self.unread[str(task)] = words_of(event)
            if task.phase == "edges":
                write_empty_edges(task.segment, self._store, self._config)
            else:
                write_unfiltered(task.segment, self._store)
            self._finished(task)
