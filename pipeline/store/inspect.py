"""What is in a store: how much, of what, made how."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from depthmill.pipeline.errors import StoreDamagedError
from depthmill.pipeline.store.records import read_run, unopened
from depthmill.pipeline.store.root import METADATA
from depthmill.pipeline.store.store import READERS, Store
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.types import FAILED, LABELLED


@dataclass(frozen=True)
class SourceSummary:
    """One source.

    Attributes:
        id: Name of its group.
        uri: Where it was read from.
        kind: What read it.
        frames: Its frames.
        labelled: Those with labels.
        failed: Those that have none, and why is known; all, where a file that says so is damaged.
        pending: Those that are not committed.
        height: Of its canvas, in pixels.
        width: Of its canvas, in pixels.
        bytes: Of its files.
        smoothing: `none`, `smoothed`, `filtered`, `unfinished`, `stale`, of labels that are others by now, or
            `damaged`.
    """

    id: str
    uri: str
    kind: str
    frames: int
    labelled: int
    failed: int
    pending: int
    height: int
    width: int
    bytes: int
    smoothing: str


@dataclass(frozen=True)
class Inspection:
    """A whole store.

    Attributes:
        store: Its path or URL.
        version: Of the depthmill that made it.
        identity: What decides its labels: checkpoints and their sha256, resolution, dtype.
        layout: How they are laid out.
        kinds: Sources by kind.
        frames: Of all sources.
        labelled: Those with labels.
        failed: Those that have none, and why is known.
        pending: Those that are not committed.
        bytes: Of all files.
        bytes_per_frame: Of the sources' files, by committed frame; 0 if there is none.
        failures: Failed frames by reason, the most frequent first.
        unopened: Inputs of the last run that could not be opened, by reason.
        run: What `run.json` says of the last run that labelled something; empty if none has ended.
        sources: All sources, sorted by id, but for those that are damaged.
        damaged: Those of which nothing can be told: id -> why, and what to do.
    """

    store: str
    version: str
    identity: dict[str, Any]
    layout: dict[str, Any]
    kinds: dict[str, int]
    frames: int
    labelled: int
    failed: int
    pending: int
    bytes: int
    bytes_per_frame: float
    failures: dict[str, int]
    unopened: dict[str, int]
    run: dict[str, Any]
    sources: tuple[SourceSummary, ...]
    damaged: dict[str, str]


def inspect(store: Store) -> Inspection:
    """Look at a store: one listing of all its files, and the status of the sources that have any, many at once."""
    ids = store.sources()
    sizes, committed, begun = Counter[str](), set[str](), set[str]()
    for key, size in store.directory.sizes():
        source_id, _, name = key.partition("/")
        sizes[source_id] += size
        if name.startswith("status/c/"):
            committed.add(source_id)
        elif name == f"temporal/{METADATA}":
            begun.add(source_id)

    def look(source_id: str) -> tuple[SourceSummary, Counter[str]]:
        attributes = store.attributes(source_id)
        status = np.empty(0, np.uint8)
        reasons = Counter[str]()
        try:
            if source_id in committed:
                status = store.status(source_id)
                reasons = Counter(store.reasons(source_id, np.flatnonzero(status == FAILED)))
        except StoreDamagedError as error:
            status = status if status.size else np.full(attributes["frames"], FAILED, np.uint8)
            reasons = Counter({str(error): int((status == FAILED).sum())})
        labelled, failed = (int((status == one).sum()) for one in (LABELLED, FAILED))
        height, width = attributes["size"]
        summary = SourceSummary(
            id=source_id,
            uri=attributes["uri"],
            kind=attributes["kind"],
            frames=attributes["frames"],
            labelled=labelled,
            failed=failed,
            pending=attributes["frames"] - labelled - failed,
            height=height,
            width=width,
            bytes=sizes[source_id],
            smoothing=_smoothing(store, source_id) if source_id in begun else "none",
        )
        return summary, reasons

    with ThreadPoolExecutor(READERS) as pool:
        looked = list(pool.map(look, ids))
    sources = tuple(source for source, _ in looked)
    reasons = Counter[str]()
    for _, of_source in looked:
        reasons += of_source
    done = sum(source.labelled + source.failed for source in sources)
    return Inspection(
        store=store.uri,
        version=store.version,
        identity=store.identity,
        layout=store.layout.document(),
        kinds=dict(Counter(source.kind for source in sources)),
        frames=sum(source.frames for source in sources),
        labelled=sum(source.labelled for source in sources),
        failed=sum(source.failed for source in sources),
        pending=sum(source.pending for source in sources),
        bytes=sizes.total(),
        bytes_per_frame=sum(source.bytes for source in sources) / done if done else 0.0,
        failures=dict(reasons.most_common()),
        unopened=dict(Counter(unopened(store.directory)).most_common()),
        run=read_run(store.directory),
        sources=sources,
        damaged=store.damaged,
    )


def _smoothing(store: Store, source_id: str) -> str:
    temporal = Temporal(store, source_id)
    try:
        if temporal.stale():
            return "stale"
    except StoreDamagedError:
        return "damaged"
    if not temporal.solved():
        return "unfinished"
    return "filtered" if temporal.filtered() else "smoothed"


def as_text(found: Inspection, most: int = 20) -> str:
    """An inspection as lines for people, with the first `most` sources and the `most` most frequent reasons.

    The end of a line in a file's name is none of this text.
    """
    run, layout, identity = found.run, found.layout, found.identity
    labels = [*layout["labels"], *(["uncertainty"] if layout.get("uncertainty") else [])]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.kinds.items()))
    lines = [
        f"store        {found.store}, made by depthmill {found.version}",
        f"labels       {', '.join(labels)}; shards of {layout['shard_frames']} frames, segments of "
        f"{layout['segment_frames']}",
        *(
            f"checkpoint   {modality}: {checkpoint.get('name', '?')}, sha256 {checkpoint.get('sha256', '?')}"
            for modality, checkpoint in sorted(identity.get("checkpoints", {}).items())
        ),
        f"model        {identity.get('processing_resolution', '?')} pixels, {identity.get('dtype', '?')}",
        f"sources      {len(found.sources):,}{f' ({kinds})' if kinds else ''}",
        f"frames       {found.frames:,}: {found.labelled:,} labelled, {found.failed:,} failed, "
        f"{found.pending:,} pending",
        f"size         {found.bytes:,} bytes, {found.bytes_per_frame:,.0f} a committed frame",
    ]
    smoothing = Counter(one.smoothing for one in found.sources if one.smoothing != "none")
    if smoothing:
        lines.append(f"smoothing    {', '.join(f'{count:,} {how}' for how, count in sorted(smoothing.items()))}")
    if run:
        frames = run.get("committed", 0)
        lines.append(
            f"last run     {run.get('started', '?')}: {frames:,} {'frame' if frames == 1 else 'frames'} in "
            f"{run.get('seconds', 0):.1f} s, {run.get('frames_per_s', 0):.4g} frames/s "
            f"({run.get('device') or 'nothing to do'})"
        )
    for title, reasons in (("failed frames", found.failures), ("inputs that could not be opened", found.unopened)):
        if reasons:
            lines += ["", f"{title}, by reason:"]
            lines += [f"  {count:>9,} x {reason}" for reason, count in list(reasons.items())[:most]]
            lines += [f"  and {len(reasons) - most:,} more reasons"] if len(reasons) > most else []
    if found.damaged:
        lines += ["", f"damaged sources, of which nothing else is told: {len(found.damaged):,}"]
        lines += [f"  {why}" for why in list(found.damaged.values())[:most]]
    if found.sources:
        lines += ["", f"{'labelled':>12} {'failed':>9} {'pending':>9} {'canvas':>11} {'bytes':>15}  source"]
        lines += [
            f"{one.labelled:>12,} {one.failed:>9,} {one.pending:>9,} {f'{one.width}x{one.height}':>11} "
            f"{one.bytes:>15,}  {one.id} ({one.uri})"
            for one in found.sources[:most]
        ]
        lines += [f"and {len(found.sources) - most:,} more: --json lists all"] if len(found.sources) > most else []
    return "\n".join(line.replace("\n", "\\x0a") for line in lines)
