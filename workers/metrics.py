"""A run's figures as Prometheus metrics, served by Ray's own exporter on every node (its metrics export port).

The names here come out with Ray's prefix: `ray_depthmill_frames_total`. Without the `cluster` extra Ray serves none.
"""

from __future__ import annotations

from collections import Counter as Tally
from typing import Any

from ray.util.metrics import Counter, Gauge

from depthmill.workers.standing import Standing

_GAUGES = {
    "frames_per_second": "Frames committed a second, since the first worker had loaded.",
    "frames_left": "Frames of probed sources that are not committed.",
    "batch_fill": "Mean share of a batch that is frames.",
    "gpu_busy_share": "Share of the loaded workers' time that they spent labelling.",
    "segments_queued": "Segments that nobody works on.",
    "segments_running": "Segments under way.",
    "sources_unprobed": "Inputs that wait to be probed.",
    "workers_ready": "Workers that have loaded.",
    "workers_starting": "Workers asked for that have not.",
}
_COUNTERS = {
    "frames_total": "Frames committed, failed ones included.",
    "bytes_total": "Bytes of labels written.",
    "worker_deaths_total": "Workers that died, or were ended: they could not load, or took too long.",
    "segment_retries_total": "Attempts at segments beyond the first.",
}


class Metrics:
    """The metrics of one run; made in the driver's process, connected to Ray."""

    def __init__(self) -> None:
        """Register all."""
        self._gauges = {name: Gauge(f"depthmill_{name}", text) for name, text in _GAUGES.items()}
        self._counters = {name: Counter(f"depthmill_{name}", text) for name, text in _COUNTERS.items()}
        failed = "Frames and sources without labels, by reason."
        self._failed = Counter("depthmill_failed_frames_total", failed, tag_keys=("reason",))
        self._counted: Tally[str] = Tally()
        self._reasons: Tally[str] = Tally()

    def update(self, standing: Standing, frames_per_s: float) -> None:
        """Publish where the run stands."""
        counts = standing.counts
        now: dict[str, float] = {
            "frames_per_second": frames_per_s,
            "frames_left": counts.total - counts.before - counts.done,
            "batch_fill": standing.fill,
            "gpu_busy_share": standing.busy,
            "segments_queued": standing.queued,
            "segments_running": standing.running,
            "sources_unprobed": standing.unprobed,
            "workers_ready": standing.ready,
            "workers_starting": standing.starting,
        }
        for name, value in now.items():
            self._gauges[name].set(value)
        totals = {
            "frames_total": counts.done,
            "bytes_total": standing.bytes,
            "worker_deaths_total": standing.deaths,
            "segment_retries_total": standing.retries,
        }
        for name, total in totals.items():
            _raise(self._counters[name], self._counted, name, total, {})
        for reason, total in standing.reasons.items():
            _raise(self._failed, self._reasons, reason, total, {"reason": reason})


def _raise(counter: Any, counted: Tally[str], key: str, total: int, tags: dict[str, str]) -> None:
    """Bring a counter up to a total; Ray takes increments, and none of zero."""
    if total > counted[key]:
        counter.inc(total - counted[key], tags)
        counted[key] = total
