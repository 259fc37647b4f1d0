"""Failures of the environment against simulated workers: they are not committed as failures of the data."""

from types import SimpleNamespace

import pytest

from depthmill.pipeline.errors import (
    RunStoppedError,
    SourceChangedError,
    SourceError,
    StoreDamagedError,
    StoreError,
    VoidError,
)
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Report, Segment, WorkerState
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, drive, labels
from depthmill.workers.crew import Running
from depthmill.workers.doubts import Check, Doubts
from depthmill.workers.pace import Limits
from depthmill.workers.pool import Event


def failing(ledger, fails, *, frame_s=0.1):
    """A `behave` in which what `fails` (pool, worker, task) names ends at once, in what it returns: an error, "die"."""
    behave = labels(ledger, frame_s)

    def act(pool, worker, method, argument):
        error = None if method == "probe" else fails(pool, worker, argument)
        if method == "try_noise" and isinstance(error, SourceError | StoreError):  # it needs neither
            error = None
        return (0.01, error) if error is not None else behave(pool, worker, method, argument)

    return act


def labelers(pool):
    return [worker for worker, kind in pool.kinds.items() if kind == "labeler"]


AWAY = SourceError("clips/a.mp4: no such file")
POISONED = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 16])
@pytest.mark.parametrize("error", [AWAY, OSError("stale file handle")], ids=["source", "other"])
def test_inputs_that_are_away_for_a_minute_cost_no_frame(workers, attempts, error):
    ledger = Ledger({f"s{i}": (640, 64) for i in range(4 * workers)})
    pool = SimulatedPool(lambda: workers, failing(ledger, lambda pool, *_: error if 30 < pool.clock_s < 90 else None))
    drive(pool, ledger, attempts=attempts)
    assert not ledger.failed
    assert set(ledger.labelled) == all_frames(ledger)
    assert [line for line in ledger.said if "labelled before" in line and str(error) in line]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_device_that_answers_nan_costs_no_picture_that_is_a_source_of_its_own(workers):
    ledger = Ledger({f"s{i}": (1, 1) for i in range(500)})
    void = VoidError("no numbers")
    pool = SimulatedPool(lambda: workers, failing(ledger, lambda pool, *_: void if pool.clock_s > 5 else None))
    with pytest.raises(RunStoppedError, match="no numbers"):
        drive(pool, ledger)
    assert ledger.labelled
    assert not ledger.failed


def test_one_such_picture_among_many_fails_alone():
    ledger = Ledger({f"s{i}": (1, 1) for i in range(50)})
    drive(SimulatedPool(lambda: 2, labels(ledger, bad={("s7", 0): VoidError("no numbers")})), ledger)
    assert list(ledger.failed) == [("s7", 0)]
    assert set(ledger.labelled) == all_frames(ledger) - {("s7", 0)}


@pytest.mark.parametrize("since_s", [0, 50])
@pytest.mark.parametrize("error", [AWAY, POISONED], ids=["source", "other"])
def test_bad_machines_among_many_cost_no_frame(since_s, error):
    """On 2 of 16 machines nothing can be done, from the start or later; a new worker comes to where there is room."""
    ledger = Ledger({f"s{i}": (1280, 64) for i in range(16)})
    machines = {}

    def machine(pool, worker):
        if worker not in machines:
            machines[worker] = min(set(range(16)) - {machines[other] for other in pool.alive & machines.keys()})
        return machines[worker]

    def fails(pool, worker, task):
        return error if machine(pool, worker) in (0, 7) and pool.clock_s > since_s else None

    pool = SimulatedPool(lambda: 16, failing(ledger, fails))
    drive(pool, ledger)
    assert not ledger.failed
    assert set(ledger.labelled) == all_frames(ledger)
    assert pool.clock_s < 16 * 1280 * 0.1 / 14 * 1.15
    assert len(labelers(pool)) <= 16 + 2  # a bad machine's first worker is replaced, if it did well; no other is


