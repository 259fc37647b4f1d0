"""What the driver writes into the store itself: it waits until that is worth it, or until the store answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from depthmill.pipeline.errors import StoreClosedError, StoreError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Report
from depthmill.workers.pace import Rests

_WAIT_S = 60.0
_WAIT_S_A_NAMED = 0.01  # the root is rewritten whole: in a hundredth of this (benchmarks/store_sources.md)


class Publisher:
    """Names sources in the store's root, seldom enough that its size does not matter.

    They are named when there are half as many as were named before, or once one has waited for long: readers that go
    by the root, such as xarray by itself, know no others.
    """

    def __init__(self, publish: Callable[[Mapping[str, str]], None]) -> None:
        """Nothing is to be named yet; `publish` is `Calls`'s."""
        self._publish = publish
        self._waiting: dict[str, str] = {}
        self._since_s = 0.0  # when the first of them came, or the store did not answer
        self._named = 0
        self._due = 1  # how many are named at once

    def add(self, source_id: str, stamp: str, now_s: float) -> None:
        """One more source is in the store; names those that wait, if it is time."""
        if not self._waiting:
            self._since_s = now_s
        self._waiting[source_id] = stamp
        self.look(now_s)

    def look(self, now_s: float) -> None:
        """Name those that wait, if it is time.

        If the store does not answer, they are named later: no worker needs the root, and `publish` ends with them.
        """
        waited = now_s - self._since_s >= max(_WAIT_S, self._named * _WAIT_S_A_NAMED)
        if len(self._waiting) >= self._due or (self._waiting and waited):
            try:
                self.publish()
            except StoreClosedError:
                raise
            except StoreError:
                self._due, self._since_s = 2 * len(self._waiting), now_s

    def publish(self) -> None:
        """Name those that are not."""
        if self._waiting:
            self._publish(self._waiting)
            self._named += len(self._waiting)
            self._waiting = {}
            self._due = self._named // 2 + 1


class Failer:
    """Commits tasks as failed, as soon as the store answers."""

    def __init__(self, fail: Callable[[Task, str], Report]) -> None:
        """None yet; `fail` is `Calls`'s."""
        self._fail = fail
        self._waiting: deque[tuple[Task, str]] = deque()
        self._rests = Rests()

    def add(self, task: Task, why: str) -> None:
        """One more is to be."""
        self._waiting.append((task, why))

    def committed(self, now_s: float) -> Iterator[Report]:
        """Commit them; if the store does not answer, the rest is for a later call.

        Raises:
            StoreError: If it has not answered for long, or takes nothing more.
        """
        while self._waiting and self._rests.over(now_s):
            try:
                report = self._fail(*self._waiting[0])
            except StoreError as error:
                if isinstance(error, StoreClosedError) or not self._rests.begin(now_s):
                    raise
                return
            self._waiting.popleft()
            self._rests.answered()
            yield report
