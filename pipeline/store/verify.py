"""Check that what is committed is there, decodes, and is what was written; un-commit what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import check_memory
from depthmill.pipeline.store.checked import decoded, wrong
from depthmill.pipeline.store.files import json_bytes, store_away
from depthmill.pipeline.store.layout import Document, file_key, group_document, rows_per_file, segment_files
from depthmill.pipeline.store.metadata import difference, parsed, source_attributes_of, wrong_document
from depthmill.pipeline.store.root import METADATA, Root, read_header, read_root, source_members, write_root
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.store.verify_smoothing import verify_smoothing
from depthmill.pipeline.types import FAILED, LABELLED, Segment

_AT_ONCE_BYTES = 16 * 2**20  # of files that a worker has in memory: enough that requests go out many at a time


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was committed.

    Attributes:
        source_id: Of which source.
        start: First frame that it concerns.
        stop: One past the last; 0 where nothing tells how many there are.
        file: Its key in the store.
        reason: What is wrong with it.
        repaired: Whether the next run of `depthmill label`, or `smooth`, will mend it, or it is mended.
    """

    source_id: str
    start: int
    stop: int
    file: str
    reason: str
    repaired: bool = False


@dataclass(frozen=True)
class Verified:
    """What was checked.

    Attributes:
        sources: Sources that could be looked at.
        segments: Committed segments.
        files: Files of labels that were read.
        bytes: Of those files.
        damage: What was found, by source and frame.
    """

    sources: int
    segments: int
    files: int
    bytes: int
    damage: tuple[Damage, ...]


def verify(store: Store, *, repair: bool = False, workers: int = 8) -> Verified:
    """Read every file of every committed segment.

    While a store is being written, segments that are committed meanwhile may be left out, and those whose failed frames
    are being labelled again may look damaged. What is removed by hand meanwhile is neither damaged nor made again.

    Args:
        store: The store.
        repair: Un-commit segments with damage, so that the next run labels them again, and all smoothing of their
            sources; write damaged metadata anew.
        workers: Threads that read segments; as many look at sources.

    Raises:
        StoreError: If it cannot be read, or is not there any more at the end.
    """
    ids = store.sources()
    root = _root(store)
    lines: dict[str, str] = {}  # of the root, as they should be
    # Sources and segments have threads of their own: there may be many small sources, or one that is huge.
    with ThreadPoolExecutor(workers, "verify-sources") as outer, ThreadPoolExecutor(workers, "verify") as inner:

        def check(source_id: str) -> tuple[list[_Checked], list[Damage]]:
            checked, damage = look(source_id)
            there = not damage or store.directory.children(source_id)
            return (checked, damage) if there else ([], [])  # else it was removed by hand meanwhile

        def look(source_id: str) -> tuple[list[_Checked], list[Damage]]:
            found = store.directory.read_all(_documents(store, source_id))
            if not found and not store.directory.children(source_id):  # so it was: nothing of it is to be made again
                return [], []
            disagreement = _group_disagrees(store, source_id, found) or _arrays_disagree(store, source_id, found)
            if disagreement:  # then nothing tells how to read the rest
                return [], [disagreement]
            damage = list(_verify_metadata(store, source_id, found, repair))
            for path, (line, why) in _wrong_lines(store, source_id, root.members).items():
                lines[path] = line
                frames = store.attributes(source_id)["frames"]
                damage.append(Damage(source_id, 0, frames, METADATA, f"says of {path} that it {why}", repair))
            smoothing = verify_smoothing(store, source_id, repair=repair)
            damage += [Damage(source_id, start, stop, key, why, repair) for key, start, stop, why in smoothing]
            pending = set(store.pending(source_id))
            segments = [segment for segment in store.segments(source_id) if segment not in pending]
            checked = list(inner.map(partial(_check, store, store.arrays(source_id)), segments))
            if repair and any(one.damage for one in checked):
                Temporal(store, source_id).uncommit_all()  # perhaps made of these, it would count as that of the mended
            for one in checked:
                if one.damage and repair:
                    _uncommit(store, one.segment)
                damage += [replace(found, repaired=repair) for found in one.damage]
            return checked, damage

        checked: list[_Checked] = []
        damage = [
            Damage(source_id, 0, 0, key := f"{source_id}/{METADATA}", why.removeprefix(f"{store.uri}/{key} "))
            for source_id, why in store.damaged.items()
        ]
        try:
            for of_source, damaged in outer.map(check, ids):
                checked += [replace(one, damage=()) for one in of_source]
                damage += damaged
        except BaseException:  # nobody waits for what is left, and nothing more is repaired
            for pool in (outer, inner):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
    if read_header(store.directory) is None:  # of what is away, nothing looks damaged
        raise store_away(store.uri)
    if repair and lines:
        root = _root(store)
        write_root(store.directory, Root(root.attributes, {**root.members, **lines}))
    return Verified(
        sources=len(ids),
        segments=len(checked),
        files=sum(one.files for one in checked),
        bytes=sum(one.bytes for one in checked),
        damage=tuple(damage),
    )


