"""Segments that all attempts were in vain at, until it is clear whether that is their fault."""

from __future__ import annotations

from dataclasses import dataclass

from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.plan import Task

_FEWEST = 5  # segments
_MAKE_UP = 4  # segments labelled, for one given up


@dataclass(frozen=True)
class Suspect:
    """A segment that is given up.

    Attributes:
        task: Which.
        why: It failed.
        search: Whether the frames that do it are to be looked for; else all are to be committed as failed.
    """

    task: Task
    why: str
    search: bool


class GivenUp:
    """Segments that are given up, once several others were labelled for each.

    If none are, it is hardly their fault: what a run has probed can nearly always be read.
    """

    def __init__(self) -> None:
        """None yet."""
        self._suspects: list[Suspect] = []
        self._uris: set[str] = set()
        self._to_make_up = 0  # segments to be labelled

    def __len__(self) -> int:
        return len(self._suspects)

    def add(self, suspect: Suspect, workers: int, labelled: bool, only: bool) -> list[Suspect]:
        """Add a segment; those that are to be judged now.

        Args:
            suspect: The segment.
            workers: Those that are ready.
            labelled: Whether anything was labelled in this run.
            only: Whether the run has no other source.

        Raises:
            RunStoppedError: If there are many, of different sources, or nothing was labelled of the only one.
        """
        self._suspects.append(suspect)
        self._uris.add(suspect.task.uri)
        self._to_make_up += _MAKE_UP
        if self._to_make_up < _MAKE_UP * max(_FEWEST, 2 * workers):
            return []
        if len(self._uris) > 1 or (only and not labelled):
            raise self._stopped()
        return self.take() if labelled else []

    def labelled(self) -> list[Suspect]:
        """A segment was labelled; those that are to be judged now."""
        self._to_make_up = max(0, self._to_make_up - 1)
        return [] if self._to_make_up else self.take()

    def take(self, labelled: bool = True) -> list[Suspect]:
        """All of them, which are forgotten; `labelled` as above.

        Raises:
            RunStoppedError: If there are many, and nothing was labelled in this run.
        """
        if not labelled and len(self) >= _FEWEST:
            raise self._stopped()
        suspects, self._suspects, self._uris, self._to_make_up = self._suspects, [], set(), 0
        return suspects

    def _stopped(self) -> RunStoppedError:
        return RunStoppedError(
            f"{len(self)} segments failed, and few were labelled meanwhile; the last: {self._suspects[-1].why}. That "
            "is hardly the fault of each; expected inputs, credentials and devices to be as they were: see to them, "
            "and run the same command again; what is committed stays, and these segments are not committed as failed"
        )
