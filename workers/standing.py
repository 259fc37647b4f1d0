"""Where a run stands: what the display, the metrics and `run.json` tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from depthmill.pipeline.plan import Planned
from depthmill.pipeline.types import Report, WorkerState
from depthmill.workers.crew import Crew

_MOST_REASONS = 50


@dataclass(frozen=True)
class Counts:
    """Where a run stands, in frames.

    Attributes:
        total: All frames of all sources.
        before: Those that earlier runs had committed.
        done: Those that this run has committed, failed ones included.
        failed: Those of `done` that have no labels.
    """

    total: int
    before: int
    done: int = 0
    failed: int = 0

    @property
    def left(self) -> int:
        """Those that are not committed."""
        return self.total - self.before - self.done


@dataclass
class Standing:
    """Where a run stands.

    Attributes:
        counts: In frames.
        labelled: Frames with labels, earlier runs' included.
        sources: Sources in the store.
        unprobed: Inputs known and not probed.
        queued: Segments that nobody works on.
        running: Segments under way.
        ready: Labelers that have loaded.
        starting: Labelers that have not.
        deaths: Workers that died, or were ended: they could not load, or took too long.
        retries: Attempts at segments beyond the first.
        slots: Frames that the batches had room for.
        filled: Frames that were in them.
        label_s: Seconds that labelers spent labelling.
        ready_s: Seconds that labelers have been ready, added up.
        bytes: Written.
        reasons: Failed frames and sources of this run by reason; the rarest together, when there are very many.
        device: Device and dtype in words, from the first labeler that loaded.
        workers: What some of the labelers do.
    """

    counts: Counts = Counts(0, 0)
    labelled: int = 0
    sources: int = 0
    unprobed: int = 0
    queued: int = 0
    running: int = 0
    ready: int = 0
    starting: int = 0
    deaths: int = 0
    retries: int = 0
    slots: int = 0
    filled: int = 0
    label_s: float = 0.0
    ready_s: float = 0.0
    bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    device: str = ""
    workers: dict[str, WorkerState] = field(default_factory=dict)

    @property
    def fill(self) -> float:
        """Mean share of a batch that is frames, in [0, 1]; 0 before the first."""
        return self.filled / self.slots if self.slots else 0.0

    @property
    def busy(self) -> float:
        """Share of the labelers' time that they spent labelling, in [0, 1]."""
        return min(1.0, self.label_s / self.ready_s) if self.ready_s else 0.0

    @property
    def succeeded(self) -> bool:
        """Whether this run has labelled anything."""
        return self.counts.done > self.counts.failed

    def crewed(self, crew: Crew, shown: int) -> None:
        """Take note of the workers; of what so many of them do."""
        self.ready, self.starting, self.ready_s = crew.ready, len(crew.loading), crew.ready_s
        self.deaths = crew.deaths
        self.workers = crew.states(shown)

    def left_to_label(self, more: bool) -> str:
        """How many frames that is, and the room that they take, in words; at least so many, if `more` may come."""
        left, labelled = self.counts.left, self.counts.done - self.counts.failed
        needed = "how much that takes is not known yet"
        if labelled and self.bytes:
            needed = f"which takes about {left * self.bytes / labelled / 2**30:.2f} GiB"
        return f"{'at least ' if more else ''}{left} frames left to label, {needed}"

    def planned(self, source: Planned) -> None:
        """One more source is in the store."""
        self.sources += 1
        self.labelled += source.labelled
        total, before = self.counts.total + source.frames, self.counts.before + source.frames - source.frames_left
        self.counts = replace(self.counts, total=total, before=before)

    def committed(self, report: Report) -> None:
        """One more segment is."""
        done, failed = self.counts.done + report.labelled + report.failed, self.counts.failed + report.failed
        self.counts = replace(self.counts, done=done, failed=failed)
        self.labelled += report.labelled
        self.slots += report.slots
        self.filled += report.labelled
        self.label_s += report.label_s
        self.bytes += report.bytes
        for why, frames in report.reasons.items():
            self.count_reason(why, frames)

    def count_reason(self, reason: str, frames: int) -> None:
        """Count failures; a run in which every frame has a reason of its own must not grow without bound."""
        known = reason in self.reasons or len(self.reasons) < _MOST_REASONS
        self.reasons[reason if known else "other reasons"] += frames
