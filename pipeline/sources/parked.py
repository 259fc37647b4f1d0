"""What a read leaves behind where it stopped, for the next to go on from."""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar


class _Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closes)


class Parked(Generic[T]):
    """A place for one open file, or decoder; any thread may ask. Whoever takes it owns it until it is parked again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._one: T | None = None
        self._closed = False

    def take(self) -> T | None:
        """What was parked last, if nobody has taken it."""
        with self._lock:
            one, self._one = self._one, None
            return one

    def park(self, one: T) -> None:
        """Keep `one`, and close what was here; once this is closed, close `one`."""
        with self._lock:
            unused = one if self._closed else self._one
            self._one = None if self._closed else one
        if unused is not None:
            unused.close()

    def close(self) -> None:
        """Close what is here, and all that is parked later: reads that are still running release theirs at the end."""
        with self._lock:
            self._closed = True
        if (one := self.take()) is not None:
            one.close()
