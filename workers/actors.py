"""Labelling on Ray: actors, each a `worker.Worker` or a `plan.Prober`."""

from __future__ import annotations

import ray

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.plan import Prober
from depthmill.pipeline.worker import Worker
from depthmill.workers.ray_pool import RayPool, remote


class LabelWorker(Worker):
    """A worker that can say where it is."""

    def node(self) -> str:
        """Id of its machine."""
        return str(ray.get_runtime_context().get_node_id())


def labelers(config: LabelConfig, store: str, digests: tuple[str, ...], retry_failed: bool) -> RayPool:
    """A pool of workers that label, and of probers.

    Args:
        config: The run's, `device`, `dtype` and `threads` settled.
        store: Where the store is.
        digests: sha256 of the run's checkpoints.
        retry_failed: Whether frames that failed in earlier runs are planned again.
    """
    gpu = config.device.startswith("cuda")
    # Ray packs actors onto few machines if they do not say otherwise; on CPUs, one takes up a whole machine.
    strategy = "DEFAULT" if gpu else "SPREAD"
    labeler = remote(LabelWorker, num_cpus=1, num_gpus=1 if gpu else 0, max_concurrency=2, scheduling_strategy=strategy)
    prober = remote(Prober, num_cpus=0, scheduling_strategy="SPREAD")
    limits = (config.max_pixels, config.max_frames, retry_failed)
    return RayPool(
        {
            "labeler": lambda: labeler.remote(config, store, digests),
            "prober": lambda: prober.remote(store, *limits),
        },
        per="GPU" if gpu else "machine",
    )
