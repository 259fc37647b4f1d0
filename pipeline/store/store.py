"""Create, resume and read a store.

The order of writes is what makes a kill harmless at any instant. A source exists once the root document names it, which
is written after everything in its group; a segment is done once its status chunk exists, which is written after
everything else of the segment. What was written before the kill and is named by neither is simply written again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

import depthmill
from depthmill.pipeline.errors import StoreError, StoreMismatchError
from depthmill.pipeline.store.files import AtomicStore, is_partial, write_atomically, write_json
from depthmill.pipeline.store.layout import (
    CONVENTIONS,
    FORMAT,
    Document,
    Layout,
    group_document,
    root_document,
    source_arrays,
    source_attributes,
)
from depthmill.pipeline.store.writer import SegmentWriter
from depthmill.pipeline.types import FAILED, Failure, Segment, Source

if TYPE_CHECKING:
    import xarray

_METADATA = "zarr.json"
_FAILURES = "failures.jsonl"
_BEING_REMOVED = "being_removed"


def create(path: Path, layout: Layout, identity: Mapping[str, Any], *, overwrite: bool = False) -> Store:
    """Make a store, or open the one that an earlier run of the same configuration left at `path`.

    Args:
        path: Directory of the store.
        layout: How labels are laid out.
        identity: Whatever else decides the bytes in the store (options, checkpoints and their hashes), as JSON.
        overwrite: Remove the depthmill store that is there, if any, and start anew.

    Raises:
        StoreMismatchError: If the store there was made with another layout, identity or version.
        StoreError: If what is there is no depthmill store; it is never touched.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "version": depthmill.__version__,
        "layout": layout.document(),
        "identity": json.loads(json.dumps(dict(identity))),
    }
    root = _read_root(path)
    found = None if root is None else _header(path, root)
    if found is None:
        _refuse_foreign(path)
    elif overwrite or _BEING_REMOVED in found:
        _remove(path)
        found = None
    else:
        differences = _differences(found, header)
        if differences:
            raise StoreMismatchError(
                f"{path} was made by another run:\n{differences}\n"
                "Give --overwrite to replace it, or another path to keep both."
            )
    _remove_partial(path)
    if found is None:
        write_json(path / _METADATA, root_document({"depthmill": header, "conventions": CONVENTIONS}, {}))
    return open_store(path)


def open_store(path: Path) -> Store:
    """Open an existing store, to read it or to write segments into it.

    Raises:
        StoreError: If there is none, or one of another format.
    """
    path = Path(path)
    root = _read_root(path)
    if root is None:
        raise StoreError(f"{path} is no depthmill store: it has no {_METADATA}; `depthmill label` makes one")
    header = _header(path, root)
    if _BEING_REMOVED in header:
        raise StoreError(f"{path} was being overwritten when the process was killed: run the same command again")
    if header.get("format") != FORMAT:
        raise StoreError(
            f"{path} has store format {header.get('format')!r}, written by depthmill {header.get('version')};"
            f" this is depthmill {depthmill.__version__}, which reads format {FORMAT}"
        )
    return Store(path, root)


def open_datasets(path: Path | str) -> dict[str, xarray.Dataset]:
    """Open every source of a store as a lazy xarray dataset, decoded.

    Returns:
        Source id -> dataset with `depth` (frame, y, x) float32 in [0, 1], NaN where invalid; `normals`
        (frame, y, x, axis) float32, unit to the precision of the packing, (0, 0, 0) where invalid; `uncertainty`
        (frame, y, x) float32 of ensembles' depth; `status` and `reason` (frame,); the coordinate `time` in seconds
        (video) or `key` (images, which also have `size`).
    """
    import xarray

    store = open_store(Path(path))
    groups = xarray.open_groups(str(store.path), engine="zarr", mask_and_scale=False)
    datasets = {}
    for source_id in store.sources():
        dataset = groups[f"/{source_id}"]
        for name in store.layout.arrays:
            attributes = dataset[name].attrs
            if "scale_factor" in attributes:
                # JSON has float64 only, in which xarray would then decode: twice the memory, for 13 bits of depth.
                attributes["scale_factor"] = np.float32(attributes["scale_factor"])
        datasets[source_id] = xarray.decode_cf(dataset)
    return datasets


