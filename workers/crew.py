"""The workers of a run: who is there, what each does and since when, and for how long they may."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment, WorkerState
from depthmill.workers.pace import Limits
from depthmill.workers.pool import Event, Kind, Pool

_STRAGGLES = 2.0  # times the time that a segment should take; then another worker may race it
_LOOKS = 4  # times that a worker is asked how far it is, in the time that it may stand still


class Item(Protocol):
    """What a worker can be given to do."""

    @property
    def frames(self) -> int:
        """How much of it there is, for the display."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Running:
    """What a worker does.

    Attributes:
        item: That; None while it loads.
        since_s: When it began.
        limits: How long it may take.
    """

    item: Any
    since_s: float
    limits: Limits


@dataclass(frozen=True)
class _Seen:
    """A worker that has been at something for a while, and when it was last seen to get on with it."""

    running: Running
    steps: int
    moved_s: float
    looked_s: float


class Crew:
    """The workers of one pool.

    Attributes:
        running: Worker -> what it does; the others are idle.
        labelers: Those that label.
        probers: Those that probe.
        loading: Labelers that have not loaded yet.
        idle: Labelers with nothing to do, in the order in which they became so.
        idle_probers: Probers with nothing to do.
        now_s: The time, as of the last wait.
        deaths: Workers that died, or were ended: they could not load, or took too long.
    """

    def __init__(self, pool: Pool) -> None:
        """Nobody is there yet."""
        self._pool = pool
        self.running: dict[int, Running] = {}
        self.labelers: set[int] = set()
        self.probers: set[int] = set()
        self.loading: set[int] = set()
        self.idle: dict[int, None] = {}
        self.idle_probers: list[int] = []
        self.now_s = pool.now()
        self.deaths = 0
        self._ready_since: dict[int, float] = {}
        self._ready_s = 0.0
        self._seen: dict[int, _Seen] = {}

    @property
    def ready(self) -> int:
        """Labelers that have loaded."""
        return len(self._ready_since)

    @property
    def busy(self) -> bool:
        """Whether any worker does something, other than loading."""
        return any(running.item is not None for running in self.running.values())

    @property
    def ready_s(self) -> float:
        """Seconds that labelers have been ready, added up."""
        return self._ready_s + sum(self.now_s - since for since in self._ready_since.values())

    def room(self) -> int:
        """Labelers that there is room for, at least one."""
        return max(1, self._pool.capacity())

    def name(self, worker: int) -> str:
        """What it is called."""
        return self._pool.name(worker)

    def hire(self, kind: Kind) -> None:
        """Ask for one more worker."""
        worker = self._pool.start(kind)
        self.running[worker] = Running(None, self.now_s, Limits())
        if kind == "prober":
            self.probers.add(worker)
        else:
            self.labelers.add(worker)
            self.loading.add(worker)

    def dismiss_idle_probers(self) -> None:
        """End them: there is nothing left to probe."""
        while self.idle_probers:
            worker = self.idle_probers.pop()
            self._pool.stop(worker)
            self.probers.discard(worker)

    def dismiss(self, worker: int) -> None:
        """End a worker that is of no use."""
        self._pool.stop(worker)
        self._gone(worker)

    def call(self, worker: int, item: Item, limits: Limits, method: str, *arguments: Any) -> None:
        """Give an idle worker something to do."""
        self.idle.pop(worker, None)
        self.running[worker] = Running(item, self.now_s, limits)
        self._pool.call(worker, method, *arguments)

    def wait(self, timeout_s: float) -> list[Event]:
        """The events since the last time; waits until there is one, or the time is over."""
        events = self._pool.wait(timeout_s)
        self.now_s = self._pool.now()
        return events

    def ended(self, event: Event) -> Running | None:
        """Take note of an event; what its worker did, None if that was nothing. One that cannot load is ended."""
        worker = event.worker
        running = self.running.pop(worker, None)
        self.loading.discard(worker)
        if event.died:
            self._gone(worker)
        elif event.error is not None and running is not None and running.item is None:
            self.dismiss(worker)
        elif worker in self.labelers:
            self.idle[worker] = None
            self._ready_since.setdefault(worker, self.now_s)
        elif running is not None:
            self.idle_probers.append(worker)
        return running

    def _gone(self, worker: int) -> None:
        self.deaths += 1
        self.labelers.discard(worker)
        self.probers.discard(worker)
        self.idle.pop(worker, None)
        self._ready_s += self.now_s - self._ready_since.pop(worker, self.now_s)

    def end_overdue(self) -> Iterator[Event]:
        """End the workers that have taken too long, or stand still, and say so of each; why, if it is the store."""
        for worker, running in list(self.running.items()):
            took_s, limits = self.now_s - running.since_s, running.limits
            still = limits.still_s is not None and self._still(worker, running, limits.still_s)
            if took_s > limits.all_s:
                why = f"no answer for {took_s:.0f} s, at most {limits.all_s:.0f} s were allowed"
            elif still:
                why = f"nothing was done for more than {limits.still_s:.0f} s"
            else:
                continue
            storing = limits.still_s is not None and self._pool.state(worker).storing
            self._pool.stop(worker)
            self._seen.pop(worker, None)
            error = StoreError(f"the store does not take what is written ({why})") if storing else TimeoutError(why)
            yield Event(worker, error=error, died=True)

    def _still(self, worker: int, running: Running, still_s: float) -> bool:
        """Whether a worker has not got on for too long. It is asked now and then, and only if it takes long at all."""
        seen = self._seen.get(worker)
        if seen is None or seen.running is not running:
            seen = _Seen(running, -1, running.since_s, running.since_s)
        if seen.steps == 0:
            still_s = max(still_s, running.limits.open_s)
        # Also often enough before all of its time is over: what is known of it is the answer to an earlier question.
        every_s = min(still_s, running.limits.all_s) / _LOOKS
        if self.now_s - seen.looked_s < every_s and self.now_s - seen.moved_s <= still_s:
            return False
        steps = self._pool.state(worker).steps
        moved_s = seen.moved_s if steps == seen.steps else self.now_s
        self._seen[worker] = _Seen(running, steps, moved_s, self.now_s)
        return self.now_s - moved_s > still_s

    def straggler(self, frame_s: float, among: Container[Segment]) -> Task | None:
        """A segment that takes far longer than it should, at `frame_s` a frame, to be tried by a second worker too."""
        late = [
            ((self.now_s - running.since_s) / (frame_s * (running.item.frames + 1)), worker, running.item)
            for worker, running in self.running.items()
            if isinstance(running.item, Task) and running.item.segment in among
        ]
        slowest = max(late, key=lambda one: one[0], default=None)
        return slowest[2] if slowest is not None and slowest[0] > _STRAGGLES else None

    def states(self, most: int) -> dict[str, WorkerState]:
        """What the first few labelers do."""
        return {self._pool.name(worker): self._state(worker) for worker in sorted(self.labelers)[:most]}

    def _state(self, worker: int) -> WorkerState:
        """What it said last, unless that is older than its task: committed frames must not be counted twice."""
        running = self.running.get(worker)
        if running is None:
            return WorkerState("idle")
        if running.item is None:
            return WorkerState("loading")
        state = self._pool.state(worker)
        doing = str(running.item)
        return state if state.doing == doing else WorkerState(doing, 0, running.item.frames)

    def waited_for(self, most: int) -> str:
        """What the run waits for, in words."""
        starting = sum(running.item is None for running in self.running.values())
        words = [f"{starting} workers to start: is there room for them (CPUs, GPUs, memory)?"] if starting else []
        for worker, running in sorted(self.running.items(), key=lambda one: one[1].since_s):
            if running.item is not None:
                took_s = self.now_s - running.since_s
                words.append(f"{self._pool.name(worker)}, {running.item}: {took_s:.0f} of {running.limits.all_s:.0f} s")
        more = [f"and {len(words) - most} more"] if len(words) > most else []
        return "; ".join(words[:most] + more)
