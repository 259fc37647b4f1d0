"""`depthmill label`, whole: open everything, plan, run, and say how it went."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import RunStoppedError, SourceError
from depthmill.pipeline.model.checkpoint import Checkpoint
from depthmill.pipeline.model.labeler import open_checkpoints, pick_device, pick_dtype
from depthmill.pipeline.plan import pending_tasks, probe_inputs
from depthmill.pipeline.store import Layout, create, write_atomically, write_failures
from depthmill.pipeline.types import LABELLED, Failure
from depthmill.workers.driver import Run, run_in_process, run_on_ray, stoppable
from depthmill.workers.progress import Counts, Rate, open_display

_MOST_THREADS = 8


@dataclass(frozen=True)
class Summary:
    """How a run ended; `run.json` in the store holds the same.

    Attributes:
        store: Path of the store.
        sources: Inputs that could be opened.
        frames: Their frames.
        labelled: Frames with labels, earlier runs' included.
        committed: Frames that this run committed, with labels or as failed.
        failures: What has no labels, and why: frames, and inputs that could not be opened.
        seconds: Of this run, from the start of the first worker.
        frames_per_s: Of this run, since the first worker had loaded.
        device: Where the model ran and in what dtype; empty if nothing was left to do.
        workers: Ray workers; 0 in-process.
    """

    store: Path
    sources: int
    frames: int
    labelled: int
    committed: int
    failures: tuple[Failure, ...]
    seconds: float
    frames_per_s: float
    device: str
    workers: int


def label(
    inputs: Sequence[str],
    store_path: Path,
    config: LabelConfig,
    *,
    overwrite: bool = False,
    console: Console | None = None,
) -> Summary:
    """Label every frame of the inputs into the store; what an earlier run committed is kept and not done again.

    Args:
        inputs: Videos, pictures, folders of pictures, globs.
        store_path: Where the labels go; made if it does not exist.
        config: Options of the run.
        overwrite: Remove an existing store first.
        console: Where progress is shown; by default standard output.

    Raises:
        DepthmillError: If nothing can start: no input can be opened, the checkpoint or the store cannot be used.
        RunStoppedError: On Ctrl-C or SIGTERM, and when workers cannot be kept alive.
    """
    console = console or Console(highlight=False)
    started, rate = datetime.now(UTC), Rate()
    with ExitStack() as stack:
        gpus = None
        if config.address:  # its GPUs, not this machine's, decide the dtype that the store is made with
            from depthmill.workers.cluster import connect

            gpus = stack.enter_context(connect(config))
        config = _resolve(config, gpus)
        checkpoints = open_checkpoints(config)
        sources, unopened = probe_inputs(inputs, config.max_pixels)
        for failure in unopened:
            console.print(f"left out: {failure.reason}", style="yellow", soft_wrap=True, markup=False)
        if not sources:
            raise SourceError(f"none of the {len(unopened)} inputs can be opened: nothing to label")
        store = create(store_path, _layout(config), _identity(config, checkpoints), overwrite=overwrite)
        store.add(*sources)
        todo = pending_tasks(store, sources)
        frames = sum(source.frames for source in sources)
        counts = Counts(total=frames, before=frames - sum(task.segment.frames for task in todo))
        workers = 0
        device = ""
        clock_s = time.perf_counter()
        if todo:
            if gpus is None and config.workers != 0:
                from depthmill.workers.cluster import connect

                gpus = stack.enter_context(connect(config))
            digests = tuple(checkpoint.sha256 for checkpoint in checkpoints)
            with open_display(console, rate) as display:
                run = Run(config, store, digests, deque(todo), counts, display, rate)
                try:
                    with stoppable(run):
                        if gpus is None:
                            run_in_process(run)
                        else:
                            workers = min(config.workers or gpus or 1, len(todo))
                            run_on_ray(run, workers)
                except KeyboardInterrupt:
                    kept = run.counts.before + run.counts.done
                    raise RunStoppedError(
                        f"stopped: {kept} of {frames} frames are committed in {store_path} and stay; "
                        "run the same command again to go on from there"
                    ) from None
            counts, device = run.counts, run.device
        seconds = time.perf_counter() - clock_s
    write_failures(store, unopened)
    summary = Summary(
        store=store_path,
        sources=len(sources),
        frames=frames,
        labelled=sum(int((store.status(source.id) == LABELLED).sum()) for source in sources),
        committed=counts.done,
        failures=(*unopened, *store.failures()),
        seconds=seconds,
        frames_per_s=rate(counts.done),
        device=device,
        workers=workers,
    )
    if todo or not (store_path / "run.json").exists():
        _write_run(summary, config, checkpoints, started)
    return summary


def _resolve(config: LabelConfig, gpus: int | None) -> LabelConfig:
    """Settle what was left open: a store is made for one dtype, and every worker rounds alike.

    Args:
        config: As given.
        gpus: Of the cluster; None where this machine does the work.
    """
    if gpus is None:
        device = pick_device(config.device)
    else:
        import torch

        device = torch.device(("cuda" if gpus else "cpu") if config.device == "auto" else config.device)
    dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    threads = config.threads or min(os.cpu_count() or 1, _MOST_THREADS)
    return config.model_copy(update={"device": str(device), "dtype": dtype, "threads": threads})


def _layout(config: LabelConfig) -> Layout:
    return Layout(
        labels=config.labels,
        shard_frames=config.shard_frames,
        segment_frames=config.segment_frames,
        normals_dtype=config.normals_dtype,
        uncertainty=config.ensemble > 1 and "depth" in config.labels,
    )


def _identity(config: LabelConfig, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What decides the labels: a run with another identity is not mixed into a store.

    Batch size, threads and the kind of device are not in it: they change float rounding alone.
    """
    sampling = config.sampling
    return {
        "checkpoints": {checkpoint.modality: checkpoint.identity for checkpoint in checkpoints},
        "processing_resolution": config.processing_resolution or checkpoints[0].processing_resolution,
        "dtype": config.dtype,
        **({} if sampling.is_single_step else {"sampling": sampling.identity}),
    }


def _write_run(summary: Summary, config: LabelConfig, checkpoints: Sequence[Checkpoint], started: datetime) -> None:
    reasons = Counter(failure.reason for failure in summary.failures)
    values = asdict(summary) | {
        "store": str(summary.store),
        "failures": len(summary.failures),
        "failures_by_reason": dict(reasons.most_common()),
        "started": started.isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "checkpoints": {checkpoint.modality: checkpoint.identity for checkpoint in checkpoints},
        "machine": {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {name: version(name) for name in ("depthmill", "torch", "diffusers", "ray", "av", "zarr")},
    }
    write_atomically(summary.store / "run.json", (json.dumps(values, indent=2) + "\n").encode())
