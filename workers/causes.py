"""Whose fault a failure is, what it is said to come from, in words, and whether it counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from depthmill.pipeline.errors import (
    CheckpointError,
    ConfigError,
    DepthmillError,
    SourceChangedError,
    SourceError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreReplacedError,
)
from depthmill.pipeline.plan import Task
from depthmill.workers.backlog import Probe
from depthmill.workers.pool import Event

if TYPE_CHECKING:  # OpenCV and SciPy come with it, which labelling has no use for
    from depthmill.pipeline.smoothing.stage import SmoothTask
    from depthmill.workers.inquest import Trial

TOO_LONG = "it takes longer than its time limit (frame_limit_s)"
DIED = "its worker dies of it"
WHOLE = ", but of no part of it: is its memory too small for all? --retry-failed labels it again"
_FOR_ALL = (StoreFullError, StoreReplacedError, ConfigError, CheckpointError)
_EXCUSED = 10  # losses of a machine with which something has nothing to do

Tried = TypeVar("Tried", Task, Probe, "SmoothTask")


Fault = Literal["run", "store", "source", "inputs", "segment", "frame"]


def fault_of(task: Task, event: Event, labelled: bool) -> Fault:
    """Whose fault it is that a segment, or a part of it, failed, unless it is its worker's (`doubts.py`).

    - `run`: every other worker would meet the same, so the run ends.
    - `store`: it cannot be written, or stands still. The segment is as it was, and the worker rests, if it is alive; if
      none can write for long, the run ends.

    These follow once all attempts were in vain:

    - `source`: it is another one by now, or damaged in the store. It is left out, and none of it fails.
    - `inputs`: they are away, since what was probed cannot be opened and nothing was labelled yet. The segment is tried
      again when the others were, or after a rest.
    - `frame`: one of the segment's, or several. They are searched for.
    - `segment`: it says so, or a search has found no frame, or more than those. It is committed as failed.

    Args:
        task: The segment, with what is known of it.
        event: How it, or a part of it, ended.
        labelled: Whether anything was labelled in this run.
    """
    cause = cause_of(event.error)
    if isinstance(cause, _FOR_ALL):
        return "run"
    if isinstance(cause, StoreError) and not isinstance(cause, StoreDamagedError):
        return "store"
    if isinstance(cause, SourceChangedError | StoreDamagedError):
        return "source"
    if isinstance(cause, SourceError) and not labelled:
        return "inputs"
    # Of an error that depthmill raises on purpose, a search would find every frame guilty.
    return "segment" if task.searched or isinstance(cause, DepthmillError) else "frame"


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
