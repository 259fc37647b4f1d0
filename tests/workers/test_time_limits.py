"""How long simulated workers may take over a segment, a step of it, a source: those that take longer are ended."""

from dataclasses import replace

import pytest

from depthmill.pipeline.types import WorkerState
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, check, drive, labels


def test_a_worker_that_stands_still_in_a_long_segment_is_ended_long_before_the_segment_could_be_done():
    ledger = Ledger({"corpus": (2048, 2048)})
    pool = SimulatedPool(lambda: 1, labels(ledger, bad={("corpus", 7): "hang"}))
    drive(pool, ledger, frame_limit_s=60.0, attempts=1)
    assert set(ledger.failed) == {("corpus", 7)}
    assert len(ledger.labelled) == 2047
    assert pool.clock_s < 2048 * 60 / 3


def test_a_slow_worker_that_gets_on_is_left_alone():
    ledger = Ledger({"corpus": (512, 512)})
    pool = SimulatedPool(lambda: 1, lambda *_: None)
    behave = labels(ledger)
    pool.behave = lambda *call: (512 * 59.0 if call[2] == "label" else 0.1, behave(*call)[1])
    driver = drive(pool, ledger, frame_limit_s=60.0)
    assert driver.standing.deaths == 0
    assert len(ledger.labelled) == 512


def test_a_worker_may_take_as_long_to_open_a_source_as_a_prober():
    ledger = Ledger({"quick": (640, 64), "slow": (64, 64)})
    behave = labels(ledger, frame_s=0.01)

    def opens_slowly(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        if method == "probe" and argument == "slow":
            seconds = 400.0
        return (seconds + 1500 if method == "label" and argument.uri == "slow" else seconds), answer

    pool = SimulatedPool(lambda: 1, opens_slowly)
    pool.state = lambda worker: WorkerState("opening")
    driver = drive(pool, ledger, frame_limit_s=60.0)
    check(ledger, {})
    assert driver.standing.deaths == 0


def test_what_was_probed_in_no_time_is_not_waited_for_as_long():
    ledger = Ledger({"a": (640, 64)})
    behave = labels(ledger, frame_s=0.01)
    hung = []

    def hangs_once(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        if method == "label" and argument.segment.start == 320 and not hung:
            hung.append(worker)
            return float("inf"), answer
        return seconds, answer

    pool = SimulatedPool(lambda: 1, hangs_once)
    pool.state = lambda worker: WorkerState("opening")
    driver = drive(pool, ledger, frame_limit_s=60.0)
    check(ledger, {})
    assert driver.standing.deaths == 1
    assert pool.clock_s < 200


def test_the_search_among_frames_far_apart_has_the_time_of_all_that_it_reads():
    ledger = Ledger({"a": (2048, 2048)})
    failed = (0, 600, 1200, 1800)
    planned = replace(ledger.planned("a"), labelled=2044, failed=4, pending=(), redo=((0, failed),))

    def behave(pool, worker, method, argument):
        if method == "probe":
            return 0.01, planned
        if method == "label":
            return 1.0, ledger.commit(argument) if dict(argument.skip) else RuntimeError("no luck")
        tried = argument.segment
        return 1.0 * tried.frames, RuntimeError("no luck") if tried.start <= 1800 < tried.stop else tried.frames

    driver = drive(SimulatedPool(lambda: 1, behave), ledger, frame_limit_s=2.0)
    assert ledger.failed == {("a", 1800): "RuntimeError: no luck"}
    assert driver.standing.deaths == 0


@pytest.mark.parametrize("slowly", [True, False], ids=["slow", "stands still"])
@pytest.mark.parametrize("frames", [8, 64])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_segment_whose_frames_a_search_clears_has_all_the_time_that_is_granted(workers, frames, slowly):
    """It takes far longer as a whole than its halves do: all is labelled in the end, or it alone is failed."""
    ledger = Ledger({"a": (10 * frames, frames)})
    behave = labels(ledger, frame_s=0.01)

    def act(pool, worker, method, argument):
        if method == "label" and argument.segment.start == 5 * frames:
            return (20.0 * frames, ledger.commit(argument)) if slowly else (0.0, "hang")
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: workers, act)
    if slowly:
        pool.state = lambda worker: WorkerState("busy", steps=1 + int(pool.clock_s / 100))
    drive(pool, ledger, frame_limit_s=60.0, race=False)
    bad = () if slowly else [("a", frame) for frame in range(5 * frames, 6 * frames)]
    check(ledger, bad)
    assert all("longer than its time limit (frame_limit_s)" in why for why in ledger.failed.values())