def write_failures(store: Store, extra: Sequence[Failure] = ()) -> Path:
    """Write `failures.jsonl` into the store: one line for each frame or source without labels, and why.

    Args:
        store: The store; the failures of its committed segments are listed.
        extra: Failures that the store cannot know: sources that could not be opened.

    Returns:
        The file's path.
    """
    failures = sorted([*store.failures(), *extra], key=lambda f: (f.uri, f.source_id or "", f.frame or 0, f.reason))
    lines = [
        json.dumps({"uri": f.uri, "source_id": f.source_id, "frame": f.frame, "reason": f.reason}, ensure_ascii=False)
        for f in failures
    ]
    path = store.path / _FAILURES
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return path


class Store:
    """An open store. Made by `create` and `open_store`.

    Attributes:
        path: Its directory.
        layout: How labels are laid out.
        identity: What decided its bytes, beside the layout.
    """

    def __init__(self, path: Path, root: Document) -> None:
        header = root["attributes"]["depthmill"]
        self.path = path
        self.layout = Layout.from_document(header["layout"])
        self.identity: dict[str, Any] = header["identity"]
        self._root_attributes: Document = root["attributes"]
        self._members: dict[str, Document] = root["consolidated_metadata"]["metadata"]

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def add(self, *sources: Source) -> None:
        """Make the groups of sources: all metadata, times and keys. Those that are there already are checked.

        The root document is rewritten once for each call, so give many sources at once.

        Raises:
            StoreMismatchError: If a source changed since it was added.
        """
        for source in sources:
            self._add(source)
        root = root_document(self._root_attributes, self._members)
        if sources and root != _read_root(self.path):
            write_json(self.path / _METADATA, root)

    def sources(self) -> list[str]:
        """Ids of all sources, sorted."""
        return sorted(path for path, document in self._members.items() if document["node_type"] == "group")

    def attributes(self, source_id: str) -> Document:
        """Attributes of a source's group: uri, kind, frames, size, fingerprint and, for videos, fps."""
        if source_id not in self._members:
            raise StoreError(f"{self.path} has no source {source_id!r}; it has {self.sources()}")
        attributes: Document = self._members[source_id]["attributes"]
        return attributes

    def segments(self, source_id: str) -> list[Segment]:
        """All segments of a source, in order."""
        frames = self.attributes(source_id)["frames"]
        length = self.layout.frames_per_segment(*self.attributes(source_id)["size"])
        return [Segment(source_id, start, min(start + length, frames)) for start in range(0, frames, length)]

    def status(self, source_id: str) -> npt.NDArray[np.uint8]:
        """What became of each frame: (frames,) uint8, one of PENDING, LABELLED, FAILED."""
        return np.asarray(self.array(source_id, "status")[:], np.uint8)

    def pending(self, source_id: str) -> list[Segment]:
        """The segments of a source that are not committed, in order."""
        chunks = self.path / source_id / "status" / "c"  # one file for each committed segment, never one of zeros
        return [segment for i, segment in enumerate(self.segments(source_id)) if not (chunks / str(i)).exists()]

    def writer(self, segment: Segment) -> SegmentWriter:
        """Start writing a segment, whatever an earlier attempt may have left of it."""
        if segment not in self.segments(segment.source_id):
            raise StoreError(f"{segment} is no segment of {self.path}: take one of Store.segments()")
        H, W = self.attributes(segment.source_id)["size"]
        arrays = {
            name: self.array(segment.source_id, name)
            for name in (*self.layout.arrays, "size", "reason", "status")
            if f"{segment.source_id}/{name}" in self._members
        }
        return SegmentWriter(segment, H, W, self.layout, arrays)

    def failures(self) -> list[Failure]:
        """Failed frames of committed segments, sorted by source and frame."""
        failures = []
        for source_id in self.sources():
            failed = np.flatnonzero(self.status(source_id) == FAILED)
            if failed.size:
                reasons = self.array(source_id, "reason")
                uri = self.attributes(source_id)["uri"]
                failures += [Failure(uri, source_id, int(i), str(reasons[int(i)])) for i in failed]
        return failures

    def array(self, source_id: str, name: str) -> zarr.Array[Any]:
        """One Zarr array of a source, as stored: packed, not decoded."""
        if f"{source_id}/{name}" not in self._members:
            raise StoreError(f"{self.path} has no array {name!r} of source {source_id!r}")
        # Pinned: a chunk of nothing but fill is no file, whatever the user set in zarr.config.
        config = {"write_empty_chunks": False}
        return zarr.open_array(
            AtomicStore(self.path), path=f"{source_id}/{name}", mode="r+", zarr_format=3, config=config
        )

    def _add(self, source: Source) -> None:
        attributes = source_attributes(source)
        if source.id in self._members:
            differences = _differences(self.attributes(source.id), attributes)
            if differences:
                raise StoreMismatchError(
                    f"{source.uri} changed since it was labelled into {self.path}:\n{differences}\n"
                    "Give --overwrite to label everything again, or another path to keep both."
                )
            return
        if not re.fullmatch(r"[^/\s.][^/\s]*", source.id) or source.id in (_METADATA, _FAILURES):
            raise StoreError(f"source id {source.id!r} cannot name a group: no slash, space or leading dot in it")
        group = self.path / source.id
        shutil.rmtree(group, ignore_errors=True)  # what a killed `add` left
        arrays = source_arrays(source, self.layout)
        for name, document in arrays.items():
            write_json(group / name / _METADATA, document)
        write_json(group / _METADATA, group_document(attributes))
        added = {source.id: group_document(attributes)}
        added |= {f"{source.id}/{name}": document for name, document in arrays.items()}
        self._members |= added
        if source.time_s is not None:
            self.array(source.id, "time")[:] = source.time_s
        if source.keys is not None:
            self.array(source.id, "key")[:] = np.array(source.keys, dtype=object)


