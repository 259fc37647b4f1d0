"""The inputs of a run, until they are in the store or left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from depthmill.pipeline.errors import DepthmillError, MissingError, SourceError, StoreMismatchError
from depthmill.pipeline.sources import shown
from depthmill.pipeline.types import Failure
from depthmill.workers.backlog import Probe
from depthmill.workers.inquest import after, cause_of, words_of
from depthmill.workers.pool import Event


class Inputs:
    """Inputs that are to be probed.

    Attributes:
        more: Whether there may be some that are not known yet.
        unprobed: Those that are known, and not probed.
        failures: Those that could not be opened.
        mismatch: The first of those that changed since they were added to the store.
    """

    def __init__(self, uris: Iterable[str], attempts: int) -> None:
        """Nothing is read yet.

        Args:
            uris: Read as far ahead as probers need them.
            attempts: How often one is tried.
        """
        self._uris, self._attempts = iter(uris), attempts
        self._waiting: deque[Probe] = deque()
        self.more = True
        self.unprobed = 0
        self.failures: list[Failure] = []
        self.mismatch: StoreMismatchError | None = None

    @property
    def left(self) -> bool:
        """Whether there may be any that is not probed."""
        return self.more or self.unprobed > 0

    def read(self, ahead: int) -> None:
        """Have so many at hand, if there are."""
        while self.more and len(self._waiting) < ahead:
            uri = next(self._uris, None)
            if uri is None:
                self.more = False
            else:
                self._waiting.append(Probe(uri))
                self.unprobed += 1

    def take(self) -> Probe | None:
        """The next to be probed; None if none is at hand."""
        return self._waiting.popleft() if self._waiting else None

    def probed(self) -> None:
        """One was."""
        self.unprobed -= 1

    def failed(self, probe: Probe, event: Event) -> str | None:
        """One could not be; why it is left out, None if it is tried again.

        Raises:
            DepthmillError: If it is not the input's fault.
        """
        cause = cause_of(event.error)
        why = str(cause)
        if isinstance(cause, StoreMismatchError):
            self.mismatch = self.mismatch or cause
        elif isinstance(cause, DepthmillError) and not isinstance(cause, SourceError):
            raise cause
        else:
            tried = after(probe, event)
            if tried.attempts < self._attempts and not isinstance(cause, MissingError):
                self._waiting.append(tried)
                return None
            if not isinstance(cause, SourceError):
                why = f"{shown(probe.uri)}: probing it failed {tried.attempts} times: {words_of(event)}"
        self.unprobed -= 1
        self.failures.append(Failure(uri=shown(probe.uri), source_id=None, frame=None, reason=why))
        return why
