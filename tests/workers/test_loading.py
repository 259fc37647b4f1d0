"""Workers that cannot load, simulated: whether the run goes on without them."""

import pytest

from depthmill.pipeline.errors import (
    CheckpointError,
    RunStoppedError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
)
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, check, drive, labels
from depthmill.workers.crew import Crew


def test_workers_that_die_while_they_load_end_the_run():
    ledger = Ledger({"a": (40, 10)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    place = pool._end_in
    pool._end_in = lambda seconds, worker, outcome: place(seconds, worker, "die" if outcome == "simulated" else outcome)
    with pytest.raises(RunStoppedError, match=r"while loading the model, at last worker \d"):
        drive(pool, ledger)


def test_machines_that_go_while_workers_load_end_no_run():
    ledger = Ledger({"a": (40, 10)})
    pool = SimulatedPool(lambda: 1, labels(ledger))
    place = pool._end_in

    def end(seconds, worker, outcome):
        goes = outcome == "simulated" and pool.kinds[worker] == "labeler" and len(pool.kinds) < 20
        place(seconds, worker, "lost" if goes else outcome)

    pool._end_in = end
    drive(pool, ledger)
    check(ledger, {})


def test_a_checkpoint_that_does_not_load_ends_the_run_with_its_reason():
    ledger = Ledger({"a": (40, 10)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    place = pool._end_in

    def end(seconds, worker, outcome):
        broken = outcome == "simulated" and pool.kinds[worker] == "labeler"
        place(seconds, worker, CheckpointError("no unet") if broken else outcome)

    pool._end_in = end
    with pytest.raises(CheckpointError, match="no unet"):
        drive(pool, ledger)


@pytest.mark.parametrize("kind", ["labeler", "prober"])
@pytest.mark.parametrize("until_s", [30, 1e9])
def test_a_store_that_does_not_answer_while_the_first_workers_load_is_waited_for(until_s, kind):
    ledger = Ledger({"a": (40, 10)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    place = pool._end_in

    def end(seconds, worker, outcome):
        away = outcome == "simulated" and pool.kinds[worker] == kind and pool.clock_s < until_s
        place(seconds, worker, StoreError("zarr.json: 503") if away else outcome)

    pool._end_in = end
    if until_s == 30:
        drive(pool, ledger)
        check(ledger, {})
    else:
        with pytest.raises(RunStoppedError, match="503"):
            drive(pool, ledger)
        assert 90 < pool.clock_s < 150
    assert len(pool.kinds) < 30
    assert [line for line in ledger.said if "503" in line and line.endswith("waiting until that works again")]


@pytest.mark.parametrize("error", [StoreFullError("no space left"), StoreMismatchError("another run's")])
def test_a_store_that_will_take_nothing_ends_the_run_at_once(error):
    ledger = Ledger({"a": (40, 10)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    place = pool._end_in
    pool._end_in = lambda seconds, worker, outcome: place(seconds, worker, error if outcome == "simulated" else outcome)
    with pytest.raises((RunStoppedError, StoreMismatchError), match=str(error)):
        drive(pool, ledger)
    assert pool.clock_s < 5


@pytest.mark.parametrize("outcome", ["die", RuntimeError("CUDA out of memory"), CheckpointError("not fetched")])
@pytest.mark.parametrize("workers", [None, 4])
def test_one_machine_on_which_nothing_loads_ends_no_run(outcome, workers):
    """Three workers load; whoever comes to the fourth machine fails, and is the last to be placed there."""
    ledger = Ledger({"a": (4000, 10)})
    pool = SimulatedPool(lambda: 4, labels(ledger))
    place, good = pool._end_in, []

    def end(seconds, worker, answer):
        if answer == "simulated" and pool.kinds[worker] == "labeler":
            good.append(worker)
            seconds, answer = (seconds, answer) if len(good) <= 3 else (2 * seconds, outcome)
        place(seconds, worker, answer)

    pool._end_in = end
    drive(pool, ledger, workers=workers)
    check(ledger, {})
    assert 3 + 3 * 4 <= len(good) <= 3 + 3 * 4 + 3  # then one a minute
    assert [line for line in ledger.said if "while loading" in line and "once a minute" in line]


@pytest.mark.parametrize("outcome", [RuntimeError("CUDA unknown error"), CheckpointError("not fetched")])
def test_one_machine_that_fails_to_load_before_the_others_have_loaded_ends_no_run(outcome):
    ledger = Ledger({"a": (4000, 10)})
    pool = SimulatedPool(lambda: 4, labels(ledger))
    place, first = pool._end_in, []

    def end(seconds, worker, answer):
        if answer == "simulated" and pool.kinds[worker] == "labeler":
            first.append(worker)
            seconds, answer = (seconds, answer) if 1 < len(first) <= 4 else (seconds / 2, outcome)
        place(seconds, worker, answer)

    pool._end_in = end
    drive(pool, ledger)
    check(ledger, {})


@pytest.mark.parametrize("kind", ["labeler", "prober"])
def test_workers_that_do_not_start_are_told_of(kind):
    crew = Crew(SimulatedPool(lambda: 0, None))
    crew.hire(kind)
    assert crew.waited_for(16).startswith("1 workers to start")