def _read_root(path: Path) -> Document | None:
    try:
        document: Document = json.loads((path / _METADATA).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise StoreError(f"{path / _METADATA} is no JSON ({error}): give another path") from error
    return document


def _header(path: Path, root: Document) -> Document:
    """What depthmill wrote about the store as a whole."""
    header = root.get("attributes", {}).get("depthmill")
    if not isinstance(header, dict):
        raise StoreError(f"{path} is a Zarr hierarchy, but no depthmill store: give another path; it was not touched")
    return header


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: a store is a directory; give another path")
    found = sorted(entry.name for entry in path.iterdir() if not is_partial(entry)) if path.exists() else []
    if found:
        raise StoreError(
            f"{path} has files in it ({', '.join(found[:3])}{', …' if len(found) > 3 else ''}), but is no depthmill"
            " store: give another path; nothing was touched"
        )


def _remove(path: Path) -> None:
    """Empty a store, so that being killed half way leaves one that only says so."""
    write_json(path / _METADATA, root_document({"depthmill": {_BEING_REMOVED: True}}, {}))
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
    for name in (_FAILURES, "run.json"):
        (path / name).unlink(missing_ok=True)


def _remove_partial(path: Path) -> None:
    for entry in path.iterdir() if path.exists() else ():
        if is_partial(entry):
            entry.unlink(missing_ok=True)


def _differences(old: Document, new: Document, prefix: str = "") -> str:
    """One line for each key in which two documents differ, with both values; "" if they are equal."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines.append(_differences(before, now, f"{prefix}{key}."))
        elif before != now:
            lines.append(f"  {prefix}{key}: {_shown(old, key)} there, {_shown(new, key)} now")
    return "\n".join(line for line in lines if line)


def _shown(document: Document, key: str) -> str:
    return json.dumps(document[key]) if key in document else "absent"
