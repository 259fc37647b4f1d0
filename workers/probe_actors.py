"""Probers on Ray: they need no model, and so import no torch, which would take most of their start."""

from __future__ import annotations

from depthmill.pipeline.plan import Prober
from depthmill.workers.ray_pool import this_node


class ProbeWorker(Prober):
    """A prober that can say where it is."""

    def node(self) -> str:
        """Id of its machine."""
        return this_node()
