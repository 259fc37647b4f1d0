from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from depthmill.pipeline.sources import Prefetch, prefetch
from depthmill.pipeline.sources.prefetch import MOST_BYTES_AHEAD


def test_items_in_order() -> None:
    assert list(prefetch(iter(range(100)), 4)) == list(range(100))
    assert list(prefetch(iter(()), 1)) == []


def test_at_most_depth_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for index in range(20):
            made.append(index)
            yield index

    running = prefetch(items(), 3)
    for taken in range(1, 6):
        next(running)
        time.sleep(0.02)
        assert len(made) <= taken + 3
    assert len(made) == 8
    running.close()


def test_large_items_are_fewer() -> None:
    sizes, ahead, started = [50, 60, 1000, 10, 90, 10, 10], [], threading.Event()

    def items() -> Iterator[int]:
        started.wait()
        for size in sizes:
            ahead.append(running._bytes)
            yield size

    with closing(Prefetch(items(), len(sizes), lambda size: size * MOST_BYTES_AHEAD // 100)) as running:
        started.set()
        while len(ahead) < 2:  # it is ahead of whoever takes nothing
            pass
        assert list(running) == sizes
    assert max(ahead) < MOST_BYTES_AHEAD


def test_an_exception_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk")

    running = prefetch(items(), 8)
    assert [next(running), next(running)] == [1, 2]
    with pytest.raises(OSError, match="disk"):
        next(running)


def test_stopping_early_closes_the_iterator_and_ends_the_thread() -> None:
    closed_in = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed_in.append(threading.current_thread().name)

    before = threading.active_count()
    running = prefetch(items(), 2)
    assert next(running) == 0
    running.close()
    assert closed_in == ["depthmill-prefetch"]
    assert threading.active_count() == before


def test_nothing_runs_before_the_first_item_is_asked_for() -> None:
    before = threading.active_count()
    running = prefetch(iter(range(3)), 2)
    assert threading.active_count() == before
    running.close()


def test_depth() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Prefetch(iter(()), 0)
