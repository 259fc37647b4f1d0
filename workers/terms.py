"""What a run is given: the options that its driver goes by, and what the driver has done by others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Report
from depthmill.workers.standing import Standing


@dataclass(frozen=True)
class Options:
    """What of a run's configuration the driver goes by.

    Attributes:
        attempts: How often something is tried before it counts as failed.
        frame_limit_s: Most seconds that a frame may take.
        open_limit_s: Most seconds that opening a source may take.
        workers: Labelers to ask for; None for as many as there is room for, at any time.
        probers: Sources probed at once, by few workers; by many, one for every few labelers.
        least_limit_s: What a frame is granted at least, however quick the others were, if `frame_limit_s` is not less.
        race: Whether workers that use their devices alike write the same bytes, so that two may be at one segment.
    """

    attempts: int
    frame_limit_s: float
    open_limit_s: float
    workers: int | None
    probers: int
    least_limit_s: float = 1.0
    race: bool = True


@dataclass(frozen=True)
class Calls:
    """What the driver has done by others.

    Attributes:
        publish: Names sources that are new in the store in its root, and keeps their stamps: given as id -> stamp.
        fail: Commits a task's frames as failed, for a reason.
        show: Shows where the run stands, and what the first few workers do.
        say: Says a line to the user.
        stopped: Whether the run is to end.
    """

    publish: Callable[[Mapping[str, str]], None]
    fail: Callable[[Task, str], Report]
    show: Callable[[Standing], None]
    say: Callable[[str], None]
    stopped: Callable[[], bool] = lambda: False
