"""The search for frames that make a segment fail, without workers: how often each is tried, and what is said of it."""

import pytest

from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.workers.causes import DIED, TOO_LONG
from depthmill.workers.inquest import Searches
from depthmill.workers.pool import Event

TASK = Task("a.mp4", "f", Segment("a", 0, 8))
FAILS = Event(0, error=RuntimeError("no luck"))
DIES = Event(0, error=RuntimeError("the actor died"), died=True)
HANGS = Event(0, error=TimeoutError("no answer"), died=True)
LOST = Event(0, error=RuntimeError("the actor died"), died=True, lost=True)


def guilty(*alone):
    """What a search in which frame 5 kills its worker finds; tried alone, that frame ends so, and then well."""
    searches, outcomes = Searches(attempts=3), iter(alone)
    searches.open(TASK, DIED)
    verdict = None
    while verdict is None:
        trial = searches.take()
        event = Event(0, trial.frames)
        if trial.start <= 5 < trial.stop:
            event = DIES if trial.frames > 1 else next(outcomes, event)
        verdict = searches.tried(trial, event)
    assert verdict.searched
    return dict(verdict.skip)


def test_a_frame_is_given_up_after_as_many_tries_of_its_own():
    assert guilty(DIES, DIES) == {}
    assert guilty(DIES, DIES, DIES) == {5: DIED}


@pytest.mark.parametrize(
    ("alone", "why"),
    [
        ((FAILS, DIES, DIES), "RuntimeError: no luck"),
        ((DIES, HANGS, DIES), TOO_LONG),
        ((HANGS, FAILS, DIES), "no luck"),
    ],
)
def test_what_tells_most_of_a_frame_is_kept_whenever_it_was_seen(alone, why):
    assert why in guilty(*alone)[5]


def test_lost_machines_are_nobodys_fault_the_first_ten_times():
    assert guilty(*[LOST] * 12) == {}
    assert guilty(*[LOST] * 13) == {5: DIED}


@pytest.mark.parametrize(("alone", "skip"), [(Event(0, 1), ()), (DIES, ((8, DIED),))], ids=["labelled", "dies"])
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_segment_of_one_frame_is_tried_once_more_by_itself(attempts, alone, skip):
    """Nothing is begun in a trial that its worker could die of, and nothing is written."""
    searches = Searches(attempts)
    searches.open(Task("a.mp4", "f", Segment("a", 8, 9)), DIED)
    verdict = searches.tried(searches.take(), alone)
    assert (verdict.skip, verdict.searched, len(searches)) == (skip, True, 0)