def as_text(found: Verified, repair: bool) -> str:
    """What was found, a line for each damaged file, then what was checked.

    Args:
        found: By `verify`.
        repair: Whether it was to repair.
    """
    lines = []
    for one in found.damage:
        done = "; repaired" if one.repaired else "; --repair cannot mend it" if repair else ""
        frames = f"frames {one.start} to {one.stop}" if one.stop else "all frames"
        lines.append(f"{one.file} ({frames} of {one.source_id}) {one.reason}{done}")
    lines.append(
        f"committed segments: {found.segments:,}, sources: {found.sources:,}, files: {found.files:,}, bytes: "
        f"{found.bytes:,}; damaged: {len(found.damage):,}"
    )
    if any(one.repaired for one in found.damage):
        lines.append("run the same `depthmill label`, or `depthmill smooth`, again to do what was un-committed")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Checked:
    segment: Segment
    files: int
    bytes: int
    damage: tuple[Damage, ...]


def _check(store: Store, arrays: Mapping[str, Document], segment: Segment) -> _Checked:
    """Check a segment of a source that has these arrays."""
    keys = segment_files(segment, arrays)
    number = segment.start // rows_per_file(arrays["status"])
    status_key = file_key(segment.source_id, "status", arrays["status"], segment.start)
    sums_key = file_key(segment.source_id, "checksum", arrays["checksum"], number)
    rows = slice(segment.start, segment.stop)
    found: list[Damage] = []

    def note(key: str, reason: str, frames: slice = rows) -> None:
        found.append(Damage(segment.source_id, frames.start, frames.stop, key, reason))

    def values(name: str, key: str, file: bytes | None, part: slice) -> npt.NDArray[Any] | None:
        """Decode rows of an array out of one file, or note that it cannot be."""
        try:
            return decoded(arrays[name], file, part)
        except Exception as error:  # whatever codecs raise of broken bytes
            check_memory(error)
            frames = rows if name == "checksum" else part
            note(key, f"cannot be decoded: {type(error).__name__}: {error}", frames)
            return None

    data = store.directory.read_all([status_key, sums_key])
    files, size = len(data), sum(map(len, data.values()))
    status = values("status", status_key, data.get(status_key), rows)
    if status is not None and not np.isin(status, (LABELLED, FAILED)).all():
        note(status_key, "says of some frames neither labelled nor failed")
        status = None
    sums = None
    if sums_key in data:
        sums = values("checksum", sums_key, data[sums_key], slice(number, number + 1))
    else:
        note(sums_key, "is missing")
    # Without them nothing tells what its files were.
    expected = {} if sums is None else dict(zip(keys, map(int, sums[0]), strict=False))
    reasons = None
    for together in _groups(expected):
        data = store.directory.read_all(together)
        files, size = files + len(data), size + sum(map(len, data.values()))
        for key in together:
            (name, start, stop), file = keys[key], data.pop(key, None)
            if why := wrong(file, expected[key]):
                note(key, why, slice(start, stop))
                continue
            held = values(name, key, file, slice(start, stop))
            if name == "reason":
                reasons = held
    if status is not None and reasons is not None and ((status == FAILED) != (reasons != "")).any():
        note(status_key, "does not agree with the reasons of failures")
    return _Checked(segment, files, size, tuple(found))


def _groups(checksums: Mapping[str, int]) -> Iterator[list[str]]:
    """Keys of files, whose checksums are given, as many together as may be in memory at once."""
    group: list[str] = []
    size = 0
    for key, checksum in checksums.items():
        expected = checksum >> 32
        if group and size + expected > _AT_ONCE_BYTES:
            yield group
            group, size = [], 0
        group.append(key)
        size += expected
    yield group


