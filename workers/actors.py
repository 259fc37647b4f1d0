"""Ray actors: a `stages.Worker` each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.stages import Worker


def start_worker(config: LabelConfig, store: Path, digests: tuple[str, ...]) -> Any:
    """Ask the cluster for a worker; returns the actor's handle at once, before there is one.

    Ray must not restart it by itself: the driver counts the attempts at a segment, and replaces dead workers. A second
    thread answers `state` while the first labels.
    """
    gpu = config.device.startswith("cuda")
    actor = ray.remote(Worker).options(
        num_cpus=1, num_gpus=1 if gpu else 0, max_restarts=0, max_task_retries=0, max_concurrency=2
    )
    return actor.remote(config, store, digests)
