from depthmill.tests.workers.simulated import Ledger, SimulatedPool, drive, labels
from depthmill.workers.deferred import Publisher


def test_sources_are_named_once_one_has_waited_for_long_and_longer_in_a_large_root():
    named = []
    publisher = Publisher(named.extend)
    for start, count, wait_s in ((0.0, 100, 60.0), (100.0, 99_901, 1000.0), (2000.0, 10, 1000.0)):
        for i in range(count):
            publisher.add(f"{start} {i}", start)
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
