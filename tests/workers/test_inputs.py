"""Inputs on their way into the store, by simulated workers."""

from depthmill.pipeline.errors import SourceError
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, drive, labels


def test_an_input_that_cannot_be_opened_for_a_moment_is_opened_later():
    ledger = Ledger({"good": (40, 10), "flaky": (40, 10), "bad": (1, 1)})
    behave, tries = labels(ledger), []

    def fails(pool, worker, method, argument):
        if method == "probe" and argument != "good":
            tries.append(argument)
            if argument == "bad" or tries.count("flaky") < 3:
                return 0.01, SourceError(f"{argument}: attempt {tries.count(argument)}")
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: 2, fails)
    driver = drive(pool, ledger)
    assert [failure.reason for failure in driver.inputs.failures] == ["bad: attempt 3"]
    assert len(ledger.labelled) == 80
    assert pool.clock_s < 10


def test_inputs_that_cannot_be_opened_are_listed_and_the_rest_goes_on():
    ledger = Ledger({"good": (40, 10), "bad": (1, 1), "kills": (1, 1), "hangs": (1, 1)})
    bad = {"bad": SourceError("bad: no picture"), "kills": "die", "hangs": "hang"}
    driver = drive(SimulatedPool(lambda: 2, labels(ledger, bad=bad)), ledger, frame_limit_s=1.0)
    reasons = {failure.uri: failure.reason for failure in driver.inputs.failures}
    assert reasons["bad"] == "bad: no picture"
    assert "dies of it" in reasons["kills"]
    assert "time limit" in reasons["hangs"]
    assert len(ledger.labelled) == 40
