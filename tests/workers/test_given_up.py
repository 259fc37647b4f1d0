"""Segments that are given up: when they are judged, and when the run is stopped instead."""

import pytest

from depthmill.pipeline.errors import MissingError, RunStoppedError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, check, drive, labels
from depthmill.workers.given_up import GivenUp, Suspect


def suspects(count, uris):
    return [Suspect(Task(f"{i % uris}.mp4", "f", Segment("a", i, i + 1)), "no luck", "segment") for i in range(count)]


def test_four_segments_labelled_make_up_for_one():
    given_up, (one, other) = GivenUp(print), suspects(2, 2)
    for suspect in (one, other):
        assert given_up.add(suspect, 1, True, False, 0.0) == []
    assert [given_up.labelled() for _ in range(8)] == [[]] * 7 + [[one, other]]
    assert given_up.add(one, 1, True, False, 0.0) == []
    assert [given_up.labelled() for _ in range(4)] == [[]] * 3 + [[one]]


@pytest.mark.parametrize(("workers", "most"), [(1, 5), (4, 8)])
def test_too_many_of_several_sources_stop_the_run(workers, most):
    given_up, many = GivenUp(print), suspects(most, 2)
    for suspect in many[:-1]:
        assert given_up.add(suspect, workers, True, False, 0.0) == []
    with pytest.raises(RunStoppedError, match=f"{most} segments failed"):
        given_up.add(many[-1], workers, True, False, 0.0)


def test_many_of_one_source_are_its_own_fault_unless_nothing_was_labelled_of_the_only_one():
    many = suspects(5, 1)
    for labelled, only, found in ((True, True, many), (True, False, many), (False, False, [])):
        given_up = GivenUp(print)
        assert [given_up.add(suspect, 1, labelled, only, 0.0) for suspect in many][-1] == found
    given_up = GivenUp(print)
    with pytest.raises(RunStoppedError, match="no luck"):
        assert all(not given_up.add(suspect, 1, False, True, 0.0) for suspect in many)


def away(ledger, until_s, uris=()):
    """A `behave` in which those that were probed, or all, cannot be opened at first; noise needs none."""
    behave = labels(ledger)

    def act(pool, worker, method, argument):
        if method == "try_noise":
            return 0.01, 1
        gone = method == "label" and pool.clock_s < until_s and argument.uri in (uris or ledger.sources)
        return (0.01, MissingError("no such file")) if gone else behave(pool, worker, method, argument)

    return act


@pytest.mark.parametrize("until_s", [1.1, 8, 80, 1e9])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize(
    "sources", [{"a": (24, 64)}, {"a": (128, 64), "b": (64, 64)}, {f"s{i}": (9, 8) for i in range(40)}]
)
def test_what_is_away_before_anything_is_labelled_is_waited_for_and_never_failed(sources, workers, until_s):
    ledger = Ledger(sources)
    pool = SimulatedPool(lambda: workers, away(ledger, until_s))
    if until_s < 1e9:
        drive(pool, ledger)
        check(ledger, ())
        assert pool.clock_s < 2 * until_s + 100
    else:
        with pytest.raises(RunStoppedError, match=r"no such file[\s\S]*run the same command again"):
            drive(pool, ledger)
        assert 95 < pool.clock_s < 140
    assert not ledger.failed
    assert len([line for line in ledger.said if "waiting until" in line]) <= 1


def test_segments_without_any_label_make_up_for_none():
    sources = ["good", *(f"away{i // 9}" if i % 9 == 0 else f"broken{i}" for i in range(45))]
    ledger = Ledger(dict.fromkeys(sources, (64, 64)))
    behave = away(ledger, 1e9, set(sources[1::9]))

    def act(pool, worker, method, argument):
        broken = method == "label" and argument.uri.startswith("broken")
        return (0.1, ledger.fail(argument, "no picture")) if broken else behave(pool, worker, method, argument)

    with pytest.raises(RunStoppedError, match=r"hardly the fault.*run the same command again"):
        drive(SimulatedPool(lambda: 1, act), ledger, attempts=1)


@pytest.mark.parametrize("probe_s", [0.01, 200])
@pytest.mark.parametrize("workers", [1, 4])
def test_an_input_that_stays_away_while_others_are_there_is_failed_alone(workers, probe_s):
    ledger = Ledger({"bad": (640, 64), "good": (640, 64)})
    behave = away(ledger, 1e9, {"bad"})

    def act(pool, worker, method, argument):
        seconds, outcome = behave(pool, worker, method, argument)
        return (probe_s if (method, argument) == ("probe", "good") else seconds), outcome

    pool = SimulatedPool(lambda: workers, act)
    drive(pool, ledger)
    assert set(ledger.failed) == {("bad", frame) for frame in range(640)}
    assert set(ledger.labelled) == all_frames(ledger) - set(ledger.failed)
    assert pool.clock_s < 120 + probe_s, "nobody rests for it"
