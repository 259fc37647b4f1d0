"""A store that does not answer at all, as one on a hard mount, or that has become another run's."""

import pytest

from depthmill.pipeline.errors import RunStoppedError, StoreReplacedError
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, drive, labels


@pytest.mark.parametrize("since_s", [0, 10])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    "sources", [{"a": (1280, 64)}, {f"{i}.jpg": (1, 64) for i in range(400)}], ids=["video", "pictures"]
)
@pytest.mark.parametrize("until_s", [500, 1e9])
def test_a_store_that_stands_still_fails_no_frame(until_s, sources, workers, since_s):
    ledger = Ledger(sources)
    behave = labels(ledger, frame_s=0.2)

    def stalls(pool, worker, method, argument):
        if method == "label" and since_s <= pool.clock_s < until_s:
            return 0.0, "hang"
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: workers, stalls)
    if until_s < 1e9:
        drive(pool, ledger)
        assert set(ledger.labelled) == all_frames(ledger)
        assert pool.clock_s < until_s + 600
    else:
        with pytest.raises(RunStoppedError, match="run the same command again"):
            drive(pool, ledger)
        assert pool.clock_s < 4 * 3600
    assert not ledger.failed


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("attempts", [1, 3])
def test_what_is_committed_while_the_next_picture_kills_its_worker_is_labelled(attempts, workers):
    ledger = Ledger({f"{i}.jpg": (1, 16) for i in range(30)})
    drive(SimulatedPool(lambda: workers, labels(ledger, bad={("10.jpg", 0): "die"})), ledger, attempts=attempts)
    assert set(ledger.failed) == {("10.jpg", 0)}
    assert set(ledger.labelled) == all_frames(ledger) - set(ledger.failed)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_store_that_another_run_has_made_anew_ends_the_run_at_once(workers):
    ledger = Ledger({"a": (640, 64)})
    behave = labels(ledger)

    def refuse(pool, worker, method, argument):
        made_anew = method == "label" and pool.clock_s > 10
        return (0.1, StoreReplacedError("made anew")) if made_anew else behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: workers, refuse)
    with pytest.raises(StoreReplacedError, match="made anew"):
        drive(pool, ledger)
    assert pool.clock_s < 30
    assert not ledger.failed
