"""What is left to smooth of each source, phase by phase: looked up while others are worked on.

What other options made stays until its source is worked on: of the others, a run that is stopped has removed nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import StoreDamagedError
from depthmill.pipeline.objects import with_secrets
from depthmill.pipeline.smoothing.stage import Phase, SmoothTask, prepare
from depthmill.pipeline.store import Store
from depthmill.pipeline.store.store import READERS
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.types import LABELLED, Segment

PHASES: tuple[Phase, ...] = ("open", "edges", "solve", "filter")


@dataclass(frozen=True)
class Looked:
    """A source that was looked at.

    Attributes:
        source_id: Which.
        begun: Whether a phase of it has been done in this run.
        unfit: Why it cannot be smoothed; "" if it can.
        tasks: Of its next phase; none if nothing is left to do.
    """

    source_id: str
    begun: bool
    unfit: str
    tasks: list[SmoothTask]


@dataclass(frozen=True)
class _Looking:
    """A source that is being looked at.

    Attributes:
        source_id: Which.
        phases: That may be left of it.
        rested_s: When the last rest before it ended.
        found: Why it cannot be smoothed, and its tasks.
    """

    source_id: str
    phases: Sequence[Phase]
    rested_s: float
    found: Future[tuple[str, list[SmoothTask]]]


class Looks:
    """The sources of a run that are still to be looked at: a few at once, since each is many requests."""

    def __init__(self, store: Store, config: SmoothConfig, source_ids: Sequence[str]) -> None:
        """None has been yet."""
        self._store, self._config = store, config
        # With the phases that may be left of each.
        self._waiting: deque[tuple[str, Sequence[Phase]]] = deque((source_id, PHASES) for source_id in source_ids)
        self._looking: deque[_Looking] = deque()
        self._readers = ThreadPoolExecutor(READERS, "depthmill-plan")

    @property
    def left(self) -> bool:
        """Whether there are any."""
        return bool(self._waiting or self._looking)

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(cancel_futures=True)

    def add(self, source_id: str, done: Phase) -> None:
        """Look at a source again, before others: a phase of it is done."""
        self._waiting.appendleft((source_id, PHASES[PHASES.index(done) + 1 :]))

    def take(self, rested_s: float, *, wait: bool) -> Looked | None:
        """The next that has been looked at; None if none has, or none is left.

        Args:
            rested_s: When the run's last rest ended: what was met before it is no news.
            wait: Whether to wait for it.

        Raises:
            StoreError: If the store does not answer; what was asked is asked again the next time.
        """
        while self.left:
            while self._waiting and len(self._looking) < READERS:
                source_id, phases = self._waiting.popleft()
                look = self._readers.submit(self._look, source_id, phases)
                self._looking.append(_Looking(source_id, phases, rested_s, look))
            first = self._looking[0]
            if not (wait or first.found.done()):
                return None
            self._looking.popleft()
            try:
                unfit, tasks = first.found.result()
            except Exception:  # a signal, met while it is waited for, is no look's
                self._waiting.append((first.source_id, first.phases))
                if first.rested_s < rested_s:
                    continue
                raise
            return Looked(first.source_id, first.phases != PHASES, unfit, tasks)
        return None

    def _look(self, source_id: str, phases: Sequence[Phase]) -> tuple[str, list[SmoothTask]]:
        """Why a source cannot be smoothed, "" if it can, and the tasks of the first of these phases that has any."""
        temporal = Temporal(self._store, source_id)
        try:
            if phases == PHASES and (unfit := _unfit(self._store, source_id)):
                temporal.leave_out(unfit)
                return unfit, []
            attributes = self._store.attributes(source_id)
            for phase in phases:
                if segments := self._to_do(source_id, phase):
                    uri, fingerprint = with_secrets(attributes["uri"]), attributes["fingerprint"]
                    return "", [SmoothTask(phase, uri, fingerprint, segment) for segment in segments]
        except StoreDamagedError as error:
            temporal.leave_out(str(error))
            return str(error), []
        return "", []

    def _to_do(self, source_id: str, phase: Phase) -> list[Segment]:
        """What is left of a phase whose turn it is: also what an earlier run did without pictures it could not read."""
        temporal = Temporal(self._store, source_id)
        whole = [Segment(source_id, 0, self._store.attributes(source_id)["frames"])]
        if phase == "open":
            return whole if prepare(source_id, self._store, self._config, remove=False) == "edges" else []
        if phase == "solve":
            solved = temporal.solved() and not prepare(source_id, self._store, self._config, remove=False)
            return [] if solved else whole
        if phase == "filter":
            if not self._config.filter:
                return []
            temporal.prepare_filter()
        return sorted({*temporal.pending(phase), *temporal.unread(phase)}, key=lambda one: one.start)


def _unfit(store: Store, source_id: str) -> str:
    """Why a source cannot be smoothed; "" if it can."""
    pending = store.pending(source_id)
    if pending:
        return f"{len(pending)} segments are not labelled yet: run the same `depthmill label` again, then smooth"
    if "size" in store.arrays(source_id):
        sizes = store.read(source_id, "size")[store.status(source_id) == LABELLED]
        if len(np.unique(sizes, axis=0)) > 1:
            return "its pictures differ in size: expected the frames of one video, all of one size"
    return ""
