"""The inputs of a run, until they are in the store or left out.

One that cannot be opened is left out, unless several fail in a row: then one that was opened before is opened again. If
it cannot be, inputs are away, or the store is: probing rests, and those that failed are tried again afterwards. Where
object storage does not list what is there, it is asked again after rests; no input is left out for that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from math import inf

from depthmill.pipeline.errors import (
    DepthmillError,
    MissingError,
    RunStoppedError,
    SourceError,
    StoreClosedError,
    StoreDamagedError,
    StoreError,
    StoreMismatchError,
)
from depthmill.pipeline.sources import shown
from depthmill.pipeline.types import Failure
from depthmill.workers.backlog import Probe
from depthmill.workers.causes import after, cause_of, words_of
from depthmill.workers.pace import Rests
from depthmill.workers.pool import Event

_IN_A_ROW = 5


class Inputs:
    """Inputs that are to be probed.

    Attributes:
        more: Whether there may be some that are not known yet.
        unprobed: Those that are known, and not probed.
        failures: Those that are left out.
    """

    def __init__(self, uris: Iterable[str], attempts: int, say: Callable[[str], None], good: str = "") -> None:
        """Nothing is read yet.

        Args:
            uris: Read as far ahead as probers need them.
            attempts: How often one is tried.
            say: Told what is waited for.
            good: One that could be opened before, if any.
        """
        self._uris, self._attempts, self._say = iter(uris), attempts, say
        self._waiting: deque[Probe] = deque()
        self._suspects: list[tuple[str, str]] = []  # that failed since one was opened, and why
        # What was opened quickest: how long that took, and what it is.
        self._good: tuple[float, str] | None = (inf, good) if good else None
        self._check: Probe | None = None  # of that, under way
        self._rests, self._listing = Rests(), Rests()
        self._news: list[str] = []
        self.more = True
        self.unprobed = 0
        self.failures: list[Failure] = []

    @property
    def left(self) -> bool:
        """Whether there may be any that is not probed."""
        return self.more or self.unprobed > 0

    def read(self, ahead: int, now_s: float) -> None:
        """Have so many at hand, if there are.

        Raises:
            RunStoppedError: If what there is cannot be listed for long.
        """
        while self.more and len(self._waiting) < ahead and self._listing.over(now_s):
            try:
                uri = next(self._uris, None)
            except SourceError as error:
                self._unlisted(error, now_s)
                return
            self._listing.answered()
            if uri is None:
                self.more = False
            else:
                self._waiting.append(Probe(uri))
                self.unprobed += 1

    def take(self, now_s: float) -> Probe | None:
        """The next to be probed; None if none is at hand, or all rest."""
        if self._check is not None or not self._rests.over(now_s):
            return None
        if self._good is not None and len(self._suspects) >= _IN_A_ROW:
            self._check = Probe(self._good[1], anew=True)
            return self._check
        return self._waiting.popleft() if self._waiting else None

    def left_out(self) -> list[str]:
        """Why inputs are left out, of those of which that was not told yet."""
        few = self._good is None or len(self._suspects) < _IN_A_ROW
        if few and (self._good is None or (not self.more and self.unprobed == len(self._suspects))):
            self._leave_out_suspects()
        news, self._news = self._news, []
        return news

    def probed(self, probe: Probe, took_s: float) -> None:
        """One was."""
        if probe is not self._check:
            self.unprobed -= 1
            self._good = min(self._good or (took_s, probe.uri), (took_s, probe.uri))
            if len(self._suspects) < _IN_A_ROW:
                self._leave_out_suspects()
        elif self._rests.times:  # what failed meanwhile did so for want of what is there again
            self._waiting.extend(Probe(uri) for uri, _ in self._suspects)
            self._suspects = []
        else:
            self._leave_out_suspects()
        if probe is self._check or not self._suspects:
            self._check = None
            self._rests.answered()

    def failed(self, probe: Probe, event: Event, now_s: float) -> None:
        """One could not be.

        Raises:
            DepthmillError: If it is not the input's fault.
        """
        cause = cause_of(event.error)
        closed = isinstance(cause, StoreClosedError)
        if isinstance(cause, DepthmillError) and (closed or not isinstance(cause, SourceError | StoreError)):
            raise cause
        if probe is self._check:
            self._check = None
            if isinstance(cause, StoreMismatchError | StoreDamagedError):  # it tells nothing any more
                self._good = None
            else:
                self._rest(event, now_s)
        elif isinstance(cause, StoreMismatchError | StoreDamagedError):
            self.unprobed -= 1
            self.leave_out(probe.uri, str(cause))
        elif isinstance(cause, StoreError):
            self._waiting.append(probe)
            self._rest(event, now_s)
        else:
            tried = after(probe, event)
            if tried.attempts < self._attempts and not isinstance(cause, MissingError):
                self._waiting.append(tried)
                return
            failed = f"{shown(probe.uri)}: probing it failed {tried.attempts} times: {words_of(event)}"
            self._suspects.append((probe.uri, str(cause) if isinstance(cause, SourceError) else failed))

    def leave_out(self, uri: str, why: str) -> None:
        """One is, though it was probed: it is another one since, or damaged in the store."""
        self.failures.append(Failure(uri=shown(uri), source_id=None, frame=None, reason=why))
        self._news.append(why)

    def _unlisted(self, error: SourceError, now_s: float) -> None:
        if not self._listing.begin(now_s):
            raise RunStoppedError(
                f"{error}\nThe run was stopped, since not all of its inputs are known: what is committed stays; see to "
                "the bucket and its credentials, then run the same command again to go on from there"
            ) from error
        if self._listing.times == 1:
            self._say(f"inputs cannot be listed ({error}): waiting until that works again")

    def _rest(self, event: Event, now_s: float) -> None:
        """Wait for what is away: longer each time, but once for all that failed together."""
        if not self._rests.over(now_s):
            return
        cause = cause_of(event.error)
        away = "the store can no longer be used" if isinstance(cause, StoreError) else "inputs can no longer be opened"
        if not self._rests.begin(now_s):
            raise RunStoppedError(
                f"{away} ({cause}); expected inputs, store and credentials to be as they were: see to them, and run "
                "the same command again; what is committed stays"
            ) from event.error
        if self._rests.times == 1:
            self._say(f"{away} ({cause}): waiting until that works again")

    def _leave_out_suspects(self) -> None:
        suspects, self._suspects = self._suspects, []
        for uri, why in suspects:
            self.unprobed -= 1
            self.leave_out(uri, why)
