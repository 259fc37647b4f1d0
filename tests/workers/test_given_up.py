"""Segments that are given up: when they are judged, and when the run is stopped instead."""

import pytest

from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.workers.given_up import GivenUp, Suspect


def suspects(count, uris):
    return [Suspect(Task(f"{i % uris}.mp4", "f", Segment("a", i, i + 1)), "no luck", False) for i in range(count)]


def test_four_segments_labelled_make_up_for_one():
    given_up, (one, other) = GivenUp(), suspects(2, 2)
    for suspect in (one, other):
        assert given_up.add(suspect, 1, True, False) == []
    assert [given_up.labelled() for _ in range(8)] == [[]] * 7 + [[one, other]]
    assert given_up.add(one, 1, True, False) == []
    assert [given_up.labelled() for _ in range(4)] == [[]] * 3 + [[one]]


@pytest.mark.parametrize(("workers", "most"), [(1, 5), (4, 8)])
def test_too_many_of_several_sources_stop_the_run(workers, most):
    given_up, many = GivenUp(), suspects(most, 2)
    for suspect in many[:-1]:
        assert given_up.add(suspect, workers, True, False) == []
    with pytest.raises(RunStoppedError, match=f"{most} segments failed"):
        given_up.add(many[-1], workers, True, False)


def test_many_of_one_source_are_its_own_fault_unless_nothing_was_labelled_of_the_only_one():
    many = suspects(5, 1)
    for labelled, only, found in ((True, True, many), (True, False, many), (False, False, [])):
        given_up = GivenUp()
        assert [given_up.add(suspect, 1, labelled, only) for suspect in many][-1] == found
    given_up = GivenUp()
    with pytest.raises(RunStoppedError, match="no luck"):
        assert all(not given_up.add(suspect, 1, False, True) for suspect in many)
