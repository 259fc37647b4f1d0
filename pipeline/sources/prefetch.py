"""Reading ahead, by a bounded number of items and of their bytes, in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")

MOST_BYTES_AHEAD = 1 << 30  # 160 pictures of two megapixels: it is the large ones that it bounds


class _End:
    """Marks the end of the items, and carries what ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetch(Iterator[T]):
    """The items of an iterator that a thread runs ahead, from now on. Close it, or take all of them."""

    def __init__(self, items: Iterator[T], depth: int, size: Callable[[T], int] = lambda item: 0) -> None:
        """Start.

        Args:
            items: Run in the other thread, which closes it at the end; an exception in it is raised by `next`, after
                the items before it.
            depth: Most items made and not yet taken, at least 1.
            size: Bytes of an item; none is made while those not yet taken have `MOST_BYTES_AHEAD`.
        """
        if depth < 1:
            raise ValueError(f"prefetch depth {depth}: expected at least 1")
        self._items, self._depth, self._size = items, depth, size
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._ahead = self._bytes = 0
        self._stopped = False
        self._ended: _End | None = None
        self._thread = threading.Thread(target=self._run, name="depthmill-prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._ended is None:
            item = self._ready.get()
            if not isinstance(item, _End):
                self._count(-1, item)
                return item
            self._ended = item
            if item.error is not None:
                raise item.error
        raise StopIteration

    def close(self) -> None:
        """End the thread, and wait until it has ended; there are no more items."""
        with self._room:
            self._stopped = True
            self._room.notify()
        self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._has_room():
                item = next(self._items)
                self._count(1, item)
                self._ready.put(item)
                del item  # it may be large
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

    def _has_room(self) -> bool:
        """Wait for room; False if there are to be no more items."""
        with self._room:
            self._room.wait_for(lambda: self._stopped or (self._ahead < self._depth and self._bytes < MOST_BYTES_AHEAD))
            return not self._stopped

    def _count(self, items: int, item: T) -> None:
        with self._room:
            self._ahead += items
            self._bytes += items * self._size(item)
            self._room.notify()


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """A `Prefetch` that starts with the first item asked for, and ends when this ends, raises or is closed."""
    with closing(Prefetch(items, depth)) as ahead:
        yield from ahead