def _documents(store: Store, source_id: str) -> dict[str, Document]:
    """Key of each zarr.json of a source -> what it holds, which follows from the source's attributes."""
    arrays = {f"{source_id}/{name}/{METADATA}": document for name, document in store.arrays(source_id).items()}
    return {**arrays, f"{source_id}/{METADATA}": group_document(store.attributes(source_id))}


def _verify_metadata(store: Store, source_id: str, found: Mapping[str, bytes], repair: bool) -> Iterator[Damage]:
    """Check the documents of a source, as found, and its times or keys, which do not follow from its attributes."""
    attributes = store.attributes(source_id)
    frames = attributes["frames"]
    arrays = store.arrays(source_id)
    for key, document in _documents(store, source_id).items():
        reason = wrong_document(found.get(key), document)
        if reason:
            if repair:
                store.directory.write(key, json_bytes(document))
            yield Damage(source_id, 0, frames, key, reason, repaired=repair)
    name = "key" if "key" in arrays else "time"
    key = file_key(source_id, name, arrays[name], 0)
    data = store.directory.read(key)
    reason = wrong(data, attributes.get(f"{name}_checksum", 0))
    if not reason:
        try:
            values = decoded(arrays[name], data, slice(None))
            # No two pictures share a key, and that of no picture in a folder or a tar is empty.
            lost = np.isnan(values) if name == "time" else values == ""
            reason = "lacks values" if lost.sum() > (attributes["kind"] == "parquet") else ""
        except Exception as error:  # whatever codecs raise of broken bytes
            check_memory(error)
            reason = f"cannot be decoded: {type(error).__name__}: {error}"
    if reason:
        yield Damage(source_id, 0, frames, key, reason)


def _group_disagrees(store: Store, source_id: str, found: Mapping[str, bytes]) -> Damage | None:
    """Whether a source's own zarr.json and the root say different things of it: either may be the wrong one."""
    key, attributes = f"{source_id}/{METADATA}", store.attributes(source_id)
    try:
        own = source_attributes_of(found.get(key, b""))
    except ValueError:  # then the root is right
        return None
    if own is None or not (why := difference(own, attributes, "attributes")):
        return None
    return Damage(source_id, 0, attributes["frames"], key, f"{why}, as in the root; nothing else was checked")


def _arrays_disagree(store: Store, source_id: str, found: Mapping[str, bytes]) -> Damage | None:
    """Whether all arrays are of other lengths, or all labels of another canvas, than a source's zarr.json says."""
    key, attributes = f"{source_id}/{METADATA}", store.attributes(source_id)
    names = [name for name in store.arrays(source_id) if name != "checksum"]
    documents = {name: parsed(found.get(f"{source_id}/{name}/{METADATA}", b"")) or {} for name in names}
    shapes = {name: shape for name, one in documents.items() if isinstance(shape := one.get("shape"), list)}
    canvases = [shape[1:3] for name, shape in shapes.items() if name in store.layout.arrays]
    for name, said, others in (
        ("frames", [attributes["frames"]], [shape[:1] for shape in shapes.values()]),
        ("size", attributes["size"], canvases),
    ):
        if len(others) > 1 and all(others[0] == other != said for other in others):
            why = f"has attributes.{name} {json.dumps(attributes[name])}; its arrays are of {json.dumps(others[0])}"
            return Damage(source_id, 0, attributes["frames"], key, f"{why}; nothing else was checked")
    return None


def _wrong_lines(store: Store, source_id: str, members: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Path of a member -> its line in the root as it should be, and what is wrong with it; none if it is not there."""
    texts = source_members(source_id, store.attributes(source_id), store.layout)
    if members.keys().isdisjoint(texts):
        return {}
    reasons = {path: wrong_document(members.get(path), json.loads(text)) for path, text in texts.items()}
    return {path: (texts[path], reason) for path, reason in reasons.items() if reason}


def _root(store: Store) -> Root:
    root = read_root(store.directory)
    assert root is not None
    return root


def _uncommit(store: Store, segment: Segment) -> None:
    """The status goes first: being killed after that leaves what a kill before the commit would have left."""
    arrays = store.arrays(segment.source_id)
    number = segment.start // store.segment_frames(segment.source_id)
    store.directory.delete(file_key(segment.source_id, "status", arrays["status"], segment.start))
    store.directory.delete(file_key(segment.source_id, "checksum", arrays["checksum"], number))