@pytest.mark.parametrize(
    ("workers", "error", "race"),
    [(1, POISONED, True), (4, POISONED, True), (4, POISONED, False), (4, StoreError("denied to this one"), False)],
)
def test_a_worker_whose_process_is_spoilt_is_replaced(workers, error, race):
    """What it had been told that it would be given next is for others, also where none may take what another is at."""
    ledger = Ledger({"a": (3200, 64)})
    spoilt = set()

    def fails(pool, worker, task):
        if task.segment.start == 64 and not spoilt:
            spoilt.add(worker)
        return error if worker in spoilt else None

    pool = SimulatedPool(lambda: workers, failing(ledger, fails))
    drive(pool, ledger, race=race)
    assert not ledger.failed
    assert set(ledger.labelled) == all_frames(ledger)
    assert len(labelers(pool)) == workers + 1


@pytest.mark.parametrize("workers", [1, 4])
def test_a_frame_that_spoils_its_worker_is_found(workers):
    ledger = Ledger({"a": (640, 64)})
    spoilt = set()

    def fails(pool, worker, task):
        if task.segment.start <= 200 < task.segment.stop and 200 not in dict(task.skip):
            spoilt.add(worker)
        return POISONED if worker in spoilt else None

    drive(SimulatedPool(lambda: workers, failing(ledger, fails)), ledger)
    assert set(ledger.failed) == {("a", 200)}
    assert set(ledger.labelled) == all_frames(ledger) - {("a", 200)}


@pytest.mark.parametrize("since_s", [0, 20])
@pytest.mark.parametrize("workers", [1, 8])
def test_inputs_that_stay_away_stop_the_run_and_none_of_them_is_failed(workers, since_s):
    ledger = Ledger({f"s{i}": (640, 64) for i in range(16)})
    pool = SimulatedPool(lambda: workers, failing(ledger, lambda pool, *_: AWAY if pool.clock_s > since_s else None))
    with pytest.raises(RunStoppedError, match=r"no such file[\s\S]*run the same command again"):
        drive(pool, ledger)
    assert not ledger.failed
    assert pool.clock_s < since_s + 300


def test_the_only_input_of_a_run_is_not_failed_if_it_goes_away_before_anything_is_labelled():
    ledger = Ledger({"a": (6400, 64)})
    with pytest.raises(RunStoppedError, match=r"no such file[\s\S]*run the same command again"):
        drive(SimulatedPool(lambda: 2, failing(ledger, lambda *_: AWAY)), ledger)
    assert not ledger.failed


def test_one_folder_of_inputs_that_goes_away_stops_the_run_too():
    """What was labelled before is of another one, and can still be labelled."""
    ledger = Ledger({f"{folder}{i}": (64, 64) for i in range(500) for folder in "ab"})

    def fails(pool, worker, task):
        return AWAY if task.uri.startswith("b") and pool.clock_s > 20 else None

    with pytest.raises(RunStoppedError, match=r"hardly the fault[\s\S]*run the same command again"):
        drive(SimulatedPool(lambda: 8, failing(ledger, fails)), ledger)
    assert len(ledger.failed) < 10 * 64


