"""A run's figures as Prometheus metrics, served by Ray's own exporter on every node (its metrics export port).

The names here come out with Ray's prefix: `ray_depthmill_frames_total`. Without the `cluster` extra Ray serves none.
"""

from __future__ import annotations

from collections import Counter as Tally
from operator import attrgetter
from typing import Any

from ray.util.metrics import Counter, Gauge

from depthmill.workers.standing import Standing

# Name -> what it is, and where `Standing` has it.
_GAUGES = {
    "frames_left": ("Frames of probed sources that are not committed.", "counts.left"),
    "batch_fill": ("Mean share of a batch that is frames.", "fill"),
    "gpu_busy_share": ("Share of the loaded workers' time that they spent labelling.", "busy"),
    "segments_queued": ("Segments that nobody works on.", "queued"),
    "segments_running": ("Segments under way.", "running"),
    "sources_unprobed": ("Inputs that wait to be probed.", "unprobed"),
    "workers_ready": ("Workers that have loaded.", "ready"),
    "workers_starting": ("Workers asked for that have not.", "starting"),
}
_COUNTERS = {
    "frames_total": ("Frames committed, failed ones included.", "counts.done"),
    "bytes_total": ("Bytes of labels written.", "bytes"),
    "worker_deaths_total": ("Workers that died, or were ended: they could not load, or took too long.", "deaths"),
    "segment_retries_total": ("Attempts at segments beyond the first.", "retries"),
}


class Metrics:
    """The metrics of one run; made in the driver's process, connected to Ray."""

    def __init__(self) -> None:
        """Register all."""
        rate = "Frames committed a second, since the first worker had loaded."
        self._rate = Gauge("depthmill_frames_per_second", rate)
        self._gauges = {where: Gauge(f"depthmill_{name}", text) for name, (text, where) in _GAUGES.items()}
        self._counters = {where: Counter(f"depthmill_{name}", text) for name, (text, where) in _COUNTERS.items()}
        failed = "Frames and sources without labels, by reason."
        self._failed = Counter("depthmill_failed_frames_total", failed, tag_keys=("reason",))
        self._counted: Tally[str] = Tally()
        self._reasons: Tally[str] = Tally()

    def update(self, standing: Standing, frames_per_s: float) -> None:
        """Publish where the run stands."""
        self._rate.set(frames_per_s)
        for where, gauge in self._gauges.items():
            gauge.set(attrgetter(where)(standing))
        for where, counter in self._counters.items():
            _raise(counter, self._counted, where, attrgetter(where)(standing), {})
        for reason, total in standing.reasons.items():
            _raise(self._failed, self._reasons, reason, total, {"reason": reason})


def _raise(counter: Any, counted: Tally[str], key: str, total: int, tags: dict[str, str]) -> None:
    """Bring a counter up to a total; Ray takes increments, and none of zero."""
    if total > counted[key]:
        counter.inc(total - counted[key], tags)
        counted[key] = total
