"""Probers on Ray: they need no model, and so import no torch, which would take most of their start."""

from __future__ import annotations

from depthmill.pipeline.plan import Prober
from depthmill.workers.ray_pool import OnRay


class ProbeWorker(OnRay, Prober):
    """A prober, as an actor."""
