"""Workers that cannot load: when the next one is asked for, and when the run ends for it."""

from __future__ import annotations

from collections.abc import Callable

from depthmill.pipeline.errors import (
    RunStoppedError,
    StoreClosedError,
    StoreDamagedError,
    StoreError,
    StoreMismatchError,
)
from depthmill.workers.causes import cause_of, reason
from depthmill.workers.crew import Crew
from depthmill.workers.pace import PATIENCE_S, rest_s
from depthmill.workers.pool import Event

_SELDOM_S = 60.0


class Loading:
    """What is known of workers that could not load since one could, or that ended while they were checked.

    As long as others are at work or loading, it may be one machine of many that is at fault. If nobody is, but workers
    could load before, or a store does not answer, what they load may be away for a moment.

    Attributes:
        failures: How many there were since a labeler was last given work.
    """

    def __init__(self, crew: Crew, say: Callable[[str], None], most: Callable[[], int]) -> None:
        """All is well.

        Args:
            crew: The workers.
            say: Says a line to the user, once.
            most: Failures after which workers are asked for seldom, or the run ends.
        """
        self._crew, self._say, self._most = crew, say, most
        self.failures = 0
        self._could = False  # whether any worker could, ever
        self._next_s = float("-inf")  # when the next is asked for
        self._alone_s = float("inf")  # since when nobody is there

    @property
    def pauses(self) -> bool:
        """Whether no worker is to be asked for now."""
        return self._crew.now_s < self._next_s

    def loaded(self) -> None:
        """A labeler has."""
        self._could = True

    def trusted(self) -> None:
        """A labeler is to be given work."""
        self.failures, self._alone_s = 0, float("inf")

    def failed(self, event: Event, doing: str, needed: bool) -> None:
        """A worker could not load, or died in a check.

        Args:
            event: How that ended.
            doing: What it did, in words.
            needed: Whether the run cannot go on without one like it.

        Raises:
            Exception: The worker's, or RunStoppedError, if nobody can load.
        """
        self.failures += not event.lost
        now_s, most, cause = self._crew.now_s, self._most(), cause_of(event.error)
        lasts = isinstance(cause, StoreClosedError | StoreMismatchError | StoreDamagedError)
        passes = self._could or (isinstance(cause, StoreError) and not lasts)
        last = self._crew.name(event.worker)
        said = f"workers failed {self.failures} times while {doing}, at last {last} ({reason(event.error)})"
        if needed:
            self._alone_s = min(self._alone_s, now_s)
            if not (passes and now_s - self._alone_s < PATIENCE_S):
                if not event.died:
                    raise cause or RunStoppedError(said)
                if self.failures >= most:
                    raise RunStoppedError(
                        f"{said}; expected devices, memory for so many workers, and inputs that answer: try fewer "
                        "--workers, or see to them, and run the same command again; what is committed stays"
                    ) from event.error
            elif not event.died or self.failures >= most:
                self._next_s = now_s + rest_s(self.failures)
                if self._alone_s == now_s:
                    self._say(f"{said}: waiting until that works again")
        elif self.failures >= most:
            self._next_s = now_s + _SELDOM_S
            if self.failures == most:
                self._say(f"{said}: while others work on, one more is asked for once a minute")
