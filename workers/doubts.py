"""Whether it is a worker that fails, or what it fails at: one in doubt tries frames that were labelled before.

A worker that cannot do those is at fault: a mount is away, credentials have expired, its GPU is in an error that lasts.
It would fail at all that is left in no time, so it is given nothing else until it can, and what it failed at is not
held against the segments. Before anything was labelled it tries a picture of noise, which tells of its device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from depthmill.pipeline.errors import DepthmillError, RunStoppedError, SourceChangedError, SourceError, StoreError
from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Report
from depthmill.workers.causes import cause_of, words_of
from depthmill.workers.crew import Crew, Running
from depthmill.workers.pace import HOPELESS_AFTER, PATIENCE_S, Limits, Rests, rest_s
from depthmill.workers.pool import Event

_CHECK_FRAMES = 4
_REPLACED_AFTER = 3  # checks in vain, of the device; at once, if others work on
_UNPROVEN = 2  # workers that never did anything, and are replaced before anything was labelled


Held = tuple[Running, Event]  # what a worker did, and how that ended


@dataclass(frozen=True)
class Check:
    """Frames that were labelled before, to be tried by a worker in doubt; noise, if there are none."""

    task: Task | None

    @property
    def frames(self) -> int:
        """Number of frames in it."""
        return self.task.frames if self.task else 1

    def __str__(self) -> str:
        return f"trying {self.task} again" if self.task else "trying noise"


@dataclass
class _Failing:
    """A worker that has done nothing since it began to fail.

    Attributes:
        since_s: When that was.
        failures: How often it has failed.
        in_doubt: Whether it is to be checked before it is given anything else.
        writes: Whether it is to go on, when it has rested, without a check, which writes nothing.
        held: What it failed at last, which is judged when it has been checked.
        faults: Checks in vain.
        rests_until_s: When it is to be checked again.
    """

    since_s: float
    failures: int = 0
    in_doubt: bool = False
    writes: bool = False
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
        self._unproven = _UNPROVEN
        self._failing: dict[int, _Failing] = {}
        self._stalls = Rests()  # of a store that does not take what is written, and does not say so
        self._did_s = self._came_s = float("-inf")  # when somebody did something last; when somebody came

    @property
    def workers(self) -> list[int]:
        """Those in doubt."""
        return [worker for worker, failing in self._failing.items() if failing.in_doubt]

    def committed(self, task: Task, report: Report) -> None:
        """A segment was: the next worker in doubt tries its first frames, so many that some have labels for certain."""
        self._stalls.answered()
        fit = report.failed <= _CHECK_FRAMES or self.sample is None
        if fit and report.labelled and not task.only and not task.skip:
            segment = task.segment
            few = replace(segment, stop=min(segment.start + report.failed + _CHECK_FRAMES, segment.stop))
            self.sample, self._whole = Task(task.uri, task.fingerprint, few), task

    def came(self, worker: int) -> None:
        """A worker has loaded: where others have done something, or died, it is checked before it is trusted."""
        self._came_s = self._crew.now_s
        if self.sample is not None or self._crew.deaths:
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

    @property
    def stalls(self) -> int:
        """How often workers were ended that waited for the store, since it last took something."""
        return self._stalls.times

    def cannot_write(self, event: Event) -> None:
        """A worker could not write to the store: it rests, and goes on with whatever comes next.

        Raises:
            StoreError: If workers wait for it, again and again, until they are ended.
            RunStoppedError: If no worker can do anything any more.
        """
        if event.died:
            self._stalled(event)
            return
        failing = self._failing.setdefault(event.worker, _Failing(self._crew.now_s))
        failing.in_doubt = failing.writes = True
        self._in_vain(event.worker, f"a worker cannot write ({words_of(event)})", event, device=False)

    def _stalled(self, event: Event) -> None:
        now_s = self._crew.now_s
        if not self._stalls.over(now_s):  # it met several at once
            return
        if not self._stalls.begin(now_s):
            assert event.error is not None
            raise event.error
        if self._stalls.times == 1:
            self._say(f"{event.error}: it is waited for, longer each time")

    def check(self, limits: Callable[[Task], Limits], for_noise: Limits) -> None:
        """Have workers in doubt try the sample; noise, if there is none, and nobody is at work who could label one.

        Args:
            limits: How long a task may take. Workers have the time of the whole segment: it is the first that a new one
                does, and that takes longer.
            for_noise: How long noise may take.
        """
        for worker in [worker for worker in self.workers if worker in self._crew.idle]:
            failing = self._failing[worker]
            if self._crew.now_s < failing.rests_until_s:
                continue
            if failing.writes:
                failing.in_doubt = failing.writes = False
            elif self.sample is not None:
                self._crew.call(worker, Check(self.sample), limits(self._whole), "try_task", self.sample)
            elif not any(isinstance(running.item, Task) for running in self._crew.running.values()):
                self._crew.call(worker, Check(None), for_noise, "try_noise")

    def checked(self, check: Check, event: Event) -> tuple[Held | None, bool]:
        """Take the outcome of a check.

        Returns:
            What the worker failed at before, if that was held, and whether it counts. It does not if the worker is at
            fault; but it does if it may have spoilt it, as it may have killed it: the worker did well until then, and
            it was not the source, the store or the system that failed.

        Raises:
            RunStoppedError: If no worker can do anything any more.
        """
        worker, cause = event.worker, cause_of(event.error)
        if event.error is None and event.answer:
            self._able.add(worker)
            return (self.did(worker) if check.task else self.left(worker)), True
        if isinstance(cause, SourceChangedError) and check.task == self.sample:
            self.sample = None  # it tells nothing any more
            return None, False
        failing = self._failing[worker]
        held, failing.held = failing.held, None
        if event.died:
            self.left(worker)
        else:
            silent = "none of the frames can be read" if check.task else "its answer is no number"
            why = words_of(event) if event.error is not None else silent
            known = "what was labelled before" if check.task else "anything"
            device = not isinstance(cause, SourceError | StoreError | OSError) and not (
                check.task and event.error is None
            )
            self._in_vain(worker, f"a worker can no longer label {known} ({why})", event, device=device)
        outside = held is None or event.lost or isinstance(cause_of(held[1].error), DepthmillError | OSError)
        return held, failing.failures == 1 and not outside

    def _in_vain(self, worker: int, at_fault: str, event: Event, *, device: bool) -> None:
        """A worker could do nothing: it rests or, if others can or it is its device, is replaced."""
        failing, now_s = self._failing[worker], self._crew.now_s
        failing.rests_until_s = now_s + rest_s(failing.faults)
        failing.faults += 1
        others_do = self._did_s > failing.since_s
        if self._replace and (others_do or (device and failing.faults > _REPLACED_AFTER)) and self._may_replace(worker):
            self._say(f"{at_fault}: {self._crew.name(worker)} is replaced")
            self._crew.dismiss(worker)
            self.left(worker)
        elif now_s - max(self._did_s, self._came_s) > PATIENCE_S and all(
            one in self._failing and self._failing[one].faults >= HOPELESS_AFTER
            for one in self._crew.labelers - self._crew.loading
        ):
            raise RunStoppedError(
                f"no worker can go on: {at_fault}; expected inputs, credentials and devices to be as they were: see to "
                f"them, and run the same command again{_less_memory(event)}; what is committed stays"
            ) from event.error
        else:
            self._say(f"{at_fault}: it is given nothing else until it can")

    def _may_replace(self, worker: int) -> bool:
        """Whether another would do better: if this one did well before, else its machine may be bad."""
        if worker in self._able:
            return True
        self._unproven -= self.sample is None
        return self.sample is None and self._unproven >= 0


def _less_memory(event: Event) -> str:
    """What helps where memory was too small for one picture; "" where it was not that."""
    words = words_of(event)
    short = any(one in words for one in ("MemoryError", "OutOfMemoryError", "allocate memory"))
    return ", or another, of a lower --processing-resolution, --batch-size 1 or --dtype bfloat16" if short else ""
