import itertools

import pytest

from depthmill.pipeline.errors import StoreError, StoreFullError
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, drive, labels
from depthmill.workers.deferred import Failer, Publisher
from depthmill.workers.pace import HOPELESS_AFTER


def test_a_store_that_takes_nothing_more_is_told_of_at_once():
    def full(*_):
        raise StoreFullError("no space left")

    failer = Failer(full)
    failer.add(None, "broken")
    with pytest.raises(StoreFullError):
        list(failer.committed(0.0))
    with pytest.raises(StoreFullError):
        Publisher(full).add("a", "", 0.0)


def test_a_store_that_often_does_not_answer_but_does_a_moment_later_ends_no_run():
    calls = itertools.count()

    def fail(task, why):
        if next(calls) % 2 == 0:
            raise StoreError("503")
        return why

    failer = Failer(fail)
    for turn in range(HOPELESS_AFTER + 1):
        failer.add(None, "broken")
        assert list(failer.committed(100.0 * turn)) == []
        assert list(failer.committed(100.0 * turn + 50)) == ["broken"]


def test_sources_are_named_once_one_has_waited_for_long_and_longer_in_a_large_root():
    named = []
    publisher = Publisher(named.extend)
    for start, count, wait_s in ((0.0, 100, 60.0), (100.0, 99_901, 1000.0), (2000.0, 10, 1000.0)):
        for i in range(count):
            publisher.add(f"{start} {i}", "", start)
        before = len(named)
        publisher.look(start + wait_s - 1)
        assert len(named) == before
        publisher.look(start + wait_s + 1)
        assert len(named) > before
        publisher.publish()
    assert len(named) == len(set(named)) == 100_011


def test_a_run_names_its_sources_while_it_labels():
    ledger = Ledger({f"s{i}": (640, 64) for i in range(9)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    wait, named = pool.wait, []

    def waiting(timeout_s):
        if pool.clock_s > 70:
            named.append(len(ledger.published))
        return wait(timeout_s)

    pool.wait = waiting
    drive(pool, ledger)
    assert named[0] == 9
