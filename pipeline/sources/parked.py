"""What a read leaves behind where it stopped, for the next to go on from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @contextmanager
    def lent(self, opens: Callable[[], T]) -> Iterator[Callable[[], T]]:
        """Give a function for the one that is here, or that `opens` when it is asked for; then it is parked.

        After an error it is closed: a file or decoder that met one may meet it again and again.
        """
        one = self.take()

        def lend() -> T:
            nonlocal one
            one = one or opens()
            return one

        try:
            yield lend
        except Exception:
            if one is not None:
                one.close()
                one = None
            raise
        finally:  # whoever reads no further, has no error
            if one is not None:
                self.park(one)

    def close(self) -> None:
        """Close what is here, and all that is parked later: reads that are still running release theirs at the end."""
        with self._lock:
            self._closed = True
        if (one := self.take()) is not None:
            one.close()
