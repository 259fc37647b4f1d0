"""Reading ahead, by a bounded number of items, in one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Marks the end of the items, and carries what ended them."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield the items of an iterator that another thread runs ahead.

    The thread starts with the first item asked for, and has ended when this iterator ends, raises or is closed; then
    `items` is closed as well, in that thread.

    Args:
        items: Run in the other thread; an exception in it is raised here, after the items before it.
        depth: Most items made and not yet taken, at least 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth {depth}: expected at least 1")
    return _prefetch(items, depth)


def _prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def run() -> None:
        error: BaseException | None = None
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    break
                ready.put(next(items))
        except StopIteration:
            pass
        except BaseException as problem:  # whatever it is, it belongs to the consumer
            error = problem
        try:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        except BaseException as problem:
            error = error or problem
        ready.put(_End(error))

    thread = threading.Thread(target=run, name="depthmill-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()
