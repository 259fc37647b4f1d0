"""Labelling on Ray: actors, each a `worker.Worker`; and the probers beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from depthmill.pipeline.config import DEMO, LabelConfig
from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.model.backend import pick_dtype
from depthmill.pipeline.store.files import located
from depthmill.pipeline.worker import Worker
from depthmill.workers.causes import reason
from depthmill.workers.probe_actors import ProbeWorker
from depthmill.workers.ray_pool import RayPool, remote, this_node

_PATIENCE_S = 20.0  # before it is said what is waited for


class LabelWorker(Worker):
    """A worker that can say where it is."""

    def node(self) -> str:
        """Id of its machine."""
        return this_node()


def labelers(config: LabelConfig, store: str, digests: tuple[str, ...], retry_failed: bool) -> RayPool:
    """A pool of workers that label, and of probers.

    Args:
        config: The run's, `device`, `dtype` and `threads` settled.
        store: Where the store is.
        digests: sha256 of the run's checkpoints.
        retry_failed: Whether frames that failed in earlier runs are planned again.
    """
    gpu = config.device.startswith("cuda")
    store, config = located(store), config.model_copy(update=_located_checkpoints(config))
    labeler = remote(LabelWorker, max_concurrency=2, **_room(gpu))
    prober = remote(ProbeWorker, num_cpus=0, scheduling_strategy="SPREAD")
    limits = (config.max_pixels, config.max_frames, retry_failed)
    return RayPool(
        {
            "labeler": lambda: labeler.remote(config, store, digests),
            "prober": lambda: prober.remote(store, *limits),
        },
        per="GPU" if gpu else "machine",
    )


def _located_checkpoints(config: LabelConfig) -> dict[str, str]:
    """Checkpoints that are folders here, by their whole paths: workers have a working directory of their own."""
    given = {"checkpoint": config.checkpoint, "normals_checkpoint": config.normals_checkpoint or DEMO}
    return {key: str(Path(name).absolute()) for key, name in given.items() if name != DEMO and Path(name).is_dir()}


def dtype_there(device: torch.device, say: Callable[[str], None]) -> torch.dtype:
    """What `auto` stands for on a cluster, as the first machine has it that has room for a worker.

    It is waited for, however long all are busy, as the run's workers would be: a guess would stay in the store.

    Args:
        device: Of the workers.
        say: Told, after a while, what is waited for.

    Raises:
        ConfigError: If none can tell.
    """
    gpu = device.type == "cuda"
    asked = ray.remote(pick_dtype).options(**_room(gpu)).remote("auto", device)
    if not ray.wait([asked], timeout=_PATIENCE_S)[0]:
        say(
            f"waiting for a free {'GPU' if gpu else 'core'} of the cluster, to ask for the dtype that is best there; "
            "--dtype (on GPUs bfloat16, before 2020 float16; on CPUs float32) starts without"
        )
    try:
        answer: torch.dtype = ray.get(asked)
    except RayError as error:
        raise ConfigError(
            f"the cluster's machines cannot tell what dtype is best there ({reason(error)}); expected the same Python, "
            "Ray and depthmill on each: install them, or give --dtype"
        ) from error
    return answer


def _room(gpu: bool) -> dict[str, Any]:
    """What a labeler asks of a cluster.

    Ray packs actors onto few machines if they do not say otherwise; on CPUs, one takes up a whole machine.
    """
    return {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "scheduling_strategy": "DEFAULT" if gpu else "SPREAD"}
