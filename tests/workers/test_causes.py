"""What is said of failures, and which of them count."""

from depthmill.pipeline.errors import SourceChangedError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.workers.causes import after, words_of
from depthmill.workers.pool import Event


def test_what_is_raised_on_purpose_is_told_without_the_name_of_its_class():
    assert words_of(Event(0, error=SourceChangedError("a.mp4 changed: put it back"))) == "a.mp4 changed: put it back"
    assert words_of(Event(0, error=RuntimeError("no luck"))) == "RuntimeError: no luck"


def test_lost_machines_are_nobodys_fault_the_first_ten_times():
    task = Task("a.mp4", "f", Segment("a", 0, 8))
    for _ in range(12):
        task = after(task, Event(0, error=RuntimeError("the actor died"), died=True, lost=True))
    assert (task.losses, task.attempts) == (10, 2)
