"""`depthmill smooth`, whole: edges of every segment, then a solution for every video, then, on demand, the filter."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import (
    ConfigError,
    RunStoppedError,
    SourceChangedError,
    SourceError,
    StoreClosedError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
)
from depthmill.pipeline.machine import cores
from depthmill.pipeline.smoothing.stage import Smoother, SmoothTask, write_empty_edges, write_unfiltered
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.types import WorkerState
from depthmill.workers.causes import after, cause_of, words_of
from depthmill.workers.crew import Crew
from depthmill.workers.loading import Loading
from depthmill.workers.looks import Looks
from depthmill.workers.pace import OPEN_FRAMES, Pace, Rests
from depthmill.workers.pool import Event, InProcess, Pool
from depthmill.workers.progress import Rate, RunConsole, open_display, warn
from depthmill.workers.standing import Counts
from depthmill.workers.stopping import stoppable

_WAIT_S = 0.5
_LOAD_FAILURES = 3  # after which workers are asked for seldom, or the run ends
_IN_A_ROW = 5
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
        frames: Frames that this run worked on, once for their scale and shift, and once more if it filtered them.
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
    console = console or RunConsole(highlight=False)
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
        run.left_out |= {} if sources else store.damaged
        started_s = time.perf_counter()
        stack.callback(run.looks.close)
        run.display = stack.enter_context(open_display(console, run.rate, "smoothing"))
        try:
            if run.begin():
                pool: Pool = InProcess({"labeler": lambda: Smoother(config, store.uri)}, run.show)
                if config.workers or (config.workers is None and (config.address or cores() > 1)):
                    from depthmill.workers.cluster import connect

                    stack.enter_context(connect(config))
                    from depthmill.workers.smooth_actors import smoothers

                    pool = smoothers(config, store.uri)
                stack.callback(pool.close)
                run.go(Crew(pool), stopped.is_set, partial(warn, console))
        except KeyboardInterrupt:
            raise RunStoppedError(
                "stopped: what was smoothed so far stays; run the same command again to go on from there"
            ) from None
        except StoreError as error:
            remedy = "make room" if isinstance(error, StoreFullError) else "see to the store"
            raise RunStoppedError(
                f"{error}\nThe run was stopped: what was smoothed so far stays; {remedy}, then run the same command "
                "again to go on from there"
            ) from error
    smoothed = tuple(one for one in wanted if one not in run.left_out)
    seconds = time.perf_counter() - started_s
    return SmoothSummary(store.uri, smoothed, run.left_out, run.unread, run.done, seconds, unasked)


class _Run:
    """A run: what is left of each source, who is at what, and what became of it."""

    def __init__(self, store: Store, config: SmoothConfig, source_ids: Sequence[str]) -> None:
        self._store, self._config = store, config
        self.looks = Looks(store, config, source_ids)
        self.queue: deque[SmoothTask] = deque()
        self._left: Counter[str] = Counter()  # tasks of a source's phase that are not done
        self.left_out: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.rate = Rate()
        limit_s = config.frame_limit_s
        self._limits = Pace(limit_s, limit_s, OPEN_FRAMES * limit_s)  # phases differ too much in pace to learn it
        self.display: Any = None
        self.done = 0  # frames, once a phase
        self._ahead: dict[str, int] = {}  # the same that is left of a source, as far as is known
        self._to_do = 0  # all of that
        self._suspects: dict[str, str] = {}  # source that could not be opened, though others could be -> why
        self._held: list[SmoothTask] = []  # theirs
        self._good: SmoothTask | None = None  # opens a source that was opened in this run
        self._check: SmoothTask | None = None  # that, under way
        self._away = False  # whether it failed
        self._rests = Rests()

    def plan(self, *, wait: bool = False) -> bool:
        """Queue the tasks of the sources that have been looked at; if so told, wait for some. Whether there are any.

        A source that is begun comes first, so that it is smoothed before many are begun.

        Raises:
            StoreError: If the store does not answer; what was asked is asked again the next time.
        """
        while (found := self.looks.take(self._rests.until_s, wait=wait and not self.queue)) is not None:
            self._rests.answered()
            if found.unfit:
                self.left_out[found.source_id] = found.unfit
            if found.begun:
                self.queue.extendleft(reversed(found.tasks))
            else:
                self.queue += found.tasks
            self._left[found.source_id] = len(found.tasks)
            phases = {"solve": int(self._config.filter), "filter": 1}  # this one and those that follow it
            frames = sum(one.frames * phases.get(one.phase, 1 + self._config.filter) for one in found.tasks)
            self._expect(found.source_id, frames)
        return bool(self.queue)

    def begin(self) -> bool:
        """Plan, while nobody works yet, and wait for a store that does not answer.

        Raises:
            RunStoppedError: If it does not for long.
        """
        while True:
            try:
                return self.plan(wait=True)
            except StoreClosedError:
                raise
            except StoreError as error:
                self._rest(error, time.perf_counter())  # the clock of all pools
            time.sleep(max(0.0, self._rests.until_s - time.perf_counter()))

    def show(self, states: Mapping[str, WorkerState]) -> None:
        """Bring the display up to date."""
        self.display(Counts(self.done + self._to_do, 0, self.done, 0), states)

    def go(self, crew: Crew, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Work until nothing is left.

        Args:
            crew: The workers.
            stopped: Whether the run is to end.
            say: Says a line to the user.

        Raises:
            KeyboardInterrupt: If the run is to end.
        """
        loading = Loading(crew, say, lambda: _LOAD_FAILURES)
        while self.queue or self.looks.left or crew.busy or self._suspects:
            if stopped():
                raise KeyboardInterrupt
            room = crew.room() if self._config.workers is None else max(1, self._config.workers)
            if self._rests.over(crew.now_s):
                self._assign(crew, 0 if loading.pauses else room)
            for event in crew.wait(_WAIT_S):
                self._ended(crew, event, loading)
            for event in list(crew.end_overdue()):
                self._ended(crew, event, loading)
            self.show(crew.states(_SHOWN))

    def _assign(self, crew: Crew, room: int) -> None:
        """Give idle workers something to do, and ask for more if there is room for so many."""
        try:
            self.plan(wait=not crew.busy)
        except StoreClosedError:
            raise
        except StoreError as error:
            self._rest(error, crew.now_s)
        for _ in range(min(room, len(self.queue) or bool(self._suspects)) - len(crew.labelers)):
            crew.hire("labeler")
        for worker in list(crew.idle):
            if (task := self._next(crew)) is not None:
                limits = self._limits.to_do(task.frames + self._config.max_edge)
                limits = replace(limits, still_s=None) if task.phase in ("open", "solve") else limits
                crew.call(worker, task, limits, "smooth", task)

    def _next(self, crew: Crew) -> SmoothTask | None:
        """The next task. Once several sources, or the last ones, cannot be opened, it is to open one that could be."""
        if self._check is not None:
            return None
        while self.queue and len(self._suspects) < _IN_A_ROW:
            task = self.queue.popleft()
            if task.segment.source_id in self._suspects:
                self._held.append(task)
            elif task.segment.source_id not in self.left_out:
                return task
        if len(self._suspects) >= _IN_A_ROW or (self._suspects and not (self.looks.left or crew.busy)):
            self._check = self._good
        return self._check

    def _rest(self, error: BaseException, now_s: float) -> None:
        """Wait for what does not answer: longer each time, but once for all that met it together."""
        if not self._rests.over(now_s):
            return
        if not self._rests.begin(now_s):
            raise RunStoppedError(
                f"{error}\nThe run was stopped: what was smoothed so far stays; expected inputs, store and credentials "
                "to be as they were: see to them, then run the same command again to go on from there"
            ) from error

    def _ended(self, crew: Crew, event: Event, loading: Loading) -> None:
        running, cause = crew.ended(event), cause_of(event.error)
        if running is None:
            return
        if running.item is None:
            if event.error is None:
                self.rate.start()
                loading.loaded()
                loading.trusted()
            else:
                loading.failed(event, "loading", needed=not (crew.ready or crew.loading))
            return
        checks = self._check is running.item
        if checks:
            self._check = None
        try:
            if isinstance(cause, StoreError) and not isinstance(cause, StoreDamagedError):
                raise cause
            if checks:
                self._checked(cause, crew.now_s)
            elif cause is None:
                self._rests.answered()
                if running.item.phase != "solve":
                    self._good = replace(running.item, phase="open", attempts=0, losses=0)
                if event.answer:
                    self.unread[str(running.item)] = event.answer
                self._finished(running.item)
            else:
                self._failed(running.item, event)
        except StoreClosedError:
            raise
        except StoreError as error:
            if not checks:
                self.queue.appendleft(running.item)
            self._rest(error, crew.now_s)

    def _finished(self, task: SmoothTask) -> None:
        source_id = task.segment.source_id
        if source_id in self.left_out:
            return
        if task.phase not in ("open", "solve"):
            self.done += task.frames
            self._expect(source_id, self._ahead.get(source_id, 0) - task.frames)
        self._left[source_id] -= 1
        if not self._left[source_id]:
            self.looks.add(source_id, task.phase)

    def _failed(self, task: SmoothTask, event: Event) -> None:
        source_id, cause = task.segment.source_id, cause_of(event.error)
        if source_id in self.left_out:
            return
        tried = after(task, event)
        if source_id in self._suspects:
            self._held.append(task)
        elif tried.attempts < self._config.attempts:
            self.queue.append(tried)
        elif isinstance(cause, SourceError) and not isinstance(cause, SourceChangedError) and self._good is not None:
            self._suspects[source_id] = words_of(event)
            self._held.append(replace(task, attempts=0))
        elif isinstance(cause, SourceError | StoreDamagedError) or task.phase in ("open", "solve"):
            self._leave_out(source_id, words_of(event))
        else:
            if task.phase == "edges":
                write_empty_edges(task.segment, self._store, self._config)
            else:
                write_unfiltered(task.segment, self._store, self._config)
            self.unread[str(task)] = words_of(event)  # once that is written: else it is tried again
            self._finished(task)

    def _checked(self, cause: BaseException | None, now_s: float) -> None:
        """Leave out what could not be opened when another source could; else wait, and try it again."""
        changed = isinstance(cause, SourceChangedError | StoreDamagedError)  # it tells nothing any more
        if cause is not None and not changed:
            self._away = True
            self._rest(cause, now_s)
            return
        if self._away:
            self.queue += self._held
            self._suspects.clear()
        while self._suspects:
            self._leave_out(*next(iter(self._suspects.items())))
        self._held, self._away = [], False
        self._rests.answered()
        self._good = None if changed else self._good

    def _leave_out(self, source_id: str, why: str) -> None:
        Temporal(self._store, source_id).leave_out(why)
        self.left_out[source_id] = why
        self._expect(source_id, 0)
        self._suspects.pop(source_id, None)

    def _expect(self, source_id: str, frames: int) -> None:
        """So many frames are left of a source."""
        self._to_do += frames - self._ahead.get(source_id, 0)
        self._ahead[source_id] = frames
