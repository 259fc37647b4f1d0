"""The search for the frames that make a segment fail: halves of it are tried."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, log2

from depthmill.pipeline.plan import Task
from depthmill.pipeline.types import Segment
from depthmill.workers.causes import DIED, TOO_LONG, excused, words_of
from depthmill.workers.pool import Event


@dataclass
class Inquest:
    """One search.

    Attributes:
        task: The segment that fails.
        frames: Its frames.
        trials: How many have been held.
        unheard: Trials without a verdict yet.
        guilty: Frame -> what became of the worker that tried it.
    """

    task: Task
    frames: Sequence[int]
    trials: int = 0
    unheard: int = 0
    guilty: dict[int, str] = field(default_factory=dict)

    @property
    def most_trials(self) -> int:
        """Enough for a few culprits, wherever they are."""
        return 16 + 8 * ceil(log2(len(self.frames) + 1))

    @property
    def verdict(self) -> Task | None:
        """The task, to be labelled around the guilty frames; None as long as trials are unheard."""
        if self.unheard:
            return None
        return replace(self.task, skip=tuple(sorted(self.guilty.items())), searched=True, attempts=0)


@dataclass(frozen=True)
class Trial:
    """Some frames of a suspect segment, to be read and labelled without being written.

    Attributes:
        inquest: Of what.
        start: Position in `inquest.frames` of the first.
        stop: Position behind the last.
        attempts: How many have failed.
        losses: How many ended with the worker's whole machine.
        why: What was wrong with it before; "" if nothing was.
    """

    inquest: Inquest
    start: int
    stop: int
    attempts: int = 0
    losses: int = 0
    why: str = ""

    @property
    def frames(self) -> int:
        """Number of frames in it."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"searching {self.task}"

    @property
    def task(self) -> Task:
        """What to try: all frames from the first to the last."""
        whole, frames = self.inquest.task, self.inquest.frames
        segment = Segment(whole.segment.source_id, frames[self.start], frames[self.stop - 1] + 1)
        return Task(whole.uri, whole.fingerprint, segment)


class Searches:
    """The searches under way, and the trials that nobody holds yet.

    The newest come first: one culprit is found before the next is looked for, and few trials wait at any time.
    """

    def __init__(self, attempts: int) -> None:
        """None yet; a single frame is guilty after so many failures."""
        self._attempts = attempts
        self._trials: deque[Trial] = deque()

    def __len__(self) -> int:
        return len(self._trials)

    def take(self) -> Trial | None:
        """The next trial, if there is one."""
        return self._trials.popleft() if self._trials else None

    def again(self, trial: Trial) -> None:
        """Put back a trial that was not held."""
        self._trials.appendleft(trial)

    def open(self, task: Task, why: str) -> None:
        """Begin the search in a segment that has failed as a whole.

        If it is a single frame, it is tried once more by itself: its worker may have died of what it had begun next.
        """
        frames = task.only or range(task.segment.start, task.segment.stop)
        inquest = Inquest(task, frames)
        if len(frames) == 1:
            inquest.unheard = 1
            self._trials.appendleft(Trial(inquest, 0, 1, attempts=self._attempts - 1, why=why))
        else:
            self._trials.extendleft(reversed(_split(Trial(inquest, 0, len(frames)), why)))

    def tried(self, trial: Trial, event: Event) -> Task | None:
        """Take the outcome of a trial; the verdict, if it was the last."""
        self._trials.extendleft(reversed(self._hear(trial, event)))
        return trial.inquest.verdict

    def _hear(self, trial: Trial, event: Event) -> list[Trial]:
        """Take the outcome of a trial; the trials that follow."""
        inquest = trial.inquest
        inquest.unheard -= 1
        if event.error is None:
            inquest.trials += 1
            return []
        lost = excused(trial, event)
        # A worker may have died of something else: what tells more of the frame counts, whenever it was seen.
        why = max(words_of(event), trial.why, key=_tells)
        tried = replace(trial, attempts=trial.attempts + (not lost), losses=trial.losses + lost, why=why)
        inquest.trials += not lost
        if lost or (trial.frames == 1 and tried.attempts < self._attempts):
            inquest.unheard += 1
            return [tried]
        return _split(trial, why)


def _tells(why: str) -> int:
    return ["", DIED, TOO_LONG].index(why) if why in ("", DIED, TOO_LONG) else 3


def _split(trial: Trial, why: str) -> list[Trial]:
    inquest, frames = trial.inquest, trial.inquest.frames[trial.start : trial.stop]
    if len(frames) == 1:
        inquest.guilty[frames[0]] = why
    elif inquest.trials >= inquest.most_trials:
        together = f"fails together with its neighbours, which {inquest.trials} trials did not tell apart: {why}"
        inquest.guilty.update(dict.fromkeys(frames, together))
    else:
        middle = (trial.start + trial.stop) // 2
        inquest.unheard += 2
        return [Trial(inquest, trial.start, middle), Trial(inquest, middle, trial.stop)]
    return []
