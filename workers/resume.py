"""What earlier runs left of a job: whether a store is this job's, and whether anything is left to do.

Without the libraries that the network needs, whose import takes most of the time in which a finished job says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import (
    DepthmillError,
    RunStoppedError,
    SourceError,
    StoreClosedError,
    StoreDamagedError,
    StoreError,
)
from depthmill.pipeline.job import identity, layout
from depthmill.pipeline.model.checkpoint import open_named
from depthmill.pipeline.objects import without_secrets
from depthmill.pipeline.plan import Planned, Prober
from depthmill.pipeline.sources import expand_inputs, source_id
from depthmill.pipeline.store import Store, create, open_store, records
from depthmill.pipeline.store.store import READERS
from depthmill.pipeline.types import Failure
from depthmill.workers.pace import Rests

logger = logging.getLogger(__name__)

_PROBED_HERE = 16
_LOOKED_AT_HERE = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """How a run ended; `run.json` in the store holds the same.

    Attributes:
        store: Where the store is.
        sources: Inputs that could be opened.
        frames: Their frames.
        labelled: Frames with labels, earlier runs' included.
        committed: Frames that this run committed, with labels or as failed.
        failures: What has no labels, and why: frames of the run's sources, and inputs that could not be opened.
        other_failures: Frames without labels of other sources in the store.
        seconds: Of this run, from the first input on.
        frames_per_s: Of this run, since the first worker had loaded.
        device: Where the model ran and in what dtype; empty if nothing was left to do.
        batch_fill: Mean share of a batch that was frames.
        busy: Share of the loaded workers' time that they spent labelling.
        bytes: Written.
        deaths: Workers that died, or were ended: they could not load, or took too long.
        retries: Attempts at segments beyond the first.
    """

    store: str
    sources: int
    frames: int
    labelled: int
    committed: int
    failures: tuple[Failure, ...]
    other_failures: int
    seconds: float
    frames_per_s: float = 0.0
    device: str = ""
    batch_fill: float = 0.0
    busy: float = 0.0
    bytes: int = 0
    deaths: int = 0
    retries: int = 0


def finished(
    inputs: Sequence[str], store_uri: str | Path, config: LabelConfig, *, retry_failed: bool = False
) -> Summary | None:
    """How a job stands of which an earlier run left nothing to do; None if there may be something, or is a problem.

    What is wrong with a job is for `label` to say. A dtype that is left open is the store's: nothing is computed.

    Args:
        inputs: As for `label`.
        store_uri: As for `label`.
        config: As for `label`.
        retry_failed: As for `label`.
    """
    started_s = time.perf_counter()
    try:
        store = open_store(store_uri, index=False)
        if not records.has_run(store.directory):  # the earlier run did not come to its end
            return None
        checkpoints = open_named(config)
        if config.dtype == "auto":
            config = config.model_copy(update={"dtype": store.identity.get("dtype")})
        decisive = layout(config), identity(config, checkpoints)  # another job's store is refused
        store = create(store_uri, *decisive, own_segments=config.segment_frames is None)
        prober = Prober(store.uri, config.max_pixels, config.max_frames, retry_failed)
        uris, planned = planned_here(expand_inputs(inputs), store, prober)
        sources = {source.id: source for source in planned}
        if uris is not None or not sources or any(source.segments for source in planned):
            return None
        store.publish(sources)
        with suppress(StoreError):  # it may be where nothing can be written
            records.write_stamps(store.directory, {source.id: source.stamp for source in planned})
        failures, others = list_failures(store, (), sources)
    except DepthmillError:
        return None
    return Summary(
        store=store.uri,
        sources=len(sources),
        frames=sum(source.frames for source in sources.values()),
        labelled=sum(source.labelled for source in sources.values()),
        committed=0,
        failures=failures,
        other_failures=others,
        seconds=time.perf_counter() - started_s,
    )


def planned_here(uris: Iterable[str], store: Store, prober: Prober) -> tuple[Iterator[str] | None, list[Planned]]:
    """Plan in this process what needs no worker: to find a finished run finished none is started.

    That is what has nothing left to be done and is as it was; and, if few others are left and all are in the store,
    those: a broken file may take the process along that probes it, but they have been probed before.

    Returns:
        The inputs that are left to be probed, None if there are none, and those that are planned.

    Raises:
        SourceError: If object storage does not say what is there.
    """
    prober.load()
    remaining = iter(uris)
    looked_at = list(islice(remaining, _PROBED_HERE + min(prober.known, _LOOKED_AT_HERE)))
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(partial(_finished, prober), looked_at))
    planned = [one for one in found if one is not None]
    left = [uri for uri, one in zip(looked_at, found, strict=True) if one is None]
    more = list(islice(remaining, 1))
    with suppress(SourceError, StoreError):  # gone, or changed, or away: for the driver to tell, or to wait for
        if not more and len(left) <= _PROBED_HERE and all(store.has(source_id(uri)) for uri in left):
            return None, planned + [prober.probe(uri) for uri in left]
    return chain(left, more, remaining), planned


def _finished(prober: Prober, uri: str) -> Planned | None:
    with suppress(SourceError, StoreError):  # likewise
        return prober.finished(uri)
    return None


def unsmoothed_videos(inputs: Sequence[str], store_uri: str | Path) -> list[str]:
    """Ids of the videos among a run's inputs that are labelled, and not smoothed since, with whatever options.

    What signs an input's URL is kept for this process, to smooth by: the store does not know it.

    Raises:
        RunStoppedError: If the store does not answer, or object storage does not say which inputs there are.
    """
    return patiently(partial(_unsmoothed, inputs, store_uri))


def _unsmoothed(inputs: Sequence[str], store_uri: str | Path) -> list[str]:
    store = open_store(store_uri)
    there = set(store.sources())
    uris = map(without_secrets, expand_inputs(inputs))
    ids = [one for one in dict.fromkeys(map(source_id, uris)) if one in there]
    videos = [one for one in ids if store.attributes(one)["kind"] == "video"]
    with ThreadPoolExecutor(READERS) as pool:
        smoothed = pool.map(partial(_is_smoothed, store), videos)
        return [one for one, done in zip(videos, smoothed, strict=True) if not done]


def _is_smoothed(store: Store, source_id: str) -> bool:
    """Whether a video is smoothed, and no picture was missing."""
    from depthmill.pipeline.store.temporal import Temporal

    temporal = Temporal(store, source_id)
    try:
        whole = temporal.current() and not temporal.unread("edges")
        return whole and not (temporal.filtered() and temporal.unread("filter"))
    except StoreDamagedError:
        return False


def list_failures(
    store: Store, unopened: Iterable[Failure], source_ids: Container[str]
) -> tuple[tuple[Failure, ...], int]:
    """Write `failures.jsonl`, of the whole store; what of it is a run's own, and how many others there are.

    Args:
        store: The store.
        unopened: Inputs of the run that could not be opened.
        source_ids: Its sources.
    """
    unopened = tuple(unopened)
    told = {text for failure in unopened for text in (failure.uri, failure.reason)}
    found = [one for one in store.failures() if one.frame is not None or not {one.uri, one.reason} & told]
    for one in found:
        if one.source_id in store.damaged:
            logger.warning("%s", one.reason)
    records.write_failures(store.directory, (*unopened, *found))
    own = [failure for failure in found if failure.source_id in source_ids]
    return (*unopened, *own), len(found) - len(own)


def patiently(do: Callable[[], T]) -> T:
    """Do something with the store of a run whose labels are all committed; again, after rests, if it does not answer.

    Raises:
        RunStoppedError: If it, or what lists the run's inputs, does not for long, or cannot.
    """
    rests = Rests()
    while True:
        try:
            return do()
        except (SourceError, StoreError) as error:
            if isinstance(error, StoreClosedError | StoreDamagedError) or not rests.begin(now_s := time.monotonic()):
                raise RunStoppedError(
                    f"{error}\nAll frames are committed and stay, but what follows is not done: see to the store, then "
                    "run the same command again"
                ) from error
        time.sleep(rests.until_s - now_s)
