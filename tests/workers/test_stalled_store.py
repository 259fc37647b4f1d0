"""A store that does not answer at all, as one on a hard mount, or that has become another run's."""

import random

import pytest

from depthmill.pipeline.errors import RunStoppedError, StoreReplacedError
from depthmill.pipeline.types import WorkerState
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, check, drive, labels


class LateAnswers(SimulatedPool):
    """What a worker does is answered when it is asked the next time, as on Ray."""

    def state(self, worker):
        self.known = getattr(self, "known", {})
        answer = self.known.get(worker, WorkerState("starting"))
        self.known[worker] = super().state(worker)
        return answer


@pytest.mark.parametrize("since_s", [0, 10])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    "sources",
    [{"a": (1280, 64)}, {"a": (200, 10), "b": (40, 2)}, {f"{i}.jpg": (1, 64) for i in range(400)}],
    ids=["video", "short segments", "pictures"],
)
@pytest.mark.parametrize("until_s", [500, 1e9])
def test_a_store_that_stands_still_fails_no_frame(until_s, sources, workers, since_s):
    ledger = Ledger(sources)
    behave = labels(ledger, frame_s=0.2)

    def stalls(pool, worker, method, argument):
        if method == "label" and since_s <= pool.clock_s < until_s:
            return 0.0, "stall"
        return behave(pool, worker, method, argument)

    pool = LateAnswers(lambda: workers, stalls)
    if until_s < 1e9:
        drive(pool, ledger)
        assert set(ledger.labelled) == all_frames(ledger)
        assert pool.clock_s < until_s + 600
    else:
        with pytest.raises(RunStoppedError, match="run the same command again"):
            drive(pool, ledger)
        assert pool.clock_s < 4 * 3600
    assert not ledger.failed


@pytest.mark.parametrize("workers", [1, 3])
def test_a_store_that_is_far_slower_than_it_was_is_waited_for(workers):
    ledger = Ledger({"a": (640, 16)})
    behave = labels(ledger)

    def slow(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        return seconds + 300 * (method == "label" and pool.clock_s > 20), answer

    pool = SimulatedPool(lambda: workers, slow)
    pool.state = lambda worker: WorkerState("busy", steps=1, storing=True)
    drive(pool, ledger, frame_limit_s=60.0, race=False)
    assert set(ledger.labelled) == all_frames(ledger)
    assert not ledger.failed


@pytest.mark.parametrize("seed", range(4))
def test_a_store_that_stalls_now_and_then_fails_no_frame_but_those_at_fault(seed):
    chance = random.Random(seed)
    ledger = Ledger({f"s{i}": (chance.randint(1, 60), chance.choice([2, 7, 32])) for i in range(8)})
    outcomes = ["die", "hang", RuntimeError("x")]
    bad = {frame: chance.choice(outcomes) for frame in chance.sample(sorted(all_frames(ledger)), 4)}
    behave = labels(ledger, bad=bad, seed=seed, sigma=0.5)

    def stalls(pool, worker, method, argument):
        if method == "label" and pool.clock_s % 30 > 20:
            return 0.0, "stall"
        return behave(pool, worker, method, argument)

    drive(LateAnswers(lambda: 3, stalls), ledger, frame_limit_s=1.0, attempts=1 + seed % 2)
    check(ledger, bad)


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
