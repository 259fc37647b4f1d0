"""What is left to label, and who is at what: segments, and trials of the searches in them."""

from __future__ import annotations

from depthmill.pipeline.plan import Planned, Task
from depthmill.pipeline.types import Segment
from depthmill.workers.backlog import Backlog
from depthmill.workers.inquest import Searches, Trial
from depthmill.workers.pool import Event


class Work:
    """The segments of a run that are not committed.

    Attributes:
        open: How many there are.
    """

    def __init__(self, attempts: int) -> None:
        """Nothing is known yet; a single frame is guilty after so many failures."""
        self._backlog = Backlog()
        self._searches = Searches(attempts)
        self._at: dict[Segment, set[int]] = {}  # who labels a segment: two of them where one straggles
        self._next: dict[int, Task] = {}  # worker -> what it has been told that it will be given next
        self._void: set[int] = set()  # workers whose answer no longer matters
        self.open = 0

    def __len__(self) -> int:
        """What workers are needed for: what nobody is at."""
        return len(self._backlog) + len(self._searches)

    @property
    def queued(self) -> int:
        """Segments that nobody is at."""
        return len(self._backlog)

    @property
    def running(self) -> int:
        """Segments that somebody is at."""
        return len(self._at)

    @property
    def given_out(self) -> bool:
        """Whether all is done, or somebody's."""
        return not (self._backlog or self._next)

    def add(self, source: Planned) -> None:
        """Add all that is to be done of a source."""
        self._backlog.add(source)
        self.open += source.segments

    def take(self, worker: int, alone: bool) -> Task | Trial | None:
        """What a worker is to do: what it has been told, then a trial, then a segment.

        Args:
            worker: Who.
            alone: Whether nobody else is there.
        """
        told = self._next.pop(worker, None)
        return told or self._searches.take() or (self._backlog.take(worker, alone) if self._backlog else None)

    def take_from_another(self) -> Task | None:
        """What some other worker has been told that it will be given next."""
        return self._next.pop(next(iter(self._next))) if self._next else None

    def begin(self, task: Task, worker: int, ready: int) -> tuple[Task, ...]:
        """A worker begins a segment; what it may begin meanwhile, lest its device waits for a commit.

        Only between segments that nobody has failed at, so that a worker that dies again and again dies of one alone;
        and not near the end, when others of the `ready` ones would wait for it.
        """
        self._at.setdefault(task.segment, set()).add(worker)
        if task.attempts or task.searched or len(self._backlog) <= ready:
            return ()
        following = self._backlog.reserve(worker)
        if following is None:
            return ()
        self._next[worker] = following
        return (following,)

    def of_one(self) -> set[Segment]:
        """The segments that no more than one worker is at."""
        return {segment for segment, workers in self._at.items() if len(workers) == 1}

    def leave(self, task: Task, worker: int) -> bool:
        """A worker is no longer at a segment; whether another still is."""
        others = self._at.pop(task.segment, set()) - {worker}
        if others:
            self._at[task.segment] = others
        return bool(others)

    def release(self, worker: int) -> None:
        """What a worker would be given next is for others."""
        self._backlog.leave(worker)
        if worker in self._next:  # it may be what the worker died of: to be tried by itself
            self._backlog.again(self._next.pop(worker), None)

    def put_back(self, item: Task | Trial, worker: int) -> None:
        """What a worker failed at that is at fault, or gone, is as it was before."""
        if isinstance(item, Trial):
            self._searches.again(item)
        elif not self.leave(item, worker):
            self._backlog.again(item, worker)

    def again(self, task: Task, not_by: int | None) -> None:
        """A segment is to be tried again; by another worker than `not_by`, if there is one with nothing to do."""
        self._backlog.again(task, not_by)

    def search(self, task: Task, why: str) -> None:
        """The frames that make a segment fail are to be found."""
        self._searches.open(task, why)

    def tried(self, trial: Trial, event: Event) -> None:
        """Take the outcome of a trial; after the last, the segment is to be labelled around the frames at fault."""
        if (verdict := self._searches.tried(trial, event)) is not None:
            self._backlog.again(verdict, None)

    def labelled(self, task: Task) -> None:
        """A segment was, by the first who has; what others write who are at it is the same."""
        self._void |= self._at.pop(task.segment, set())

    def take_void(self, worker: int) -> bool:
        """Whether a worker's answer no longer matters; asked once, as the next one does."""
        void = worker in self._void
        self._void.discard(worker)
        return void

    def drop(self, source_id: str) -> None:
        """Forget what nobody is at of a source."""
        self.open -= self._backlog.drop(source_id)
