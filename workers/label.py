"""`depthmill label`, whole: open everything, plan, run, and say how it went."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import chain
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import ConfigError, RunStoppedError, SourceError
from depthmill.pipeline.job import identity, layout
from depthmill.pipeline.model.backend import default_threads, pick_device, pick_dtype
from depthmill.pipeline.model.checkpoint import Checkpoint, count_weights
from depthmill.pipeline.model.labeler import open_checkpoints
from depthmill.pipeline.plan import Prober
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.stages import fail_task
from depthmill.pipeline.store import Store, create, records
from depthmill.pipeline.types import Failure
from depthmill.pipeline.worker import Worker
from depthmill.workers.driver import Driver
from depthmill.workers.pace import OPEN_FRAMES
from depthmill.workers.pool import InProcess, Pool
from depthmill.workers.progress import Rate, RunConsole, count, open_display, warn
from depthmill.workers.resume import Summary, list_failures, patiently, planned_here
from depthmill.workers.standing import Standing
from depthmill.workers.stopping import stoppable
from depthmill.workers.terms import Calls, Options

if TYPE_CHECKING:
    from depthmill.workers.metrics import Metrics

# What a frame may take if nobody says so, the second of a large network on a CPU: Stable Diffusion 2's takes two cores
# 70 s, and twice that beside another worker.
_LIMIT_S, _SLOW_LIMIT_S, _LARGE = 60.0, 600.0, 100_000_000  # weights
_PROBERS = 4  # sources probed at once: each is mostly waiting for a disk or a network


def label(
    inputs: Sequence[str],
    store_uri: str | Path,
    config: LabelConfig,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    console: Console | None = None,
) -> Summary:
    """Label every frame of the inputs into the store; what an earlier run committed is kept and not done again.

    Args:
        inputs: Videos, pictures, shards, folders, patterns, lists of them.
        store_uri: Where the labels go; made if it does not exist.
        config: Options of the run.
        overwrite: Remove an existing store first.
        retry_failed: Label the frames again that an earlier run failed to, and only those of their segments.
        console: Where progress is shown; by default standard output.

    Raises:
        DepthmillError: If nothing can start: no input can be opened, the checkpoint or the store cannot be used.
        RunStoppedError: On Ctrl-C, SIGTERM or SIGHUP, when workers cannot be kept alive, and when the disk is full or
            the store stays away.
    """
    console = console or RunConsole(highlight=False)
    started, rate, say = datetime.now(UTC), Rate(), partial(warn, console)
    if config.device.startswith("cuda:") and config.workers != 0:
        raise ConfigError(
            f"device is {config.device!r}, but Ray gives each worker a GPU of its own, which is cuda to it; expected "
            f"--workers 0 with it, or CUDA_VISIBLE_DEVICES={config.device.removeprefix('cuda:')} and --device cuda"
        )

    with ExitStack() as stack:
        stopped = stack.enter_context(stoppable())
        gpus = None
        if config.address and config.workers != 0:  # its machines, not this one, decide the dtype of the store
            gpus = stack.enter_context(_cluster(config))
        config = _resolve(config, gpus, say)
        checkpoints = open_checkpoints(config)
        given: Iterable[str] = expand_inputs(inputs)
        if overwrite:
            given = _if_one_is_there(given)
            if gpus is None and config.workers != 0:  # what may not start is started before anything is removed
                stack.enter_context(_cluster(config))
        own_segments = config.segment_frames is None
        decisive = layout(config), identity(config, checkpoints)
        store = create(store_uri, *decisive, overwrite=overwrite, own_segments=own_segments)
        here = None
        if config.workers == 0:  # what is probed here is labelled here
            here = OpenSources(config.max_pixels, config.max_frames)
            stack.callback(here.close)
        prober = Prober(store.uri, config.max_pixels, config.max_frames, retry_failed, here)
        try:
            uris, planned = planned_here(given, store, prober)
        except SourceError:  # of a listing; later ones are waited for
            store.remove_if_empty()
            raise
        clock_s = time.perf_counter()
        with open_display(console, rate) as display:
            digests = tuple(checkpoint.sha256 for checkpoint in checkpoints)
            pool: Pool = InProcess(
                {"labeler": lambda: Worker(config, store.uri, digests, here), "prober": lambda: prober},
                lambda states: display(driver.standing.counts, states),
            )
            metrics: Metrics | None = None
            if config.workers != 0 and (uris is not None or any(source.segments for source in planned)):
                if gpus is None and not overwrite:
                    stack.enter_context(_cluster(config))
                from depthmill.workers.actors import labelers
                from depthmill.workers.metrics import Metrics

                pool, metrics = labelers(config, store.uri, checkpoints, retry_failed), Metrics()
            stack.callback(pool.close)

            def show(standing: Standing) -> None:
                if standing.device:
                    rate.start()
                display(standing.counts, standing.workers)
                if metrics is not None:
                    metrics.update(standing, rate(standing.counts.done))

            def publish(stamps: Mapping[str, str]) -> None:
                store.publish(stamps)
                records.write_stamps(store.directory, stamps)

            driver = Driver(
                pool,
                _options(config, checkpoints),
                Calls(publish, partial(fail_task, store=store), show, say, stopped.is_set),
                uris or (),
                planned,
            )
            try:
                driver.run()
            except KeyboardInterrupt:
                counts = driver.standing.counts
                raise RunStoppedError(
                    f"stopped: {counts.before + counts.done} of {counts.total} frames are committed in {store.uri} and "
                    "stay; run the same command again to go on from there"
                ) from None
        # Before workers are closed, and the store is waited for: that tells nothing of how quick they were.
        seconds, frames_per_s = time.perf_counter() - clock_s, rate(driver.standing.counts.done)
    standing = driver.standing
    if not standing.sources:
        store.remove_if_empty()
        raise SourceError(_nothing(len(driver.inputs.failures)))  # the reasons have been said

    def account() -> tuple[tuple[Failure, ...], int]:
        store.publish(store.sources())  # of two runs that published at once, one may have undone what the other did
        return list_failures(store, driver.inputs.failures, driver.ids)

    failures, others = patiently(account)
    summary = Summary(
        store=store.uri,
        sources=standing.sources,
        frames=standing.counts.total,
        labelled=standing.labelled,
        committed=standing.counts.done,
        failures=failures,
        other_failures=others,
        seconds=seconds,
        frames_per_s=frames_per_s,
        device=standing.device,
        batch_fill=standing.fill,
        busy=standing.busy,
        bytes=standing.bytes,
        deaths=standing.deaths,
        retries=standing.retries,
    )
    patiently(partial(_write_run, summary, store, config, checkpoints, started))
    return summary


def _options(config: LabelConfig, checkpoints: Sequence[Checkpoint]) -> Options:
    if config.workers == 0:  # nothing can be interrupted, and a call's time runs while it waits for the one before it
        return Options(config.attempts, inf, inf, config.workers, _PROBERS, least_limit_s=inf)
    cuda, slow = config.device.startswith("cuda"), config.device == "cpu" and count_weights(checkpoints) > _LARGE
    limit_s = config.frame_limit_s or (_SLOW_LIMIT_S if slow else _LIMIT_S)
    return Options(
        config.attempts,
        frame_limit_s=limit_s * config.steps * config.ensemble,
        open_limit_s=OPEN_FRAMES * (config.frame_limit_s or _LIMIT_S),
        workers=config.workers,
        probers=_PROBERS,
        # Each shape is compiled in the middle of a segment, which can take minutes, and more where many workers do so.
        least_limit_s=30.0 if cuda and config.compile != "off" else 1.0,
        # Workers there round unlike others: by `auto` until each has compiled, in smaller batches once memory ran out.
        race=not cuda,
    )


def _cluster(config: LabelConfig) -> AbstractContextManager[int]:
    from depthmill.workers.cluster import connect

    return connect(config)


def _if_one_is_there(uris: Iterable[str]) -> Iterator[str]:
    """Refuse inputs of which not one exists, before a store is removed for them.

    Raises:
        SourceError: If there is none.
    """
    known: list[str] = []
    remaining = iter(uris)
    for uri in remaining:
        known.append(uri)
        with suppress(SourceError):
            open_source(uri).close()
            return chain(known, remaining)
    raise SourceError(f"{_nothing(len(known))}; the store was left as it was")


def _nothing(inputs: int) -> str:
    return f"{count(inputs, 'input')} given, and none can be used: nothing to label"


def _resolve(config: LabelConfig, gpus: int | None, say: Callable[[str], None]) -> LabelConfig:
    """Settle what was left open: a store is made for one dtype, and every worker rounds alike.

    Args:
        config: As given.
        gpus: Of the cluster; None where this machine does the work.
        say: Told what is waited for.
    """
    if gpus is None:
        device = pick_device(config.device)
    else:
        import torch

        device = torch.device(("cuda" if gpus else "cpu") if config.device == "auto" else config.device)
    if gpus is None or (config.dtype != "auto" and (config.threads or device.type == "cuda")):
        dtype, threads = pick_dtype(config.dtype, device), default_threads()
    else:
        from depthmill.workers.actors import backend_there

        dtype, threads = backend_there(config.dtype, device, say)
    update = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return config.model_copy(update={**update, "threads": config.threads or threads})


def _write_run(
    summary: Summary,
    store: Store,
    config: LabelConfig,
    checkpoints: Sequence[Checkpoint],
    started: datetime,
) -> None:
    """Write `run.json`, unless this run did nothing and an earlier one wrote it."""
    if not summary.committed and records.has_run(store.directory):
        return
    values = asdict(summary) | {
        "failures": len(summary.failures),
        "failures_by_reason": dict(Counter(failure.reason for failure in summary.failures).most_common()),
        "started": started.isoformat(timespec="seconds"),
        "config": config.model_dump(mode="json"),
        "checkpoints": {checkpoint.modality: checkpoint.identity for checkpoint in checkpoints},
        "machine": {"host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {name: version(name) for name in ("depthmill", "torch", "diffusers", "ray", "av", "zarr")},
    }
    records.write_run(store.directory, values)
