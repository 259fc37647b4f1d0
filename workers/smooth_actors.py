"""Smoothing on Ray: actors that need no model, and so import no torch."""

from __future__ import annotations

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.smoothing.stage import Smoother
from depthmill.pipeline.store.files import located
from depthmill.workers.ray_pool import OnRay, RayPool, remote, total


class SmoothWorker(OnRay, Smoother):
    """A worker that smooths, as an actor."""


def smoothers(config: SmoothConfig, store: str) -> RayPool:
    """A pool of workers that smooth: a core each."""
    smoother = remote(SmoothWorker, num_cpus=1, max_concurrency=2)
    return RayPool({"labeler": lambda: smoother.remote(config, located(store))}, total("CPU"))
