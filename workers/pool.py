"""What the driver asks of workers: a pool of them, wherever they run. In this process here, on Ray in `ray_pool.py`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from depthmill.pipeline.types import WorkerState

Kind = Literal["labeler", "prober"]


@dataclass(frozen=True)
class Event:
    """How a call ended.

    Attributes:
        worker: Which.
        answer: What it returned.
        error: What it raised, or what became of its worker; None if all is well.
        died: Whether the worker is gone.
        lost: Whether it went with its whole machine, for which no segment is to blame.
    """

    worker: int
    answer: Any = None
    error: BaseException | None = None
    died: bool = False
    lost: bool = False


class Pool(Protocol):
    """Workers, each with at most one call under way. Numbers of workers are never used twice."""

    def capacity(self) -> int:
        """Labelers that there is room for now."""
        ...

    def start(self, kind: Kind) -> int:
        """Ask for a worker, which loads at once; an Event tells when it has."""
        ...

    def call(self, worker: int, method: str, *arguments: Any) -> None:
        """Call a method of an idle worker; an Event tells how it ended."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """The events since the last call; waits until there is one, or the time is over."""
        ...

    def state(self, worker: int) -> WorkerState:
        """What a worker said last of what it does; asking costs it nothing."""
        ...

    def name(self, worker: int) -> str:
        """What people are told that a worker is called."""
        ...

    def stop(self, worker: int) -> None:
        """End a worker, whatever it does; no event of it comes any more."""
        ...

    def now(self) -> float:
        """The time, in seconds, as the pool sees it."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class InProcess:
    """One worker of each kind in this process. A call is made while the driver waits, so nothing can interrupt it."""

    def __init__(self, make: dict[Kind, Callable[[], Any]], show: Callable[[dict[str, WorkerState]], None]) -> None:
        """Nothing is made yet.

        Args:
            make: Makes a worker of each kind.
            show: Told of each change of the labeler's state, by its name: nobody can ask while it works.
        """
        self._make = make
        self._show = show
        self._workers: dict[int, Any] = {}
        self._calls: deque[tuple[int, str, tuple[Any, ...]]] = deque()

    def capacity(self) -> int:
        """One."""
        return 1

    def start(self, kind: Kind) -> int:
        """Make a worker; it loads during the next wait."""
        worker = len(self._workers)
        self._workers[worker] = self._make[kind]()
        if kind == "labeler":
            self._workers[worker].on_state = lambda state: self._show({self.name(worker): state})
        self.call(worker, "load")
        return worker

    def call(self, worker: int, method: str, *arguments: Any) -> None:
        """Note a call; it is made during a wait."""
        self._calls.append((worker, method, arguments))

    def wait(self, timeout_s: float) -> list[Event]:
        """Make the oldest call."""
        if not self._calls:
            time.sleep(timeout_s)
            return []
        worker, method, arguments = self._calls.popleft()
        try:
            return [Event(worker, getattr(self._workers[worker], method)(*arguments))]
        except Exception as error:
            return [Event(worker, error=error)]

    def state(self, worker: int) -> WorkerState:
        """The labeler's own state."""
        found: WorkerState = self._workers[worker].state()
        return found

    def name(self, worker: int) -> str:
        """No number: the next would be the prober's."""
        return "this process"

    def stop(self, worker: int) -> None:
        """Forget what it was to do."""
        self._calls = deque(call for call in self._calls if call[0] != worker)

    def now(self) -> float:
        """A clock that only goes forward."""
        return time.perf_counter()

    def close(self) -> None:
        """Release what the workers hold."""
        for worker in self._workers.values():
            if hasattr(worker, "close"):
                worker.close()
