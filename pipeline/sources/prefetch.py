"""Reading ahead, by a bounded number of items, in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items, and carries what ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetch(Iterator[T]):
    """The items of an iterator that a thread runs ahead, from now on. Close it, or take all of them."""

    def __init__(self, items: Iterator[T], depth: int):
        """Start.

        Args:
            items: Run in the other thread, which closes it at the end; an exception in it is raised by `next`, after
                the items before it.
            depth: Most items made and not yet taken, at least 1.
        """
        assert depth >= 1
        self._items = items
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._stopped = threading.Event()
        self._ended: _End | None = None
        self._thread = threading.Thread(target=self._run, name="depthmill-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended is None:
            item = self._ready.get()
            if not isinstance(item, _End):
                self._room.release()
                return item
            self._ended = item
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self) -> None:
        """End the thread, and wait until it has ended; there are no more items."""
        self._stopped.set()
        self._room.release()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while True:
                self._room.acquire()
                if self._stopped.is_set():
                    break
                self._ready.put(next(self._items))
        except StopIteration:
            pass
        except BaseException as problem:  # whatever it is, it belongs to the consumer
            error = problem
        try:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
        except BaseException as problem:
            error = error or problem
        self._ready.put(_End(error))


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """A `Prefetch` that starts with the first item asked for, and ends when this ends, raises or is closed."""
    if depth < 1:
        raise ValueError(f"prefetch depth {depth}: expected at least 1")
    return _prefetch(items, depth)


def _prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    with closing(Prefetch(items, depth)) as ahead:
        yield from ahead
