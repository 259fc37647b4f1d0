"""Smoothing by simulated workers, on a clock of their own: what is away for a while, and workers that cannot load."""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import MissingError, RunStoppedError, SourceChangedError, SourceError, StoreError
from depthmill.pipeline.smoothing.stage import SmoothTask
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.types import Segment, WorkerState
from depthmill.tests.workers.simulated import SimulatedPool
from depthmill.workers.crew import Crew
from depthmill.workers.looks import PHASES, Looks
from depthmill.workers.smooth import _Run


@pytest.fixture
def smooth(monkeypatch):
    """Smooths sources of one segment each: smooth(pool, ids) -> the run."""

    def look(self, source_id, phases):
        task = SmoothTask("edges", source_id, "f", Segment(source_id, 0, 8))
        return "", [task] if phases == PHASES else []

    def run(pool, ids):
        going = _Run(SimpleNamespace(directory=None), SmoothConfig(attempts=2), ids)
        going.display = lambda counts, states: vars(going).update(shown=counts)
        try:
            going.go(Crew(pool), lambda: False, lambda line: None)
        finally:
            going.looks.close()
        return going

    monkeypatch.setattr(Looks, "_look", look)
    monkeypatch.setattr(Temporal, "leave_out", lambda self, why: None)
    return run


def works(away):
    """A `behave`, and the ids smoothed so far; `away(clock_s, id)` is what opening one ends in, None if it is there."""
    done = set()

    def behave(pool, worker, method, task):
        if error := away(pool.clock_s, task.uri):
            return 0.01, error
        done.update({task.uri} if task.phase == "edges" else ())
        return 0.5, ""

    return behave, done


IDS = [f"s{i}" for i in range(60)]


@pytest.mark.parametrize("error", [MissingError("no such file"), SourceError("503")])
@pytest.mark.parametrize("until_s", [4, 60, 1e9])
def test_inputs_that_are_away_are_waited_for(smooth, error, until_s):
    behave, done = works(lambda clock_s, uri: error if 3 < clock_s < until_s else None)
    pool = SimulatedPool(lambda: 3, behave)
    if until_s < 1e9:
        assert not smooth(pool, IDS).left_out
        assert done == set(IDS)
        assert pool.clock_s < 2 * until_s + 20
    else:
        with pytest.raises(RunStoppedError, match=f"^{error}\\n.*what was smoothed so far stays; expected inputs"):
            smooth(pool, IDS)


@pytest.mark.parametrize("error", [MissingError("no such file"), SourceChangedError("another file")])
def test_sources_that_are_gone_while_others_are_there_are_left_out_at_once(smooth, error):
    gone = set(IDS[10:])
    behave, done = works(lambda clock_s, uri: error if uri in gone else None)
    pool = SimulatedPool(lambda: 3, behave)
    run = smooth(pool, IDS)
    assert run.left_out.keys() == gone
    assert done == set(IDS) - gone
    assert (run.shown.done, run.shown.total) == (80, 80)
    assert pool.clock_s < 20


@pytest.mark.parametrize("error", [MissingError("no such file"), SourceChangedError("another file")])
def test_what_a_source_costs_does_not_grow_with_their_number(smooth, monkeypatch, error):
    monkeypatch.delattr(Counter, "total")  # asked for at every turn, it was most of it

    def calls(number):
        count, gone = 0, {f"s{i}" for i in range(2, number, 2)}

        def see(frame, event, argument):
            nonlocal count
            count += event == "call" and frame.f_code.co_filename == _Run.go.__code__.co_filename

        behave, done = works(lambda clock_s, uri: error if uri in gone else None)
        sys.setprofile(see)
        try:
            smooth(SimulatedPool(lambda: 3, behave), [f"s{i}" for i in range(number)])
        finally:
            sys.setprofile(None)
        assert len(done) == number - len(gone)
        return count

    assert calls(240) < 6 * calls(60)


def test_the_one_that_is_opened_again_may_have_changed_meanwhile(smooth):
    def away(clock_s, uri):
        return SourceChangedError("another file") if uri in IDS[:20] else SourceError("503")

    behave, done = works(lambda clock_s, uri: away(clock_s, uri) if clock_s > 3 else None)
    pool = SimulatedPool(lambda: 3, behave)
    found = smooth(pool, IDS)
    assert found.left_out.keys() | done == set(IDS)
    assert pool.clock_s < 20


@pytest.mark.parametrize("outcome", ["die", RuntimeError("no such library"), StoreError("403")])
def test_one_machine_on_which_nothing_loads_ends_no_run(smooth, outcome):
    behave, done = works(lambda clock_s, uri: None)
    pool = SimulatedPool(lambda: 4, behave)
    place, came = pool._end_in, []

    def end(seconds, worker, answer):
        if answer == "simulated":
            came.append(worker)
            seconds, answer = (seconds, answer) if len(came) <= 3 else (2 * seconds, outcome)
        place(seconds, worker, answer)

    pool._end_in = end
    smooth(pool, IDS)
    assert done == set(IDS)
    assert 4 <= len(came) < 8, "it is tried again, but seldom"
    assert pool.clock_s < 15, "others do not wait for it"


@pytest.mark.parametrize(("from_s", "until_s"), [(0, 60), (4, 60), (0, 1e9), (4, 1e9)])
def test_a_store_that_goes_away_from_new_workers_is_waited_for(smooth, from_s, until_s):
    behave, done = works(lambda clock_s, uri: None)
    pool = SimulatedPool(lambda: 2, behave)
    place = pool._end_in

    def end(seconds, worker, answer):
        away = answer == "simulated" and from_s <= pool.clock_s < until_s
        place(seconds, worker, StoreError("503") if away else answer)

    pool._end_in = end
    pool.at(5, lambda: [pool.lose(worker) for worker in sorted(pool.placed)])
    if until_s == 60:
        smooth(pool, IDS)
        assert done == set(IDS)
    else:
        with pytest.raises(StoreError, match="503"):
            smooth(pool, IDS)
        assert 90 < pool.clock_s < 150


def test_workers_that_all_die_while_they_load_end_the_run(smooth):
    pool = SimulatedPool(lambda: 2, works(lambda clock_s, uri: None)[0])
    place = pool._end_in
    pool._end_in = lambda seconds, worker, answer: place(seconds, worker, "die")
    with pytest.raises(RunStoppedError, match="while loading"):
        smooth(pool, IDS)


@pytest.mark.parametrize("phase", ["open", "solve"])
def test_what_shows_no_steps_may_stand_still(smooth, monkeypatch, phase):
    task = SmoothTask(phase, "s0", "f", Segment("s0", 0, 8))
    monkeypatch.setattr(Looks, "_look", lambda self, source_id, phases: ("", [task] if phases == PHASES else []))
    pool = SimulatedPool(lambda: 1, lambda *_: (75 * SmoothConfig().frame_limit_s, ""))
    pool.state = lambda worker: WorkerState("busy", steps=1)
    smooth(pool, ["s0"])
    assert len(pool.kinds) == 1, "none was replaced"


def test_what_was_read_after_all_is_not_said_to_be_unread(smooth, monkeypatch):
    """Its edges were to be left empty, when it had failed for the last time; but the store did not answer."""

    def away(*_):
        raise StoreError("503")

    monkeypatch.setattr("depthmill.workers.smooth.write_empty_edges", away)
    outcomes = iter([(0.1, "die"), (0.1, "die"), (0.5, "")])
    run = smooth(SimulatedPool(lambda: 1, lambda *_: next(outcomes)), ["s0"])
    assert (run.done, run.unread) == (8, {})
