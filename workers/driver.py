"""The driver: keeps the workers busy with segments until all are committed. It sends segments, never pixels."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import DepthmillError, RunStoppedError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.stages import Report, Worker, WorkerState, fail_segment
from depthmill.pipeline.store import Store
from depthmill.workers.progress import Counts, Display, Rate

_POLL_S = 0.5


@dataclass
class Run:
    """A run under way.

    Attributes:
        config: Its options, `device` and `dtype` resolved.
        store: Where the labels go.
        digests: sha256 of its checkpoints.
        todo: Segments that nobody works on.
        counts: Where it stands.
        display: Shows it.
        rate: Frames per second.
        device: Device and dtype in words, from the first worker that is loaded.
        stopped: Whether somebody asked for it to end.
    """

    config: LabelConfig
    store: Store
    digests: tuple[str, ...]
    todo: deque[Task]
    counts: Counts
    display: Display
    rate: Rate
    device: str = ""
    stopped: bool = False

    def more(self) -> bool:
        """Whether there are segments that nobody works on.

        Raises:
            KeyboardInterrupt: If the run was asked to end.
        """
        if self.stopped:
            raise KeyboardInterrupt
        return bool(self.todo)

    def loaded(self, device: str) -> None:
        """A worker is ready."""
        self.device = self.device or device
        self.rate.start()

    def committed(self, report: Report) -> None:
        """A segment is done."""
        done = self.counts.done + report.labelled + report.failed
        self.counts = replace(self.counts, done=done, failed=self.counts.failed + report.failed)

    def not_committed(self, task: Task, reason: str) -> None:
        """An attempt at a segment failed: it goes to the end of the queue, or, out of attempts, its frames fail."""
        task = replace(task, attempts=task.attempts + 1)
        if task.attempts < self.config.attempts:
            self.todo.append(task)
        else:
            times = "once" if task.attempts == 1 else f"{task.attempts} times"
            self.committed(fail_segment(task.segment, self.store, f"the segment was tried {times}: {reason}"))


def run_in_process(run: Run) -> None:
    """Label everything in this process, without Ray."""
    worker = Worker(run.config, run.store.path, run.digests)
    worker.on_state = lambda state: run.display.show(run.counts, {"this process": state})
    run.loaded(worker.load())
    try:
        while run.more():
            task = run.todo.popleft()
            try:
                report = worker.label(task.uri, task.fingerprint, task.segment)
            except Exception as error:
                run.not_committed(task, _reason(error))
            else:
                run.committed(report)
            run.display.show(run.counts, {"this process": worker.state()})
    finally:
        worker.close()


@dataclass
class _Slot:
    """A place for a worker, and what that is doing.

    Attributes:
        name: For the display.
        actor: Its handle.
        call: Answers its loading, or `task`; None while it is idle.
        task: What it labels.
        ready: Whether it has loaded.
        asked: Answers its state.
        state: Its last known state.
    """

    name: str
    actor: Any = None
    call: Any = None
    task: Task | None = None
    ready: bool = False
    asked: Any = None
    state: WorkerState = field(default=WorkerState("starting"))


def run_on_ray(run: Run, workers: int) -> None:
    """Label everything on Ray workers, one segment each at a time.

    A worker that dies is replaced, and its segment tried again elsewhere.

    Raises:
        RunStoppedError: If workers die while they load: there is no point in going on.
        DepthmillError: If a worker cannot load for a reason of ours, such as a checkpoint that does not fit.
    """
    import ray

    slots = [_Slot(f"worker {i}") for i in range(workers)]
    deaths = 0  # while loading
    try:
        for slot in slots:
            _launch(run, slot)
        while run.more() or any(slot.task for slot in slots):
            for slot in slots:
                if slot.ready and slot.call is None and run.todo:
                    given = run.todo.popleft()
                    slot.call = slot.actor.label.remote(given.uri, given.fingerprint, given.segment)
                    slot.task = given
            calls = {slot.call: slot for slot in slots if slot.call is not None}
            for call in ray.wait(list(calls), num_returns=1, timeout=_POLL_S)[0]:
                slot = calls[call]
                task, slot.call, slot.task = slot.task, None, None
                try:
                    answer = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    if task is not None:
                        run.not_committed(task, f"its worker died ({_reason(error)})")
                    elif (deaths := deaths + 1) >= run.config.attempts * workers:
                        raise RunStoppedError(
                            f"workers died {deaths} times while loading the model ({_reason(error)}); "
                            f"is there memory for {workers} of them? Try fewer --workers"
                        ) from error
                    _launch(run, slot)
                except Exception as error:
                    if task is None:
                        raise _ours(error) from error
                    run.not_committed(task, _reason(error))
                else:
                    if task is None:
                        run.loaded(answer)
                        slot.ready = True
                    else:
                        run.committed(answer)
            _ask_states(slots)
            run.display.show(run.counts, {slot.name: _current(slot) for slot in slots})
    finally:
        for slot in slots:
            with contextlib.suppress(Exception):  # it may be dead, or Ray gone
                ray.kill(slot.actor)


def _launch(run: Run, slot: _Slot) -> None:
    """Put a new worker, which starts to load, into a slot."""
    from depthmill.workers.actors import start_worker

    slot.actor = start_worker(run.config, run.store.path, run.digests)
    slot.call = slot.actor.load.remote()
    slot.task = slot.asked = None
    slot.ready, slot.state = False, WorkerState("starting")


def _current(slot: _Slot) -> WorkerState:
    """The last answer, unless it is older than the slot's task: committed frames must not be counted twice."""
    if slot.task is None:
        return WorkerState("idle") if slot.ready else slot.state
    segment = str(slot.task.segment)
    return slot.state if slot.state.doing == segment else WorkerState(segment, 0, slot.task.segment.frames)


def _ask_states(slots: list[_Slot]) -> None:
    """Take the answers that have come, and ask again; nobody waits for one."""
    import ray

    for slot in slots:
        if slot.asked is not None and ray.wait([slot.asked], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):  # a dead worker is noticed by its call
                slot.state = ray.get(slot.asked)
            slot.asked = None
        if slot.asked is None:
            slot.asked = slot.actor.state.remote()


def _ours(error: Exception) -> Exception:
    """The exception that a worker raised, out of Ray's wrapping, if it is one of ours."""
    cause = getattr(error, "cause", error)
    return cause if isinstance(cause, DepthmillError) else error


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__


@contextlib.contextmanager
def stoppable(run: Run) -> Iterator[None]:
    """Let SIGINT (Ctrl-C) and SIGTERM end the run alike; a no-op outside the main thread, where no signal arrives.

    Both raise KeyboardInterrupt, and leave a note in `run`: one raised inside a callback of Ray's is lost there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        run.stopped = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
