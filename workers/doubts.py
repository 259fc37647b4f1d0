"""Whether it is a worker that fails, or what it fails at: one in doubt tries frames that were labelled before.

A worker that cannot do those is at fault: a mount is away, credentials have expired, its GPU is in an error that lasts.
It would fail at all that is left in no time, so it is given nothing else until it can, and what it failed at is not
held against the segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from depthmill.pipeline.errors import DepthmillError, RunStoppedError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Report
from depthmill.workers.crew import Crew, Running
from depthmill.workers.inquest import cause_of, words_of
from depthmill.workers.pace import Limits
from depthmill.workers.pool import Event

_CHECK_FRAMES = 4
_LONGEST_REST_S = 32.0  # the first is of a second, each other twice as long
_REPLACED_AFTER = 3  # checks in vain; at once, if others work on: it is not the inputs then
_HOPELESS_AFTER = 8  # the same; after a minute and a half
_FEWEST_GIVEN_UP = 5  # segments
_MAKE_UP = 4  # segments labelled, for one given up


Held = tuple[Running, Event]  # what a worker did, and how that ended


@dataclass(frozen=True)
class Check:
    """Frames that were labelled before, to be tried by a worker in doubt."""

    task: Task

    @property
    def frames(self) -> int:
        """Number of frames in it."""
        return self.task.frames

    def __str__(self) -> str:
        return f"trying {self.task} again"


@dataclass
class _Failing:
    """A worker that has done nothing since it began to fail.

    Attributes:
        since_s: When that was.
        failures: How often it has failed.
        in_doubt: Whether it is to be checked before it is given anything else.
        held: What it failed at last, which is judged when it has been checked.
        faults: Checks in vain.
        rests_until_s: When it is to be checked again.
    """

    since_s: float
    failures: int = 0
    in_doubt: bool = False
    held: Held | None = None
    faults: int = 0
    rests_until_s: float = 0.0


class Doubts:
    """What is known of the workers that fail.

    Attributes:
        sample: Frames that were labelled; None before any were.
    """

    def __init__(self, crew: Crew, say: Callable[[str], None], *, replace: bool) -> None:
        """All is well.

        Args:
            crew: The workers.
            say: Says a line to the user, once.
            replace: Whether another worker would be another process.
        """
        self._crew, self._say, self._replace = crew, say, replace
        self.sample: Task | None = None
        self._whole: Task  # of which the sample is the beginning
        self._able: set[int] = set()  # those that have ever done something
        self._failing: dict[int, _Failing] = {}
        self._did_s = float("-inf")  # when somebody did something last

    @property
    def workers(self) -> list[int]:
        """Those in doubt."""
        return [worker for worker, failing in self._failing.items() if failing.in_doubt]

    def committed(self, task: Task, report: Report) -> None:
        """A segment was: the next worker in doubt tries its first frames, so many that some have labels for certain."""
        fit = report.failed <= _CHECK_FRAMES or self.sample is None
        if fit and report.labelled and not task.only and not task.skip:
            segment = task.segment
            few = replace(segment, stop=min(segment.start + report.failed + _CHECK_FRAMES, segment.stop))
            self.sample, self._whole = Task(task.uri, task.fingerprint, few), task

    def came(self, worker: int) -> None:
        """A worker has loaded: where others have labelled something, it does so too before it is trusted."""
        if self.sample is not None:
            self._failing[worker] = _Failing(self._crew.now_s, in_doubt=True)

    def did(self, worker: int) -> Held | None:
        """A worker did something; what it failed at before, if that was held."""
        self._able.add(worker)
        self._did_s = self._crew.now_s
        return self.left(worker)

    def left(self, worker: int) -> Held | None:
        """A worker is gone, or no longer in doubt; what it failed at last, if that was held."""
        failing = self._failing.pop(worker, None)
        return failing.held if failing else None

    def failed(self, running: Running, event: Event, attempts: int) -> bool:
        """Take note of a failure; whether it is to be held until the worker has been checked.

        The first in a row is not, or a segment that spoils its workers would never be found to; unless it is the last
        of so many attempts.
        """
        failing = self._failing.setdefault(event.worker, _Failing(self._crew.now_s))
        failing.failures += 1
        if failing.failures > 1 or running.item.attempts + 1 >= attempts:
            failing.in_doubt, failing.held = True, (running, event)
        return failing.in_doubt

    def check(self, limits: Callable[[Task], Limits]) -> list[Held]:
        """Have workers in doubt try the sample; `limits` says how long a task may take.

        They have the time of the whole segment: it is the first that a new worker does, and that takes longer.

        Returns:
            What is judged without: it was held, but nothing was labelled before, and nobody is at work who could.
        """
        idle = [worker for worker in self.workers if worker in self._crew.idle]
        if self.sample is not None:
            for worker in idle:
                if self._crew.now_s >= self._failing[worker].rests_until_s:
                    self._crew.call(worker, Check(self.sample), limits(self._whole), "try_task", self.sample)
        elif not any(isinstance(running.item, Task) for running in self._crew.running.values()):
            return [held for worker in idle if (held := self.left(worker)) is not None]
        return []

    def checked(self, event: Event) -> tuple[Held | None, bool]:
        """Take the outcome of a check.

        Returns:
            What the worker failed at before, if that was held, and whether it counts. It does not if the worker is at
            fault; but it does if it may have spoilt it, as it may have killed it: the worker did well until then, and
            it was not the source or the store that failed.

        Raises:
            RunStoppedError: If no worker can do anything any more.
        """
        worker, now_s = event.worker, self._crew.now_s
        if event.error is None and event.answer:
            return self.did(worker), True
        failing = self._failing[worker]
        failing.rests_until_s = now_s + min(2.0**failing.faults, _LONGEST_REST_S)
        failing.faults += 1
        held, failing.held = failing.held, None
        why = words_of(event) if event.error is not None else "none of the frames can be read"
        at_fault = f"a worker can no longer label what was labelled before ({why})"
        others_do = self._did_s > failing.since_s
        # Only one that did well before, lest its machine is bad: then another would do no better.
        if self._replace and worker in self._able and (others_do or failing.faults > _REPLACED_AFTER):
            self._say(f"{at_fault}: it is replaced")
            self._crew.dismiss(worker)
            self.left(worker)
        elif all(self._hopeless(one) for one in self._crew.labelers - self._crew.loading):
            raise RunStoppedError(
                f"no worker can label any more what was labelled before ({why}); expected inputs, credentials and "
                "devices to be as they were: see to them, and run the same command again; what is committed stays"
            ) from event.error
        else:
            self._say(f"{at_fault}: it is given nothing else until it can")
        outside = held is None or isinstance(cause_of(held[1].error), DepthmillError)
        return held, failing.failures == 1 and not outside

    def _hopeless(self, worker: int) -> bool:
        return worker in self._failing and self._failing[worker].faults >= _HOPELESS_AFTER


class GivenUp:
    """Segments that are to be committed as failed, once several others were labelled for each.

    If not, it is hardly their fault: what a run has probed can nearly always be read.
    """

    def __init__(self) -> None:
        """None yet."""
        self._tasks: list[tuple[Task, str]] = []
        self._to_make_up = 0  # segments to be labelled

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task, why: str, workers: int, labelled: bool) -> list[tuple[Task, str]]:
        """Add a segment, and why; those that are to be committed now.

        Args:
            task: The segment.
            why: It failed.
            workers: Those that are ready.
            labelled: Whether anything was labelled in this run.

        Raises:
            RunStoppedError: If there are many, of different sources.
        """
        self._tasks.append((task, why))
        self._to_make_up += _MAKE_UP
        if self._to_make_up < _MAKE_UP * max(_FEWEST_GIVEN_UP, 2 * workers):
            return []
        if len({task.uri for task, _ in self._tasks}) > 1:
            raise self._stopped()
        return self.take() if labelled else []

    def labelled(self) -> list[tuple[Task, str]]:
        """A segment was labelled; those that are to be committed now."""
        self._to_make_up = max(0, self._to_make_up - 1)
        return [] if self._to_make_up else self.take()

    def take(self, labelled: bool = True) -> list[tuple[Task, str]]:
        """All of them, which are forgotten; `labelled` as above.

        Raises:
            RunStoppedError: If there are many, and nothing was labelled in this run.
        """
        if not labelled and len(self) >= _FEWEST_GIVEN_UP:
            raise self._stopped()
        tasks, self._tasks, self._to_make_up = self._tasks, [], 0
        return tasks

    def _stopped(self) -> RunStoppedError:
        return RunStoppedError(
            f"{len(self)} segments failed, and few were labelled meanwhile; the last: {self._tasks[-1][1]}. That is "
            "hardly the fault of each; expected inputs, credentials and devices to be as they were: see to them, and "
            "run the same command again; what is committed stays, and these segments are not committed as failed"
        )
