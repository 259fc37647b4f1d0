"""The driver: keeps the workers busy until every segment is committed. It sends segments, never pixels.

What it knows of workers is a `Pool`, so that the same code runs in one process, on Ray, and against simulated workers
and a simulated clock (tests, `benchmarks/driver.py`).

A segment that fails (an exception, a dead worker, one that takes too long) is tried again, by another worker if there
is one. After `attempts` it is bisected: halves of it are read and labelled, without being written, down to the frames
that do it. Those are quarantined, each only after `attempts` failures of its own; then the whole segment is labelled
around them, in the batches that an unreadable frame would leave too, so that its bytes tell nothing of the search.
A worker that went with its machine counts against no segment, nor do failures that are a worker's own (`doubts.py`) or
the store's (`causes.py` has the table). A segment whose frames a search has cleared is granted more time than before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import inf

from depthmill.pipeline.errors import (
    RunStoppedError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    StoreReplacedError,
)
from depthmill.pipeline.plan import Planned, Task
from depthmill.pipeline.types import Report
from depthmill.workers.backlog import Probe
from depthmill.workers.causes import DIED, WHOLE, after, cause_of, fault_of, words_of
from depthmill.workers.crew import Crew, Running
from depthmill.workers.deferred import Failer, Publisher
from depthmill.workers.doubts import Check, Doubts
from depthmill.workers.given_up import GivenUp, Suspect
from depthmill.workers.inputs import Inputs
from depthmill.workers.inquest import Trial
from depthmill.workers.loading import Loading
from depthmill.workers.pace import Limits, Pace
from depthmill.workers.pool import Event, Pool
from depthmill.workers.standing import Standing
from depthmill.workers.terms import Calls, Options
from depthmill.workers.work import Work

_POLL_S = 0.5
_SHOW_EVERY_S = 0.2
_WATCH_S = 60.0  # of nothing happening, until the run says what it waits for
_SHOWN_WORKERS = 16
_LEAVE = 1.5  # times the limits, each time that the store does not get on
_LABELERS_A_PROBER = 8
_FEW_SINGLE = 8  # inputs of one frame each
_AHEAD = 4  # inputs that are known, for each prober


class Driver:
    """One run. Make it, `run()` it, then look at the rest.

    Attributes:
        standing: Where the run stands.
        inputs: What is to be probed, and what could not be.
        ids: Of the sources that have been.
    """

    def __init__(self, pool: Pool, options: Options, calls: Calls, uris: Iterable[str], planned: Sequence[Planned]):
        """Nothing is started yet.

        Args:
            pool: The workers.
            options: How.
            calls: What is done by others.
            uris: Inputs to be probed; read as far ahead as probers need them.
            planned: Sources that have been probed already.
        """
        self._crew = Crew(pool)
        self._options = options
        self._calls = calls
        self.standing = Standing()
        self.inputs = Inputs(uris, options.attempts, self._say_once, planned[0].uri if planned else "")
        self._work = Work(options.attempts)
        self.ids: set[str] = set()
        self._doubts = Doubts(self._crew, self._say_once, replace=options.workers != 0)
        self._given_up = GivenUp(self._say_once)
        self._said: set[str] = set()
        self._publisher, self._failer = Publisher(calls.publish), Failer(calls.fail)
        self._pace = Pace(options.frame_limit_s, options.least_limit_s, options.open_limit_s)
        self._probe_s: dict[str, float] = {}  # source -> what probing it took
        self._backends: set[str] = set()  # how workers use their devices, by their own account
        self._loading = Loading(self._crew, self._say_once, lambda: options.attempts * self._most_labelers)
        self._single = 0  # sources of one frame, to be labelled
        self._dropped: set[str] = set()  # sources that changed, or are damaged in the store
        self._shown_s = self._looked_s = float("-inf")
        self._happened_s = self._crew.now_s
        for source in planned:
            self._plan(source)

    def run(self) -> None:
        """Label until nothing is left.

        Raises:
            KeyboardInterrupt: If the run is to end.
            RunStoppedError: If workers cannot be kept alive, or the disk is full.
            DepthmillError: If a worker cannot load for a reason of ours, such as a checkpoint that does not fit.
        """
        try:
            self._read_inputs()
            while self._work.open or self.inputs.left:
                if self._calls.stopped():
                    raise KeyboardInterrupt
                self._hire()
                self._assign()
                for event in self._crew.wait(_POLL_S):
                    self._take(event)
                self._look()
                self._read_inputs()
            with suppress(StoreError):  # who runs this names all that the store has
                self._publisher.publish()
        except BaseException as error:
            with suppress(Exception):  # what stopped the run matters more
                self._publisher.publish()
            if not isinstance(error, StoreError) or isinstance(error, StoreMismatchError | StoreReplacedError):
                raise
            remedy = "make room" if isinstance(error, StoreFullError) else "see to the store"
            raise RunStoppedError(
                f"{error}\nThe run was stopped with {self.standing.left_to_label(self.inputs.left)}. "
                f"What is committed stays: {remedy}, then run the same command again to go on from there"
            ) from error
        finally:
            self._show()

    def _read_inputs(self) -> None:
        self.inputs.read(_AHEAD * self._probers, self._crew.now_s)

    def _hire(self) -> None:
        """Ask for the workers that there is work for: room comes with nodes, and work with sources."""
        crew = self._crew
        if self._loading.pauses:
            return
        for _ in range(min(self._probers, self.inputs.unprobed) - len(crew.probers)):
            crew.hire("prober")
        work = len(self._work) - len(self._able) - len(crew.loading)
        if work > 0:
            wanted = work + self._loading.failures  # more, lest the only one comes to a bad machine again
            for _ in range(min(self._most_labelers - len(crew.labelers), wanted)):
                crew.hire("labeler")

    @property
    def _able(self) -> list[int]:
        """Labelers with nothing to do that may be given something."""
        doubted = set(self._doubts.workers)
        return [worker for worker in self._crew.idle if worker not in doubted]

    @property
    def _most_labelers(self) -> int:
        return self._options.workers or self._crew.room()

    @property
    def _probers(self) -> int:
        return max(self._options.probers, self._crew.ready // _LABELERS_A_PROBER)

    def _assign(self) -> None:
        """Give idle workers something to do."""
        crew, opening = self._crew, Limits(self._options.open_limit_s)
        while crew.idle_probers and (probe := self.inputs.take(crew.now_s)) is not None:
            crew.call(crew.idle_probers.pop(), probe, opening, "probe", probe.uri, probe.anew)
        if not self.inputs.left:
            crew.dismiss_idle_probers()
        self._doubts.check(self._limits, self._pace.to_do(1))
        if not self._given_up.rests.over(crew.now_s):
            return
        alone = crew.ready - len(self._doubts.workers) == 1
        for worker in self._able:
            item = self._work.take(worker, alone) or self._left_over()
            if isinstance(item, Trial):
                crew.call(worker, item, self._limits(item.task), "try_task", item.task)
            elif item is not None:
                following = self._work.begin(item, worker, crew.ready)
                crew.call(worker, item, self._limits(item), "label", item, *following)
            elif self._work.given_out:
                break

    def _left_over(self) -> Task | None:
        """What somebody is to do next, or a segment that takes too long.

        That worker may have begun it, and writes on after the second one has committed its checksums, so both must
        write the same bytes. They do not where workers round differently: by what each has compiled so far, or by the
        size of their batches.
        """
        if self._work.queued or not self._options.race or len(self._backends) > 1:
            return None
        if (begun := self._work.take_from_another()) is not None:
            return begun
        if self.inputs.left or not self._pace.frame_s:
            return None
        return self._crew.straggler(self._pace.frame_s, self._work.of_one())

    def _take(self, event: Event) -> None:
        """What follows from an event."""
        worker, prober = event.worker, event.worker in self._crew.probers
        running = self._crew.ended(event)
        if event.died:
            self._work.release(worker)
            if (running is None or not isinstance(running.item, Check)) and (held := self._doubts.left(worker)):
                self._put_back(*held)
        if self._work.take_void(worker) or running is None:
            return
        self._happened_s = self._crew.now_s
        match running.item:
            case Probe() as probe:
                self._probed(probe, running, event)
            case Check() as check:
                self._checked(check, event)
            case None:
                self._loaded(event, prober)
            case _ if event.error is None:
                self._doubts.did(worker)
                self._outcome(running, event)
            case item:
                self._went_wrong(item, running, event)

    def _went_wrong(self, item: Task | Trial, running: Running, event: Event) -> None:
        """What follows from a task, or a trial, that failed: first of all, whether its worker is at fault."""
        task = item.task if isinstance(item, Trial) else item
        alone = isinstance(item, Trial) or task.segment in self._work.of_one()
        match fault_of(task, event, self.standing.succeeded):
            case "run":
                raise cause_of(event.error) or RunStoppedError(words_of(event))
            case "store":
                self._work.put_back(item, event.worker)
                self._work.release(event.worker)
                self._doubts.cannot_write(event)
            case _ if not event.died and alone and self._doubts.failed(running, event, self._options.attempts):
                self._work.release(event.worker)
            case _:
                self._outcome(running, event)

    def _outcome(self, running: Running, event: Event) -> None:
        """What follows from a task's end, or a trial's."""
        if isinstance(running.item, Trial):
            if event.error is None:
                self._pace.add(event.answer, self._crew.now_s - running.since_s)
            self._work.tried(running.item, event)
        else:
            self._labelled(running.item, running, event)

    def _loaded(self, event: Event, prober: bool) -> None:
        if event.error is not None:
            needed = prober or not (self._crew.ready or self._crew.loading)
            self._loading.failed(event, "loading the model", needed)
            return
        self.standing.device = self.standing.device or event.answer
        if not prober:
            self._backends.add(event.answer)
            self._loading.loaded()
            self._doubts.came(event.worker)
        if event.worker not in self._doubts.workers:
            self._loading.trusted()

    def _checked(self, check: Check, event: Event) -> None:
        held, counts = self._doubts.checked(check, event)
        if held is not None:
            (self._outcome if counts else self._put_back)(*held)
        if event.died:
            doing = f"trying again {'what was labelled before' if check.task else 'to label anything'}"
            self._loading.failed(event, doing, needed=self._crew.ready == len(self._doubts.workers))
        elif event.error is None and event.answer:
            self._loading.trusted()

    def _put_back(self, running: Running, event: Event) -> None:
        self._work.put_back(running.item, event.worker)

    def _limits(self, task: Task) -> Limits:
        """How long it may take: more if a search has cleared its frames, or if the store does not get on."""
        leave = inf if task.searched else _LEAVE**self._doubts.stalls
        return self._pace.to_do(task.frames, self._probe_s.get(task.segment.source_id), leave)

    def _probed(self, probe: Probe, running: Running, event: Event) -> None:
        if event.error is None:
            took_s = self._crew.now_s - running.since_s
            self.inputs.probed(probe, took_s)
            self._probe_s[event.answer.id] = took_s
            self._plan(event.answer)
        else:
            self.inputs.failed(probe, event, self._crew.now_s)

    def _plan(self, source: Planned) -> None:
        if source.id in self.ids:  # one input, named twice in two ways
            return
        self.ids.add(source.id)
        self._work.add(source)
        self.standing.planned(source)
        self._publisher.add(source.id, source.stamp, self._crew.now_s)
        self._single += source.frames == 1 and source.segments > 0
        if self._single > _FEW_SINGLE:
            self._say_once(
                f"more than {_FEW_SINGLE} inputs have one frame each, which is a batch of its own: give the folder of "
                "such pictures as one input, and it is labelled in full batches"
            )

    def _labelled(self, task: Task, running: Running, event: Event) -> None:
        others = self._work.leave(task, event.worker)
        if event.error is not None:
            if not others:  # else another worker is still at it
                self._failed(task, event)
            return
        self._work.labelled(task)
        self._pace.add(event.answer.labelled, self._crew.now_s - running.since_s)
        self._doubts.committed(task, event.answer)
        self._committed(event.answer)
        if event.answer.labelled:
            self._judge(self._given_up.labelled())

    def _failed(self, task: Task, event: Event) -> None:
        tried, fault = after(task, event), fault_of(task, event, self.standing.succeeded)
        self.standing.retries += 1
        if task.segment.source_id in self._dropped:
            self._work.open -= 1
        elif tried.attempts < self._options.attempts:
            self._work.again(tried, event.worker)
        elif fault == "source":
            self._dropped.add(task.segment.source_id)  # what is committed of it stays
            self._work.open -= 1
            self._work.drop(task.segment.source_id)
            self.inputs.leave_out(task.uri, str(cause_of(event.error)))
        else:
            suspect, only = Suspect(task, words_of(event), fault), len(self.ids) == 1 and not self.inputs.left
            labelled, now_s = self.standing.succeeded, self._crew.now_s
            self._judge(self._given_up.add(suspect, self._crew.ready, labelled, only, now_s))

    def _judge(self, suspects: list[Suspect]) -> None:
        for suspect in suspects:
            match suspect.fault:
                case "inputs":
                    self._work.again(replace(suspect.task, attempts=0), None)
                case "frame":
                    self._work.search(suspect.task, suspect.why)
                case _:
                    times = "once" if self._options.attempts == 1 else f"{self._options.attempts} times"
                    cleared = suspect.task.searched and not suspect.task.skip and suspect.why == DIED
                    why = suspect.why + (WHOLE if cleared else "")
                    self._failer.add(suspect.task, f"the segment was tried {times}: {why}")

    def _committed(self, report: Report) -> None:
        self._work.open -= 1
        self.standing.committed(report)
        for line in report.warnings:
            self._say_once(line)

    def _look(self) -> None:
        """What is done from time to time, whatever happens."""
        now_s = self._crew.now_s
        if now_s - self._looked_s >= _POLL_S:
            self._looked_s = now_s
            for event in self._crew.end_overdue():
                self._take(event)
        if len(self._given_up) == self._work.open and not self.inputs.left:  # nothing is left that could succeed
            self._judge(self._given_up.take(self.standing.succeeded, now_s))
        for report in self._failer.committed(now_s):
            self._committed(report)
        self._publisher.look(now_s)
        for why in self.inputs.left_out():
            self.standing.count_reason(why, 1)
            self._calls.say(f"left out: {why}")
        if now_s - self._shown_s >= _SHOW_EVERY_S:
            self._show()
        if now_s - self._happened_s >= _WATCH_S:
            self._happened_s = now_s
            self._calls.say(f"waiting for: {self._crew.waited_for(_SHOWN_WORKERS)}")

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._calls.say(line)

    def _show(self) -> None:
        standing = self.standing
        self._shown_s = self._crew.now_s
        standing.crewed(self._crew, _SHOWN_WORKERS)
        standing.unprobed = self.inputs.unprobed
        standing.queued, standing.running = self._work.queued, self._work.running
        self._calls.show(standing)
