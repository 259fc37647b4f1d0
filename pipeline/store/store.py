"""A store: its sources, what is committed of them, and who writes the rest.

The order of writes is what makes a kill harmless at any instant. A source exists once its group's zarr.json exists,
which is written after everything else in the group; a segment is done once its status chunk exists, which is written
after everything else of the segment. What was written before the kill and is named by neither is simply written again.

Any process may add sources and write segments. The root's zarr.json names the sources as well, so that readers find
them with one request, but it is an index: one process publishes to it, now and then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreMismatchError
from depthmill.pipeline.store.files import Directory, damaged, decoding, json_bytes, store_away
from depthmill.pipeline.store.layout import Document, Layout, file_key, group_document, source_arrays, source_attributes
from depthmill.pipeline.store.metadata import damaged_words, source_attributes_of
from depthmill.pipeline.store.records import read_run
from depthmill.pipeline.store.root import (
    METADATA,
    RECORDS,
    Root,
    differences,
    read_root,
    refuse_another,
    source_members,
    write_root,
)
from depthmill.pipeline.store.shard import read_rows, write_plain
from depthmill.pipeline.types import FAILED, LABELLED, Failure, Segment, Source

if TYPE_CHECKING:
    import zarr

    from depthmill.pipeline.store.writer import SegmentWriter

READERS = 16  # sources read at once: on object storage each is a few requests


@dataclass(frozen=True)
class Progress:
    """What is done of a source.

    Attributes:
        pending: Half-open runs of numbers of segments that are not committed, in order.
        labelled: Frames with labels in committed segments.
        failed: Frames without, there.
    """

    pending: tuple[tuple[int, int], ...]
    labelled: int
    failed: int


class Store:
    """An open store. Made by `create` and `open_store`.

    Attributes:
        uri: Its directory, or URL.
        directory: Its files.
        version: Of the depthmill that made it.
        layout: How labels are laid out.
        identity: What decided its bytes, beside the layout.
        new: Whether it was made, or emptied, by the `create` that opened it.
        damaged: What `sources` had to leave out, since its zarr.json is damaged and not in the index: id -> why.
    """

    def __init__(self, directory: Directory, root: Root, *, new: bool = False, indexed: bool = True) -> None:
        """As `open_store` has read it; `indexed` says whether the root came with its index."""
        self.uri = directory.uri
        self.directory = directory
        self.version: str = root.header["version"]
        self.layout = Layout.from_document(root.header["layout"])
        self.identity: dict[str, Any] = root.header["identity"]
        self._header = root.header
        self.new = new
        self.damaged: dict[str, str] = {}
        self._indexed = indexed
        self._attributes = root.groups()

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def add(self, *sources: Source) -> None:
        """Add sources and publish them: `add_source` and `publish`."""
        for source in sources:
            self.add_source(source)
        self.publish(source.id for source in sources)

    def add_source(self, source: Source) -> None:
        """Make the group of a source: all metadata, times and keys. One that is there already is checked.

        If the index alone has it, its own zarr.json having been removed, the same is written again.

        Any process may do this, at any time, and two at once for the same source; the root is not touched.

        Raises:
            StoreMismatchError: If the source changed since it was added.
        """
        attributes = source_attributes(source)
        if not re.fullmatch(r"[^/\s.][^/\s]*", source.id) or source.id in (METADATA, *RECORDS):
            raise StoreError(f"source id {source.id!r} cannot name a group: no slash, space or leading dot in it")
        there = self._find(source.id)
        if there is not None:
            there = {key: there[key] for key in there if key in attributes}  # any other is the user's
            found = differences(there, attributes)
            if found and source.kind != "video" and {**there, "size": attributes["size"]} == attributes:
                raise StoreMismatchError(
                    f"{source.uri} has the pictures that were labelled into {self.uri}, but the largest of those that "
                    f"--max-pixels lets in is another:\n{found}\nGive --max-pixels as it was then{self._last_limit()}; "
                    f"to label larger pictures as well, {self._ways_out(source.id)}."
                )
            if found:
                raise StoreMismatchError(
                    f"{source.uri} changed since it was labelled into {self.uri}:\n{found}\n"
                    f"To label it anew, and nothing else, {self._ways_out(source.id)}."
                )
            if self.has(source.id):
                return
        refuse_another(self.directory, self._header)
        arrays = source_arrays(attributes, self.layout)
        documents = {f"{source.id}/{name}/{METADATA}": json_bytes(arrays[name]) for name in arrays}
        group = f"{source.id}/{METADATA}"
        name = "key" if "key" in arrays else "time"
        values = np.array(source.keys, dtype=object) if name == "key" else np.asarray(source.time_s)
        file = file_key(source.id, name, arrays[name], 0)
        for key in (*documents, file, group):
            self.directory.clear_partial(key)
        self.directory.write_all(documents)
        attributes[f"{name}_checksum"] = write_plain(self.directory, source.id, name, arrays[name], 0, values)[file]
        self.directory.write(group, json_bytes(group_document(attributes)))
        self._attributes[source.id] = attributes

    def publish(self, source_ids: Iterable[str]) -> None:
        """Name sources in the root, which rewrites it whole: for one process at a time, and many sources at once.

        One that is in no root, its publisher killed, is found by `sources` all the same; one damaged since, told of.
        """
        wanted = set(source_ids)
        self._load(sorted(wanted))
        root = read_root(self.directory)
        if root is None:
            raise store_away(self.uri)
        refuse_another(self.directory, self._header)
        members = dict(root.members)
        for source_id in sorted(wanted - self.damaged.keys()):
            if source_id not in root.members:
                members |= source_members(source_id, self.attributes(source_id), self.layout)
        if len(members) > len(root.members):
            write_root(self.directory, Root(root.attributes, members))

    def sources(self) -> list[str]:
        """Ids of all sources, sorted: by one listing, and read if the root did not name them when it was opened.

        What the root names but was removed since is none; those that are damaged are in `damaged` from then on.
        """
        names = self.directory.children()
        self.damaged = {}
        self._load([name.rstrip("/") for name in names if name.endswith("/")])
        return sorted(self._attributes.keys() & {name.rstrip("/") for name in names})

    def has(self, source_id: str) -> bool:
        """Whether a source is there, whatever the root says: its own zarr.json is."""
        return self.directory.read(f"{source_id}/{METADATA}", 0, 1) is not None

    def attributes(self, source_id: str) -> Document:
        """Attributes of a source's group: uri, kind, frames, size, fingerprint and, for videos, fps.

        Also `time_checksum` or `key_checksum`, of the file of its times or keys.

        Raises:
            StoreDamagedError: If there is no such source, as of one that was removed by hand, but there is a store.
        """
        attributes = self._find(source_id)
        if attributes is None:
            known = self.sources()
            some = f"{known}" if len(known) <= 5 else f"{len(known)} others, as {known[0]!r}"
            kind = StoreError if self.directory.read(METADATA, 0, 1) is None else StoreDamagedError
            raise kind(f"{self.uri} has no source {source_id!r}; it has {some}")
        return attributes

    def arrays(self, source_id: str) -> dict[str, Document]:
        """The zarr.json of each array of a source, by name."""
        return source_arrays(self.attributes(source_id), self.layout)

    def segment_frames(self, source_id: str) -> int:
        """Frames in each segment of a source but the last."""
        return self.layout.frames_per_segment(self.attributes(source_id))

    def segments(self, source_id: str) -> list[Segment]:
        """All segments of a source, in order."""
        frames, length = self.attributes(source_id)["frames"], self.segment_frames(source_id)
        return [Segment(source_id, start, min(start + length, frames)) for start in range(0, frames, length)]

    def status(self, source_id: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """What became of each frame, or of the frames [start, stop): uint8, one of PENDING, LABELLED, FAILED."""
        return self.read(source_id, "status", start, stop)

    def keys(self, source_id: str) -> list[str]:
        """Names of a source's pictures."""
        keys: list[str] = self.read(source_id, "key").tolist()
        return keys

    def reasons(self, source_id: str, frames: npt.NDArray[np.int64]) -> list[str]:
        """Why frames failed, given in order, "" where one did not."""
        if not frames.size:
            return []
        first, last = int(frames[0]), int(frames[-1]) + 1
        return [str(reason) for reason in self.read(source_id, "reason", first, last)[frames - first]]

    def pending(self, source_id: str) -> list[Segment]:
        """The segments of a source that are not committed, in order; one listing."""
        committed = self._committed(source_id)
        return [segment for i, segment in enumerate(self.segments(source_id)) if i not in committed]

    def progress(self, source_id: str) -> Progress:
        """What is done of a source: one listing, and the status of its frames if any segment is committed."""
        committed = self._committed(source_id)
        number = -(-self.attributes(source_id)["frames"] // self.segment_frames(source_id))
        borders = [-1, *sorted(committed), number]
        runs = tuple((a + 1, b) for a, b in pairwise(borders) if a + 1 < b)
        status = self.status(source_id) if committed else np.empty(0, np.uint8)
        return Progress(runs, int((status == LABELLED).sum()), int((status == FAILED).sum()))

    def failed_segments(self, source_id: str) -> list[tuple[Segment, tuple[int, ...]]]:
        """The committed segments of a source that have failed frames, with those frames."""
        failed = np.flatnonzero(self.status(source_id) == FAILED)
        numbers, first = np.unique(failed // self.segment_frames(source_id), return_index=True)
        segments, frames = self.segments(source_id), np.split(failed, first[1:])
        return [(segments[i], tuple(of.tolist())) for i, of in zip(numbers.tolist(), frames, strict=False)]

    def writer(self, segment: Segment, redo: Sequence[int] | None = None) -> SegmentWriter:
        """Start writing a segment, whatever an earlier attempt may have left of it.

        Args:
            segment: One of `segments`.
            redo: Only these frames, which failed when the segment was committed, are given; all others keep what is
                stored of them. Being killed half way leaves files that do not match their checksums, and the old status
                of the frames, so that doing it again mends them; if anything else does not match, it is not written.
        """
        from depthmill.pipeline.store.writer import SegmentWriter

        attributes, length = self.attributes(segment.source_id), self.segment_frames(segment.source_id)
        stop = min(segment.start + length, attributes["frames"])
        if segment.start % length or not 0 <= segment.start < stop == segment.stop:
            raise StoreError(f"{segment} is no segment of {self.uri}: take one of Store.segments()")
        arrays = self.arrays(segment.source_id)
        return SegmentWriter(segment, self.layout, self.directory, self._header, arrays, redo)

    def failures(self) -> list[Failure]:
        """Failed frames of committed segments, by source and frame; a source that is damaged is one as a whole."""
        ids = self.sources()
        lost = [Failure(f"{self.uri}/{source_id}", source_id, None, why) for source_id, why in self.damaged.items()]
        with ThreadPoolExecutor(READERS) as pool:
            return [failure for failures in (lost, *pool.map(self._failures, ids)) for failure in failures]

    def array(self, source_id: str, name: str) -> zarr.Array[Any]:
        """One Zarr array of a source, as stored: packed, not decoded.

        Raises:
            StoreDamagedError: If its zarr.json is damaged.
        """
        from depthmill.pipeline.store.zarr_files import ZarrFiles, open_array

        path = f"{source_id}/{name}"
        with decoding(self.uri, path):
            return open_array(ZarrFiles(self.directory), path, self.array_document(source_id, name))

    def read(self, source_id: str, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows of an array of a source, as stored; meant for those that are not sharded.

        Raises:
            StoreDamagedError: If a file of it cannot be decoded.
        """
        return read_rows(self.directory, source_id, name, self.array_document(source_id, name), slice(start, stop))

    def array_document(self, source_id: str, name: str) -> Document:
        """The zarr.json of an array of a source, or of its smoothing.

        Raises:
            StoreDamagedError: If there is none, or it is damaged.
        """
        document = self.arrays(source_id).get(name) or self.document(f"{source_id}/{name}")
        if document is None:
            raise damaged(self.uri, f"{source_id}/{name}/{METADATA}", "it is missing")
        return document

    def document(self, path: str) -> Document | None:
        """The zarr.json of a group or an array; None if there is none.

        Raises:
            StoreDamagedError: If it is damaged.
        """
        key = f"{path}/{METADATA}"
        data = self.directory.read(key)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise damaged(self.uri, key, repr(error)) from error

    def remove_if_empty(self) -> None:
        """Remove the store if it is new and has no source, so that a run that could open nothing leaves nothing behind.

        Only the files at its root go, and a local directory that is empty then. With any directory in it the store
        stays: another process may be adding that source, whose own zarr.json comes last, or it is the user's.
        """
        if self.new and not any(name.endswith("/") for name in self.directory.children()):
            for name in (*RECORDS, METADATA):
                self.directory.delete(name)
            self.directory.remove_root()

    def _ways_out(self, source_id: str) -> str:
        return f"remove {self.uri}/{source_id} and run the same command again, or give another store to keep both"

    def _last_limit(self) -> str:
        """`--max-pixels` of the last run that labelled something, in words; "" if none has ended."""
        limit = read_run(self.directory).get("config", {}).get("max_pixels")
        return "" if limit is None else f" (in the last run that labelled something, {limit})"

    def _committed(self, source_id: str) -> set[int]:
        """Numbers of the committed segments: of each there is a status chunk, since none is of zeros."""
        return {int(name) for name in self.directory.children(f"{source_id}/status/c") if name.isdigit()}

    def _failures(self, source_id: str) -> list[Failure]:
        attributes = self.attributes(source_id)
        uri, is_video = attributes["uri"], attributes["kind"] == "video"
        try:
            status = self.status(source_id) if self._committed(source_id) else np.empty(0, np.uint8)
            failed = np.flatnonzero(status == FAILED)
            if not failed.size:
                return []
            keys = [None] * len(failed) if is_video else self.read(source_id, "key")[failed].tolist()
            found = zip(failed, self.reasons(source_id, failed), keys, strict=True)
            return [Failure(uri, source_id, int(i), reason, key) for i, reason, key in found]
        except StoreDamagedError as error:
            return [Failure(uri, source_id, None, str(error))]

    def _find(self, source_id: str) -> Document | None:
        """Attributes of a source, also if another process has added it since; None if there is none.

        Raises:
            StoreDamagedError: If it is damaged, and not in the index.
        """
        if source_id not in self._attributes:
            self._load([source_id])
            if source_id in self.damaged:
                raise StoreDamagedError(self.damaged[source_id])
        return self._attributes.get(source_id)

    def _load(self, source_ids: Sequence[str]) -> None:
        """Read the groups of those sources that were not known, or find them damaged."""
        keys = {f"{name}/{METADATA}": name for name in source_ids if name not in self._attributes}
        found = self.directory.read_all(keys)
        for key, name in keys.items():
            attributes, why = None, ""
            try:
                attributes = source_attributes_of(found[key]) if key in found else None
            except ValueError as error:
                why = damaged_words(f"{self.uri}/{key}", error)
            if why and not self._indexed:
                self._load_by_index(source_ids)
                return
            self.damaged.pop(name, None)
            if why:
                self.damaged[name] = why
            elif attributes is not None:
                self._attributes[name] = attributes

    def _load_by_index(self, source_ids: Sequence[str]) -> None:
        """The same, once the index has been read: it tells what a file was that is damaged or lost."""
        root = read_root(self.directory)
        if root is None:
            raise store_away(self.uri)
        self._indexed = True
        self._attributes = root.groups() | self._attributes
        self._load(source_ids)
