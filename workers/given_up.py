"""Segments that all attempts were in vain at, until it is clear whether that is their fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.plan import Task
from depthmill.workers.causes import Fault
from depthmill.workers.pace import Rests
from depthmill.workers.progress import count

_FEWEST = 5  # segments
_MAKE_UP = 4  # segments labelled, for one given up


@dataclass(frozen=True)
class Suspect:
    """A segment that is given up.

    Attributes:
        task: Which.
        why: It failed.
        fault: Whose that is.
    """

    task: Task
    why: str
    fault: Fault


class GivenUp:
    """Segments that are given up, once several others were labelled for each.

    If none are, it is hardly their fault: what a run has probed can nearly always be read. So where inputs may be away,
    they are tried again when workers have rested, and none is committed as failed. A frame at fault is searched for at
    once where anything was labelled.

    Attributes:
        rests: During which no segment is to be tried.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """None yet; `say` says a line to the user."""
        self._say = say
        self._to_make_up = 0  # segments to be labelled
        self.rests = Rests()
        self._keep([])

    def __len__(self) -> int:
        return len(self._suspects)

    def add(self, suspect: Suspect, workers: int, labelled: bool, only: bool, now_s: float) -> list[Suspect]:
        """Add a segment; those that are to be judged now.

        Args:
            suspect: The segment.
            workers: Those that are ready.
            labelled: Whether anything was labelled in this run.
            only: Whether the run has no other source.
            now_s: The time.

        Raises:
            RunStoppedError: If there are many, of different sources, or nothing was labelled of the only one; and none
                could not be opened, or that was waited for.
        """
        if suspect.fault == "frame" and labelled:
            return [suspect]
        self._suspects.append(suspect)
        self._uris.add(suspect.task.uri)
        self._to_make_up += _MAKE_UP
        if self._to_make_up < _MAKE_UP * max(_FEWEST, 2 * workers):
            return []
        if len(self._uris) > 1 or (only and not labelled):
            return self._away(labelled, now_s)
        return self._all() if labelled else []

    def labelled(self) -> list[Suspect]:
        """A segment was labelled; those that are to be judged now."""
        self._to_make_up = max(0, self._to_make_up - 1)
        return [] if self._to_make_up else self._all()

    def take(self, labelled: bool, now_s: float) -> list[Suspect]:
        """Those that are to be judged now that nothing else is left; `labelled` as above.

        Raises:
            RunStoppedError: As above, however few could not be opened.
        """
        if not labelled and (len(self) >= _FEWEST or self._of_inputs()):
            return self._away(labelled, now_s)
        return self._all()

    def _away(self, labelled: bool, now_s: float) -> list[Suspect]:
        """Those that could not be opened, to be tried after a rest."""
        away = [] if labelled else self._of_inputs()
        if not away or not self.rests.begin(now_s):
            raise self._stopped()
        if self.rests.times == 1:
            self._say(f"inputs can no longer be opened ({away[-1].why}): waiting until that works again")
        self._keep([one for one in self._suspects if one.fault != "inputs"])
        return away

    def _of_inputs(self) -> list[Suspect]:
        return [one for one in self._suspects if one.fault == "inputs"]

    def _all(self) -> list[Suspect]:
        suspects = self._suspects
        self._keep([])
        return suspects

    def _keep(self, suspects: list[Suspect]) -> None:
        """Forget all others."""
        self._suspects = suspects
        self._uris = {one.task.uri for one in suspects}
        self._to_make_up = _MAKE_UP * len(suspects)

    def _stopped(self) -> RunStoppedError:
        failed, last = count(len(self), "segment"), self._suspects[-1].why
        return RunStoppedError(
            f"{failed} failed, and few were labelled meanwhile; the last: {last}. That is hardly the fault of each; "
            "expected inputs, credentials and devices to be as they were: see to them, and run the same command again; "
            "what is committed stays, and these segments are not committed as failed"
        )
