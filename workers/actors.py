"""Labelling on Ray: actors, each a `worker.Worker`; and the probers beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from depthmill.pipeline.config import DEMO, LabelConfig
from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.model.backend import default_threads, pick_dtype
from depthmill.pipeline.model.checkpoint import Checkpoint, count_weights
from depthmill.pipeline.store.files import located
from depthmill.pipeline.worker import Worker
from depthmill.workers.causes import reason
from depthmill.workers.probe_actors import ProbeWorker
from depthmill.workers.ray_pool import Machines, OnRay, RayPool, last_line, remote, total

_BESIDE_WEIGHTS = 2 << 30  # bytes
_PATIENCE_S = 20.0  # before it is said what is waited for


class LabelWorker(OnRay, Worker):
    """A worker that labels, as an actor."""


def labelers(config: LabelConfig, store: str, checkpoints: Sequence[Checkpoint], retry_failed: bool) -> RayPool:
    """A pool of workers that label, and of probers.

    Args:
        config: The run's, `device`, `dtype` and `threads` settled.
        store: Where the store is.
        checkpoints: The run's, whose sha256 each worker compares with what it finds.
        retry_failed: Whether frames that failed in earlier runs are planned again.
    """
    gpu = config.device.startswith("cuda")
    digests = tuple(checkpoint.sha256 for checkpoint in checkpoints)
    # A GPU that Ray does not count, as Apple's, has room for one.
    memory = _memory(config, checkpoints) if config.device == "cpu" else inf
    store, config = located(store), config.model_copy(update=_located_checkpoints(config))
    labeler = remote(LabelWorker, max_concurrency=2, **_room(gpu))
    prober = remote(ProbeWorker, num_cpus=0, scheduling_strategy="SPREAD")
    limits = (config.max_pixels, config.max_frames, retry_failed)
    return RayPool(
        {"labeler": lambda: labeler.remote(config, store, digests), "prober": lambda: prober.remote(store, *limits)},
        total("GPU") if gpu else partial(_fit, config.threads or 1, memory),
    )


def _fit(threads: int, memory: float, machines: Machines) -> int:
    """How many labelers there is room for on machines without GPUs; one on each that offers a core, at least.

    Ray spreads them evenly, so the machine that has room for the fewest decides for all.

    Args:
        threads: Of each labeler's network.
        memory: Bytes of each labeler.
        machines: What each has.
    """
    rooms = [
        min(machine["CPU"] // threads, machine.get("memory", inf) // memory)
        for machine in machines
        if machine.get("CPU", 0) >= 1  # a head often offers none
    ]
    return len(rooms) * max(1, int(min(rooms, default=0)))


def _memory(config: LabelConfig, checkpoints: Sequence[Checkpoint]) -> int:
    """Bytes that a labeler may take on a CPU.

    Generously: of Stable Diffusion 2's size, depth of 768x768, it took 5.9 GB in bfloat16 and 7.9 in float32, where
    this says 7.8 and 13.5.
    """
    return _BESIDE_WEIGHTS + 3 * count_weights(checkpoints) * int(getattr(torch, config.dtype).itemsize)


def _located_checkpoints(config: LabelConfig) -> dict[str, str]:
    """Checkpoints that are folders here, by their whole paths: workers have a working directory of their own."""
    given = {"checkpoint": config.checkpoint, "normals_checkpoint": config.normals_checkpoint or DEMO}
    return {key: str(Path(name).absolute()) for key, name in given.items() if name != DEMO and Path(name).is_dir()}


def backend_there(dtype: str, device: torch.device, say: Callable[[str], None]) -> tuple[torch.dtype, int]:
    """What a dtype (`auto`) and the default threads are on a cluster, by its first machine with room for a worker.

    It is waited for, however long all are busy, as the run's workers would be: a guess would stay in the store.

    Args:
        dtype: As the configuration has it.
        device: Of the workers.
        say: Told, after a while, what is waited for.

    Raises:
        ConfigError: If none can tell.
    """
    gpu = device.type == "cuda"
    asked = ray.remote(_backend_here).options(**_room(gpu)).remote(dtype, device)
    if not ray.wait([asked], timeout=_PATIENCE_S)[0]:
        say(
            "waiting for a free GPU of the cluster, to ask for the dtype that is best there; --dtype (bfloat16, before "
            "2020 float16) starts without"
            if gpu
            else "waiting for a free core of the cluster, to ask for the dtype and the number of threads that are best "
            "there; --dtype (float32) and --threads start without"
        )
    try:
        answer: tuple[torch.dtype, int] = ray.get(asked)
    except RayError as error:
        why = reason(last_line(error) if "failed to import" in str(error) else error)
        raise ConfigError(
            f"the cluster's machines cannot tell what dtype is best there ({why}); expected the same Python, Ray and "
            "depthmill on each: install them, or give --dtype (and --threads on CPUs)"
        ) from error
    return answer


def _backend_here(dtype: str, device: torch.device) -> tuple[torch.dtype, int]:
    return pick_dtype(dtype, device), default_threads()


def _room(gpu: bool) -> dict[str, Any]:
    """What a labeler asks of a cluster.

    Ray packs actors onto few machines if they do not say otherwise; on CPUs, one takes up many of a machine's cores.
    """
    return {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "scheduling_strategy": "DEFAULT" if gpu else "SPREAD"}
