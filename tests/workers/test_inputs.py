"""Inputs on their way into the store, by simulated workers."""

import re
from unittest.mock import Mock

import pytest

from depthmill.pipeline.errors import (
    MissingError,
    RunStoppedError,
    SourceError,
    StoreError,
    StoreForbiddenError,
    StoreFullError,
    StoreMismatchError,
)
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, drive, labels
from depthmill.workers.backlog import Probe
from depthmill.workers.inputs import Inputs
from depthmill.workers.pool import Event


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


@pytest.mark.parametrize("error", [MissingError("no such file"), SourceError("stale"), StoreError("503")])
@pytest.mark.parametrize(("until_s", "stops"), [(65, False), (1e9, True)])
def test_inputs_that_are_away_while_they_are_probed_are_probed_later(error, until_s, stops):
    ledger = Ledger({f"s{i}": (64, 64) for i in range(500)})
    behave = labels(ledger)

    def away(pool, worker, method, argument):
        if method == "probe" and 5 < pool.clock_s < until_s:
            return 0.01, error
        seconds, answer = behave(pool, worker, method, argument)
        return seconds + 0.1 * (method == "probe"), answer

    pool = SimulatedPool(lambda: 4, away)
    words = "the store can no longer be used" if isinstance(error, StoreError) else "inputs can no longer be opened"
    if stops:
        with pytest.raises(RunStoppedError, match=words):
            drive(pool, ledger)
        return
    driver = drive(pool, ledger)
    (said,) = [line for line in ledger.said if not line.startswith("waiting for:")]
    assert re.match(rf"{words} \({error}\): waiting", said)
    assert not driver.inputs.failures
    assert len(ledger.labelled) == 500 * 64


@pytest.mark.parametrize(("until_s", "stops"), [(65, False), (1e9, True)])
def test_what_is_listed_later_is_probed_and_nothing_is_left_out(until_s, stops):
    ledger = Ledger({f"s{i}": (64, 64) for i in range(100)})
    pool = SimulatedPool(lambda: 4, labels(ledger))

    class Listing:
        left = iter(list(ledger.sources))

        def __iter__(self):
            return self

        def __next__(self):
            if 1.5 < pool.clock_s < until_s:
                raise SourceError("s3://bucket/in/: token has expired")
            return next(self.left)

    if stops:
        with pytest.raises(
            RunStoppedError, match=r"token has expired[\s\S]*committed stays.*run the same command again"
        ):
            drive(pool, ledger, uris=Listing(), probers=1)
        assert ledger.published
        assert pool.clock_s < 150
        return
    driver = drive(pool, ledger, uris=Listing(), probers=1)
    assert [line for line in ledger.said if re.match(r"inputs cannot be listed \(s3.*expired\): waiting", line)]
    assert not driver.inputs.failures
    assert set(ledger.labelled) == all_frames(ledger)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [(StoreFullError("no space left"), "make room"), (StoreForbiddenError("denied"), "see to the store")],
)
def test_a_store_that_takes_nothing_more_when_inputs_are_added_ends_the_run_at_once(error, remedy):
    ledger = Ledger({"a": (8, 8), "b": (8, 8)})
    pool = SimulatedPool(lambda: 2, labels(ledger, bad={"b": error}))
    with pytest.raises(RunStoppedError, match=rf"{error}[\s\S]*{remedy}"):
        drive(pool, ledger)
    assert pool.clock_s < 5


def test_an_input_that_tells_nothing_any_more_is_not_opened_again():
    """It was opened, and is another one by now: what fails after it is left out as if none had been opened."""
    missing = {f"s{i}": MissingError(f"s{i}") for i in range(20)}
    ledger = Ledger({"good": (10, 10)} | dict.fromkeys(missing, (10, 10)))
    behave, opened = labels(ledger, bad=missing), []

    def act(pool, worker, method, argument):
        if (method, argument) == ("probe", "good"):
            opened.append(argument)
            assert len(opened) < 3, "it is opened again and again"
            if len(opened) == 2:
                return 0.01, StoreMismatchError("another file")
        return behave(pool, worker, method, argument)

    driver = drive(SimulatedPool(lambda: 2, act), ledger)
    assert {failure.uri for failure in driver.inputs.failures} == set(missing)
    assert len(opened) == 2


def test_whether_inputs_can_be_read_is_seen_by_reading_one():
    """One of which nothing is left to do is not read otherwise, and opening it says nothing of reading."""
    missing = {f"s{i}": MissingError(f"s{i}") for i in range(20)}
    ledger = Ledger({"good": (10, 10)} | dict.fromkeys(missing, (10, 10)))
    pool, anew = SimulatedPool(lambda: 2, labels(ledger, bad=missing)), []
    call = pool.call

    def note(worker, method, *arguments):
        anew.extend([arguments] if method == "probe" and arguments[0] == "good" else [])
        call(worker, method, *arguments)

    pool.call = note
    drive(pool, ledger)
    assert anew[0] == ("good", False)
    assert set(anew[1:]) == {("good", True)}


def test_what_was_opened_before_the_run_tells_an_outage_from_its_start():
    inputs = Inputs([f"s{i}" for i in range(20)], 1, print, "good")
    inputs.read(20, 0.0)
    for _ in range(5):
        inputs.failed(inputs.take(0.0), Event(0, None, SourceError("gone")), 0.0)
        assert inputs.left_out() == []
    assert inputs.take(0.0) == Probe("good", anew=True)


def test_probers_that_fail_at_once_meet_one_outage():
    inputs = Inputs([], 3, print)
    for worker in range(20):  # as many outages would end the run
        inputs.failed(Probe(f"s{worker}"), Event(worker, None, StoreError("503")), 0.0)


def test_listings_that_work_again_between_their_failures_are_no_long_outage():
    listing = Mock(side_effect=[*[SourceError("away")] * 6, "s"] * 3)
    inputs = Inputs(iter(listing, None), 3, print)
    for second in range(200):
        inputs.read(inputs.unprobed + 1, float(second))
        if inputs.unprobed == 3:
            break
    assert inputs.unprobed == 3


def test_a_list_of_which_half_is_missing_is_gone_through():
    missing = {f"s{i}": MissingError(f"s{i}") for i in range(400) if i % 40 >= 20}
    ledger = Ledger({f"s{i}": (10, 10) for i in range(400)})
    driver = drive(SimulatedPool(lambda: 4, labels(ledger, bad=missing)), ledger)
    assert {failure.uri for failure in driver.inputs.failures} == set(missing)
    assert len(ledger.labelled) == 200 * 10
    assert driver.standing.reasons.total() == 200
