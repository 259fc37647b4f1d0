"""What is said of failures, and which of them count."""

from dataclasses import replace

import pytest

from depthmill.pipeline.errors import (
    CheckpointError,
    MissingError,
    SourceChangedError,
    StoreDamagedError,
    StoreError,
    StoreForbiddenError,
    StoreFullError,
    VoidError,
)
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.workers.causes import after, fault_of, words_of
from depthmill.workers.pool import Event


def test_what_is_raised_on_purpose_is_told_without_the_name_of_its_class():
    assert words_of(Event(0, error=SourceChangedError("a.mp4 changed: put it back"))) == "a.mp4 changed: put it back"
    assert words_of(Event(0, error=RuntimeError("no luck"))) == "RuntimeError: no luck"


def test_lost_machines_are_nobodys_fault_the_first_ten_times():
    task = Task("a.mp4", "f", Segment("a", 0, 8))
    for _ in range(12):
        task = after(task, Event(0, error=RuntimeError("the actor died"), died=True, lost=True))
    assert (task.losses, task.attempts) == (10, 2)


@pytest.mark.parametrize(
    ("error", "at_first", "searched", "labelled"),
    [
        (StoreFullError("full"), "run", "run", "run"),
        (CheckpointError("another"), "run", "run", "run"),
        (StoreForbiddenError("denied"), "store", "store", "store"),
        (StoreError("it does not take what is written"), "store", "store", "store"),
        (StoreDamagedError("verify it"), "source", "source", "source"),
        (SourceChangedError("another file"), "source", "source", "source"),
        (MissingError("no such file"), "inputs", "inputs", "segment"),
        (VoidError("no numbers"), "segment", "segment", "segment"),
        (RuntimeError("no luck"), "frame", "segment", "frame"),
        (TimeoutError("no answer"), "frame", "segment", "frame"),
    ],
)
def test_whose_fault_a_failure_is(error, at_first, searched, labelled):
    task, event = Task("a.mp4", "f", Segment("a", 0, 8)), Event(0, error=error)
    assert fault_of(task, event, False) == at_first
    assert fault_of(replace(task, searched=True), event, False) == searched
    assert fault_of(task, event, True) == labelled