@pytest.mark.parametrize("error", [AWAY, RuntimeError("no luck")], ids=["source", "other"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("order", [("bad", "good", "fine"), ("good", "bad", "fine")], ids=["first", "later"])
def test_a_source_of_which_no_frame_can_be_labelled_is_failed_alone(workers, order, error):
    ledger = Ledger(dict.fromkeys(order, (640, 64)))
    behave = failing(ledger, lambda pool, worker, task: error if task.uri == "bad" and not task.skip else None)
    driver = drive(SimulatedPool(lambda: workers, behave), ledger)
    assert set(ledger.failed) == {("bad", frame) for frame in range(640)}
    assert set(ledger.labelled) == all_frames(ledger) - set(ledger.failed)
    # Of an error that says whose fault it is, nobody searches for the frames.
    assert {"tried 3 times" in reason for reason in ledger.failed.values()} == {error is AWAY}
    assert driver.standing.deaths == 0


def test_what_fails_to_the_last_is_failed_when_nothing_else_is_left():
    ledger = Ledger({"a": (64, 64), "b": (64, 64)})
    behave = failing(ledger, lambda pool, worker, task: AWAY if task.uri == "b" else None)
    drive(SimulatedPool(lambda: 1, behave), ledger)
    assert set(ledger.failed) == {("b", frame) for frame in range(64)}


def test_what_a_worker_in_doubt_failed_at_is_done_when_the_worker_is_lost():
    ledger = Ledger({"a": (1280, 64)})

    def fails(pool, worker, task):
        return AWAY if worker == bad[0] else None

    pool = SimulatedPool(lambda: 2, failing(ledger, fails))
    bad = [1]
    pool.at(30, lambda: pool.lose(1))
    drive(pool, ledger)
    assert not ledger.failed
    assert set(ledger.labelled) == all_frames(ledger)


def test_a_worker_that_comes_late_has_the_time_of_a_first_segment():
    ledger = Ledger({"a": (6400, 64)})
    behave, room = labels(ledger), [1]

    def act(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        return seconds + 60.0 * (method == "try_task"), answer

    pool = SimulatedPool(lambda: room[0], act)
    pool.at(20, lambda: room.__setitem__(0, 2))
    driver = drive(pool, ledger)
    assert driver.standing.deaths == 0
    assert len(labelers(pool)) == 2


def test_a_worker_whose_frames_can_no_longer_be_read_is_at_fault():
    """Nothing is raised then: each frame has its reason."""
    ledger = Ledger({f"s{i}": (640, 64) for i in range(8)})
    behave = labels(ledger)

    def act(pool, worker, method, argument):
        if method == "probe" or not 20 < pool.clock_s < 60:
            return behave(pool, worker, method, argument)
        return 0.01, AWAY if method == "label" else 0

    drive(SimulatedPool(lambda: 2, act), ledger)
    assert not ledger.failed
    assert [line for line in ledger.said if "none of the frames can be read" in line]


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("error", [POISONED, "die", "hang"], ids=["raises", "dies", "hangs"])
def test_what_fails_from_the_first_frame_on_stops_the_run_and_fails_nothing(workers, error):
    ledger = Ledger({f"s{i}": (128, 64) for i in range(4)})
    pool = SimulatedPool(lambda: workers, failing(ledger, lambda *_: error))
    with pytest.raises(RunStoppedError, match="run the same command again"):
        drive(pool, ledger, frame_limit_s=1.0)
    assert not ledger.failed
    assert len(labelers(pool)) < 10 * workers + 10


@pytest.mark.parametrize("workers", [1, 8])
def test_a_frame_at_the_start_that_spoils_its_worker_is_found(workers):
    """Before anything was labelled, noise tells a spoilt worker from a frame that cannot be labelled."""
    ledger = Ledger({f"s{i}": (640, 64) for i in range(4)})
    spoilt = set()

    def fails(pool, worker, task):
        if task.uri == "s0" and task.segment.start <= 10 < task.segment.stop and 10 not in dict(task.skip):
            spoilt.add(worker)
        return POISONED if worker in spoilt else None

    drive(SimulatedPool(lambda: workers, failing(ledger, fails)), ledger)
    assert set(ledger.failed) == {("s0", 10)}
    assert set(ledger.labelled) == all_frames(ledger) - {("s0", 10)}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_frame_that_raises_and_then_kills_its_worker_is_found(workers):
    ledger = Ledger({"a": (640, 64)})
    spoilt = set()

    def fails(pool, worker, task):
        if worker in spoilt:
            return "die"
        if task.segment.start <= 200 < task.segment.stop and 200 not in dict(task.skip):
            spoilt.add(worker)
            return POISONED
        return None

    drive(SimulatedPool(lambda: workers, failing(ledger, fails)), ledger)
    assert set(ledger.failed) == {("a", 200)}
    assert set(ledger.labelled) == all_frames(ledger) - {("a", 200)}


@pytest.mark.parametrize("workers", [1, 8])
def test_inputs_and_checkpoint_that_are_away_together_for_half_a_minute_cost_nothing(workers):
    ledger = Ledger({f"s{i}": (1280, 64) for i in range(workers)})

    def away(pool):
        return 30 < pool.clock_s < 60

    pool = SimulatedPool(lambda: workers, failing(ledger, lambda pool, *_: AWAY if away(pool) else None))
    place = pool._end_in
    pool._end_in = lambda seconds, worker, answer: place(
        seconds, worker, OSError("no checkpoint") if answer == "simulated" and away(pool) else answer
    )
    pool.at(35, lambda: pool.lose(max(pool.alive)))
    drive(pool, ledger)
    assert not ledger.failed
    assert set(ledger.labelled) == all_frames(ledger)


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize(("until_s", "stops"), [(90, False), (900, True)])
def test_a_store_that_is_away_costs_no_frame(workers, until_s, stops):
    ledger = Ledger({f"s{i}": (1280, 64) for i in range(workers)})
    behave = labels(ledger)

    def refuses(pool, worker, method, argument):
        if method == "label" and 30 < pool.clock_s < until_s:
            return 6.4, StoreError("s3://bucket/labels.zarr cannot be written: 503")
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: workers, refuses)
    if stops:
        with pytest.raises(RunStoppedError, match=r"cannot be written: 503[\s\S]*run the same command again"):
            drive(pool, ledger)
        assert pool.clock_s < 300
    else:
        drive(pool, ledger)
        assert set(ledger.labelled) == all_frames(ledger)
    assert not ledger.failed


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("error", [SourceChangedError("b is another file now"), StoreDamagedError("b: verify it")])
def test_a_source_that_changes_or_is_damaged_during_a_run_is_left_out_and_none_of_it_is_failed(workers, error):
    ledger = Ledger({"a": (640, 64), "b": (640, 64)})

    def fails(pool, worker, task):
        return error if task.uri == "b" and pool.clock_s > 10 else None

    driver = drive(SimulatedPool(lambda: workers, failing(ledger, fails)), ledger)
    assert not ledger.failed
    assert {frame for uri, frame in ledger.labelled if uri == "a"} == set(range(640))
    assert [failure.reason for failure in driver.inputs.failures] == [str(error)]
    assert len([line for line in ledger.said if "left out" in line]) == 1


def test_broken_pictures_do_not_make_good_ones_too_slow():
    """A picture that cannot be read takes no time, which tells nothing of how long a good one may take."""
    ledger = Ledger({"broken": (64, 64), "good": (64, 64)})
    behave = labels(ledger, 20.0)

    def act(pool, worker, method, argument):
        if method == "label" and argument.uri == "broken":
            return 0.1, ledger.fail(argument, "no picture")
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: 1, act)
    pool.state = lambda worker: WorkerState("busy", steps=1 + int(pool.clock_s / 160))  # batches of eight
    driver = drive(pool, ledger, frame_limit_s=60.0)
    assert {frame for uri, frame in ledger.labelled if uri == "good"} == set(range(64))
    assert driver.standing.deaths == 0


def test_some_of_the_frames_that_a_worker_in_doubt_tries_have_labels():
    doubts = Doubts(None, pytest.fail, replace=True)
    for start, failed, tried in ((0, 10, (0, 14)), (64, 2, (64, 70)), (128, 10, (64, 70)), (192, 0, (192, 196))):
        segment = Segment("a", start, start + 64)
        doubts.committed(Task("a.mp4", "f", segment), Report(segment, 64 - failed, failed))
        assert (doubts.sample.segment.start, doubts.sample.segment.stop) == tried


@pytest.mark.parametrize("part", [{"only": (3,)}, {"skip": ((3, "it kills"),)}])
def test_segments_in_which_a_frame_was_searched_for_are_not_tried(part):
    doubts, segment = Doubts(None, pytest.fail, replace=True), Segment("a", 0, 64)
    doubts.committed(Task("a.mp4", "f", segment, **part), Report(segment, 1, 63))
    assert doubts.sample is None


@pytest.mark.parametrize(
    ("error", "failures", "lost", "counts"),
    [
        (POISONED, 1, False, True),
        (POISONED, 2, False, False),
        (POISONED, 1, True, False),
        (AWAY, 1, False, False),
        (OSError("stale file handle"), 1, False, False),
    ],
)
def test_what_a_worker_dies_of_afterwards_counts_if_it_may_have_spoilt_it(error, failures, lost, counts):
    doubts, task = Doubts(SimpleNamespace(now_s=0.0), pytest.fail, replace=True), Task("a", "f", Segment("a", 0, 8))
    doubts.committed(task, Report(task.segment, 8, 0))
    held = Running(task, 0.0, Limits()), Event(0, error=error)
    for _ in range(failures):
        assert doubts.failed(*held, attempts=1)
    died = Event(0, error=RuntimeError("the actor died"), died=True, lost=lost)
    assert doubts.checked(Check(doubts.sample), died) == (held, counts)
