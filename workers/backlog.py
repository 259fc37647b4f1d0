"""What is left to do: sources shared out among the workers, so that each mostly reads on where it was."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from depthmill.pipeline.plan import Planned, Task
from depthmill.pipeline.sources import shown


@dataclass(frozen=True)
class Probe:
    """An input to be probed; anew, if it is to be read though nothing of it may be left to do."""

    uri: str
    attempts: int = 0
    losses: int = 0
    frames: int = 0
    anew: bool = False

    def __str__(self) -> str:
        return f"probing {shown(self.uri)}"


@dataclass
class _Run:
    """Consecutive segments [start, stop) of a source."""

    source: Planned
    start: int
    stop: int


class Backlog:
    """Tasks that nobody works on. A source takes the same room in it, whatever its number of frames."""

    def __init__(self) -> None:
        self._again: deque[tuple[Task, int | None]] = deque()  # with the worker it failed on
        self._fresh: deque[_Run] = deque()
        self._of: dict[int, _Run] = {}  # worker -> what it goes through
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, source: Planned) -> None:
        """Add all that is to be done of a source."""
        self._fresh.extend(_Run(source, start, stop) for start, stop in source.pending)
        self._again.extend((task, None) for task in source.mending())
        self._length += source.segments

    def again(self, task: Task, not_by: int | None) -> None:
        """Put a task back that failed; another worker than `not_by` takes it if there is one with nothing to do."""
        self._again.append((task, not_by))
        self._length += 1

    def take(self, worker: int, alone: bool) -> Task | None:
        """The next task for a worker; None if there is none, or only one that failed on it and others may try.

        First come those that failed before; then the source that the worker has open, then one that nobody has touched,
        then half of what another worker has before it.

        Args:
            worker: Who asks.
            alone: Whether nobody else is there.
        """
        for _ in range(len(self._again)):
            task, not_by = self._again.popleft()
            if not_by != worker or alone:
                self._length -= 1
                return task
            self._again.append((task, not_by))
        fresh = self.reserve(worker)
        if fresh is None and (run := self._half()) is not None:
            return self._first(worker, run)
        return fresh

    def reserve(self, worker: int) -> Task | None:
        """A task for a worker to begin while it is at another; None if none is left that nobody has tried."""
        run = self._of.pop(worker, None)
        if run is None and self._fresh:
            run = self._fresh.popleft()
        return None if run is None else self._first(worker, run)

    def _first(self, worker: int, run: _Run) -> Task:
        task = run.source.task(run.start)
        run.start += 1
        if run.start < run.stop:
            self._of[worker] = run
        self._length -= 1
        return task

    def leave(self, worker: int) -> None:
        """A worker is gone: what it had before it is for the next one to ask."""
        run = self._of.pop(worker, None)
        if run is not None:
            self._fresh.appendleft(run)

    def drop(self, source_id: str) -> int:
        """Forget a source; how many of its segments were left."""
        before = self._length
        self._again = deque(one for one in self._again if one[0].segment.source_id != source_id)
        self._fresh = deque(run for run in self._fresh if run.source.id != source_id)
        self._of = {worker: run for worker, run in self._of.items() if run.source.id != source_id}
        self._length = len(self._again) + sum(run.stop - run.start for run in (*self._fresh, *self._of.values()))
        return before - self._length

    def _half(self) -> _Run | None:
        largest = max(self._of.values(), key=lambda run: run.stop - run.start, default=None)
        if largest is None:
            return None
        if largest.stop - largest.start == 1:
            return self._of.pop(next(worker for worker, run in self._of.items() if run is largest))
        middle = (largest.start + largest.stop) // 2
        half = _Run(largest.source, middle, largest.stop)
        largest.stop = middle
        return half
