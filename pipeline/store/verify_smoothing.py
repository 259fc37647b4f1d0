"""Check that what smoothing wrote of a source is there and decodes; un-commit what is not.

It has no checksums: it can be made again of the labels, which have them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from depthmill.pipeline.errors import StoreDamagedError, StoreError, check_memory
from depthmill.pipeline.store.layout import Document, file_key, rows_per_file
from depthmill.pipeline.store.metadata import wrong_document
from depthmill.pipeline.store.root import METADATA
from depthmill.pipeline.store.shard import decode_rows
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.store.temporal import NO_LABELS, Temporal
from depthmill.pipeline.types import Segment

Found = tuple[str, int, int, str]  # key of a file, first frame, one past the last, what is wrong


def verify_smoothing(store: Store, source_id: str, *, repair: bool) -> Iterator[Found]:
    """What is wrong with the smoothing of one source; nothing if it has none.

    Args:
        store: The store.
        source_id: The source.
        repair: Un-commit it, so that the next `depthmill smooth` makes it again.
    """
    temporal = Temporal(store, source_id)
    frames = store.attributes(source_id)["frames"]
    try:
        if temporal.attributes() is None:
            return
    except StoreDamagedError:
        if repair:
            temporal.remove()
        yield f"{source_id}/temporal/{METADATA}", 0, frames, "is no JSON of a group"
        return
    segments = store.segments(source_id)
    pending = {what: set(temporal.pending(what)) for what in ("edges", "filter")}
    labels = [f"{name}_smooth" for name in store.layout.labels]
    arrays = temporal.documents(_edge_shape(store, source_id))
    arrays |= temporal.filter_documents() if len(pending["filter"]) < len(segments) else {}
    keys = {f"{source_id}/{name}/{METADATA}": array for name, array in arrays.items()}
    broken = {key: why for key, array in keys.items() if (why := wrong_document(store.directory.read(key), array))}
    if broken:  # they are written when the group is made, and never again
        if repair:
            temporal.remove()
        yield from ((key, 0, frames, why) for key, why in broken.items())
        return
    everything = Segment(source_id, 0, frames)
    if temporal.solved():
        solution = ("temporal/scale", "temporal/shift", "temporal/shot")
        found = [one for name in solution for one in _wrong(store, name, arrays[name], everything)]
        if found and repair:
            temporal.uncommit_solution()
            pending["filter"] = set(segments)
        yield from found
    for what, names in (("edges", ["temporal/score", "temporal/edges"]), ("filter", ["temporal/filtered", *labels])):
        for segment in segments:
            if segment in pending[what]:
                continue
            found = [one for name in names for one in _wrong(store, name, arrays[name], segment)]
            if found and repair:
                temporal.uncommit(what, segment)
            yield from found


def _wrong(store: Store, name: str, array: Document, rows: Segment) -> Iterator[Found]:
    """The files of an array that hold these rows and are missing, or cannot be decoded."""
    length = rows_per_file(array)
    for start in range(rows.start, rows.stop, length):
        stop = min(start + length, rows.stop)
        key = file_key(rows.source_id, name, array, start)
        try:
            data = store.directory.read(key)
            if data is not None:
                decode_rows(data, array, slice(None))
            reason = "" if data or not _needed(store, name, rows.source_id, start, stop) else "is missing"
        except StoreError:
            raise
        except Exception as error:  # whatever codecs raise of broken bytes
            check_memory(error)
            reason = f"cannot be decoded: {type(error).__name__}: {error}"
        if reason:
            yield key, start, stop, reason


def _edge_shape(store: Store, source_id: str) -> tuple[int, int]:
    """Gaps and fields of an edge, which are of the options that it was made with; none if nothing says so."""
    try:
        _, gaps, fields = json.loads(store.directory.read(f"{source_id}/temporal/edges/{METADATA}") or b"")["shape"]
    except (ValueError, KeyError, TypeError):
        return 0, 0
    return gaps, fields


def _needed(store: Store, name: str, source_id: str, start: int, stop: int) -> bool:
    """Whether a file cannot be all fill, which is no file: scores of nothing but 0 can, and frames without labels."""
    if name == "temporal/score":
        return False
    if not name.endswith("_smooth"):
        return True
    codes = np.asarray(store.array(source_id, "temporal/filtered")[start:stop])
    return bool((codes != NO_LABELS).any())
