"""What a failure is said to come from, in words, and whether it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from depthmill.pipeline.errors import DepthmillError
from depthmill.pipeline.plan import Task
from depthmill.workers.backlog import Probe
from depthmill.workers.pool import Event

if TYPE_CHECKING:  # OpenCV and SciPy come with it, which labelling has no use for
    from depthmill.pipeline.smoothing.stage import SmoothTask
    from depthmill.workers.inquest import Trial

TOO_LONG = "it takes longer than its time limit (frame_limit_s)"
DIED = "its worker dies of it"
_EXCUSED = 10  # losses of a machine with which something has nothing to do

Tried = TypeVar("Tried", Task, Probe, "SmoothTask")


def excused(item: Task | Probe | SmoothTask | Trial, event: Event) -> bool:
    """Whether it failed with its machine, which counts against nobody, unless that happens again and again."""
    return event.lost and item.losses < _EXCUSED


def after(item: Tried, event: Event) -> Tried:
    """The same, tried once more in vain."""
    if excused(item, event):
        return replace(item, losses=item.losses + 1)
    return replace(item, attempts=item.attempts + 1)


def words_of(event: Event) -> str:
    """What went wrong, in words that are the same each time it does: they are committed with the frame."""
    if isinstance(event.error, TimeoutError) and event.died:
        return TOO_LONG
    return DIED if event.died else reason(event.error)


def cause_of(error: BaseException | None) -> BaseException | None:
    """What a worker raised, out of Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def reason(error: BaseException | None) -> str:
    """An exception in one line; what depthmill raises on purpose needs no name of a class."""
    cause = cause_of(error)
    text = str(cause).strip().splitlines()
    if text and isinstance(cause, DepthmillError):
        return text[0]
    return f"{type(cause).__name__}: {text[0]}" if text else type(cause).__name__
