"""Write one segment: rows in any order, whole shards as they fill, the status chunk last."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.machine import cores
from depthmill.pipeline.store.files import Directory, damaged
from depthmill.pipeline.store.layout import (
    MAX_SHARD_BYTES,
    Document,
    Layout,
    checksum,
    file_key,
    pack_depth,
    pack_normals,
    rows_per_file,
    segment_files,
)
from depthmill.pipeline.store.root import refuse_another
from depthmill.pipeline.store.shard import assemble, encode_chunk, read_rows, split, write_plain
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Segment

_MOST_THREADS = 8  # that compress: enough for several hundred frames a second of 640x480
_SHARDS_WRITTEN_AT_ONCE = 4  # a write to object storage takes longer than a shard takes to fill


class SegmentWriter:
    """Takes the labels of one segment and commits them. Made by `Store.writer`.

    Rows are packed and compressed as they come, each by one of several threads, and held so until their shard is full;
    others write it while the next ones fill. Who is ahead of that by as many rows as a shard has waits in `put`: room
    for a batch. So memory holds that many rows as they were given, the others compressed: a few shards where they come
    in order, and less than `waiting_bytes` where they do not.

    Two writers of one segment, a worker given up for dead and its successor, do not hinder each other: both write the
    same bytes, and whichever commits first has committed it.
    """

    def __init__(
        self,
        segment: Segment,
        layout: Layout,
        directory: Directory,
        header: Document,
        documents: Mapping[str, Document],
        redo: Sequence[int] | None,
    ) -> None:
        """See `Store.writer`.

        Args:
            segment: Which frames.
            layout: The store's.
            directory: The store's.
            header: The store's, as it was opened.
            documents: The zarr.json of the arrays of the source's group, by name.
            redo: The frames of a committed segment that are given anew; None for a segment as a whole.
        """
        self._segment = segment
        first = documents[layout.arrays[0]]
        size = self._height, self._width = first["shape"][1:3]
        self._layout = layout
        self._header = header
        self._documents = documents
        self._directory = directory
        self._written: dict[str, int] = {}  # key of a file -> its checksum
        self._keys = list(segment_files(segment, documents))
        self._shard_frames = rows_per_file(first)
        self._status = np.full(segment.frames, PENDING, np.uint8)
        self._size = np.zeros((segment.frames, 2), np.int32)
        self._reasons = [""] * segment.frames
        self._checksums = np.zeros(documents["checksum"]["shape"][1], np.uint64)
        self._number = segment.start // rows_per_file(documents["status"])
        self._kept: frozenset[int] = frozenset()  # rows whose labels stay as they were committed
        if redo is not None:
            self._keep(redo)
        # Row in the segment -> its chunks by name, until its shard is written.
        self._rows: dict[int, Future[dict[str, bytes]]] = {}
        self._packed_bytes: dict[int, int] = {}
        row_bytes = sum(_row_bytes(documents[name], size) for name in layout.arrays)
        self._threads = max(1, min(cores(), _MOST_THREADS, MAX_SHARD_BYTES // row_bytes))
        self._most_waiting = max(self._shard_frames, self._threads)
        self._compressors = ThreadPoolExecutor(self._threads, "shard-compressor")
        self._compressing: deque[Future[dict[str, bytes]]] = deque()
        self._writers = ThreadPoolExecutor(_SHARDS_WRITTEN_AT_ONCE, "shard-writer")
        self._writing: deque[Future[None]] = deque()
        for key in (*self._keys, *self._last_keys()):
            directory.clear_partial(key)

    def put(
        self,
        index: int,
        depth: npt.NDArray[Any] | None,
        normals: npt.NDArray[Any] | None,
        uncertainty: npt.NDArray[Any] | None = None,
    ) -> None:
        """Give one frame's labels: exactly those that the store's layout names, as below, or packed as it keeps them.

        Args:
            index: The frame's index in its source.
            depth: (H, W) float32 in [0, 1], NaN where invalid.
            normals: (H, W, 3) float32 unit vectors, (0, 0, 0) where invalid.
            uncertainty: (H, W) float32 in units of depth, NaN where invalid.
        """
        row = self._free_row(index)
        labels: dict[str, npt.NDArray[Any]] = {}
        for name, label in (("depth", depth), ("normals", normals), ("uncertainty", uncertainty)):
            if (label is not None) != (name in self._layout.arrays):
                given = "no " if label is None else ""
                raise StoreError(
                    f"frame {index} of {self._segment} has {given}{name}, but the store's labels are "
                    f"{list(self._layout.arrays)}"
                )
            if label is not None:
                self._check_shape(index, name, label)
                self._check_dtype(index, name, label)
                labels[name] = label
        sizes = {label.shape[:2] for label in labels.values()}
        if len(sizes) > 1:
            raise StoreError(f"frame {index} of {self._segment} has labels of different sizes: {sizes}")
        size = self._size[row] = sizes.pop()
        self._packed_bytes[row] = sum(_row_bytes(self._documents[name], size) for name in labels)
        while len(self._compressing) >= self._most_waiting:
            self._compressing.popleft().result()
        self._rows[row] = self._compressors.submit(self._compress, labels)
        self._compressing.append(self._rows[row])
        self._finish_row(row, LABELLED)

    def fail(self, index: int, reason: str) -> None:
        """Mark one frame as failed, with the reason, which may name a file whose name is no UTF-8."""
        row = self._free_row(index)
        text = reason.encode("utf-8", "backslashreplace").decode()
        self._reasons[row] = text or "no reason was given"  # a reason is what tells failed rows apart
        self._finish_row(row, FAILED)

    @property
    def waiting_bytes(self) -> int:
        """Of labels, packed, that wait until their shard is full; it depends on the rows given, not on time."""
        return sum(self._packed_bytes.values())

    def commit(self) -> int:
        """Publish the segment. Every frame must have been given.

        Returns:
            Bytes written.

        Raises:
            StoreFullError: If no space is left.
            StoreReplacedError: If another run has made the store anew meanwhile.
            StoreDamagedError: If labels that stay are not as they were committed.
            StoreError: If frames were not given, or could not be written.
        """
        missing = self._segment.start + np.flatnonzero(self._status == PENDING)
        if missing.size:
            raise StoreError(f"{self._segment} cannot be committed: frames {missing.tolist()} were never given")
        self._finish_writing()
        self._compressors.shutdown()
        self._writers.shutdown()
        refuse_another(self._directory, self._header)
        start = self._segment.start
        if "size" in self._documents:
            self._write("size", start, self._size)
        self._write("reason", start, np.array(self._reasons, dtype=object))
        for column, key in enumerate(self._keys):
            if key in self._written:
                self._checksums[column] = self._written[key]
        self._write("checksum", self._number, self._checksums[None])
        self._write("status", start, self._status)
        return sum(value >> 32 for value in self._written.values())

    def _write(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        document = self._documents[name]
        self._written |= write_plain(self._directory, self._segment.source_id, name, document, start, values)

    def _read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        document = self._documents[name]
        return read_rows(self._directory, self._segment.source_id, name, document, slice(start, stop))

    def _keep(self, redo: Sequence[int]) -> None:
        """Take over what was committed of the rows that are not given anew."""
        start, stop = self._segment.start, self._segment.stop
        status = self._read("status", start, stop)
        if not redo or not set(redo) <= set(range(start, stop)) or (status == PENDING).any():
            raise StoreError(f"frames {list(redo)} cannot be redone: expected some of {self._segment}, committed")
        again = np.array(redo) - start
        status[again] = PENDING
        self._status = status
        self._kept = frozenset(np.flatnonzero(status == LABELLED).tolist())
        self._reasons = [str(reason) for reason in self._read("reason", start, stop)]
        if "size" in self._documents:
            self._size = self._read("size", start, stop)
            kept = self._size[sorted(self._kept)]
            if ((kept < 1) | (kept > (self._height, self._width))).any():
                path = f"{self._segment.source_id}/size"
                raise damaged(self._directory.uri, path, "pictures with labels have no size")
        self._checksums = self._read("checksum", self._number, self._number + 1)[0]
        if self._kept and not self._checksums.any():
            path = f"{self._segment.source_id}/checksum"
            raise damaged(self._directory.uri, path, f"the checksums of {self._segment} are missing")
        for row in again:
            self._reasons[row], self._size[row] = "", 0

    def _last_keys(self) -> list[str]:
        """The files that are written after the labels."""
        rows = {"checksum": self._number, "status": self._segment.start}
        return [file_key(self._segment.source_id, name, self._documents[name], row) for name, row in rows.items()]

    def _free_row(self, index: int) -> int:
        if not self._segment.start <= index < self._segment.stop:
            raise StoreError(f"frame {index} is not in {self._segment}")
        row = index - self._segment.start
        if self._status[row] != PENDING:
            raise StoreError(f"frame {index} of {self._segment} was given twice")
        return row

    def _check_dtype(self, index: int, name: str, label: npt.NDArray[Any]) -> None:
        if label.dtype != self._documents[name]["data_type"] and label.dtype.kind != "f":
            raise StoreError(
                f"{name} of frame {index} of {self._segment} is {label.dtype}; expected float32, or packed as "
                f"{self._documents[name]['data_type']}, as this store keeps it"
            )

    def _check_shape(self, index: int, name: str, label: npt.NDArray[np.float32]) -> None:
        height, width, *rest = label.shape if label.ndim >= 2 else (0, 0)
        fits = 0 < height <= self._height and 0 < width <= self._width
        whole = (height, width) == (self._height, self._width)
        if rest != ([3] if name == "normals" else []) or not (fits if "size" in self._documents else whole):
            bound = "at most " if "size" in self._documents else ""
            expected = (self._height, self._width, *([3] if name == "normals" else []))
            raise StoreError(f"{name} of frame {index} of {self._segment} is {label.shape}, not {bound}{expected}")

    def _finish_row(self, row: int, status: int) -> None:
        self._status[row] = status
        start = row - row % self._shard_frames
        stop = start + self._shard_frames
        if (self._status[start:stop] == PENDING).any():
            return
        given = {one: self._rows.pop(one) for one in range(start, stop) if one in self._rows}
        for one in given:
            del self._packed_bytes[one]
        while len(self._writing) >= _SHARDS_WRITTEN_AT_ONCE:
            self._writing.popleft().result()
        self._writing.append(self._writers.submit(self._write_shard, range(start, stop), given))

    def _finish_writing(self) -> None:
        """Wait for the shards that are being written; raises what went wrong with one."""
        while self._writing:
            self._writing.popleft().result()

    def _compress(self, labels: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
        """Pack a row's labels, unless they are, and compress them."""
        chunks = {}
        for name, label in labels.items():
            if label.dtype == self._documents[name]["data_type"]:
                packed = label
            else:
                packed = pack_normals(label, self._layout.normals_dtype) if name == "normals" else pack_depth(label)
            chunks[name] = encode_chunk(packed, self._documents[name])
        return chunks

    def _write_shard(self, rows: range, given: Mapping[int, Future[dict[str, bytes]]]) -> None:
        """Write the shard of some rows; those that are neither given nor kept have failed, and are empty.

        The chunks that are kept stay where they are in the file, before new ones: who has read its index, and reads
        a chunk by it when the file is another by then, finds the labels of the same frame.
        """
        done = {row: future.result() for row, future in given.items()}
        refuse_another(self._directory, self._header)
        for name in self._layout.arrays:
            document = self._documents[name]
            key = file_key(self._segment.source_id, name, document, self._segment.start + rows.start)
            kept = {} if self._kept.isdisjoint(rows) else self._kept_chunks(rows, key, document)
            data = assemble(kept | {row - rows.start: done[row][name] for row in done}, document)
            if data is None:
                self._directory.delete(key)
            else:
                self._directory.write(key, data)
            self._written[key] = _checksum(data)

    def _kept_chunks(self, rows: range, key: str, document: Document) -> dict[int, bytes]:
        """The chunks of a shard's rows that are kept, in the order of its file.

        Killed half way, an earlier writer has left labels of others in it: without them it is as it was committed.

        Raises:
            StoreDamagedError: If it is not, since what is written has a checksum that tells nothing of that any more.
        """
        data = self._directory.read(key)
        try:
            chunks = {} if data is None else split(data, document)
        except ValueError as error:
            raise damaged(self._directory.uri, key, str(error)) from error
        kept = {row: chunk for row, chunk in chunks.items() if rows.start + row in self._kept}
        sums = _checksum(data), _checksum(assemble(kept, document))
        if int(self._checksums[self._keys.index(key)]) not in sums:
            why = "it is missing" if data is None else "it has other bytes than were written"
            raise damaged(self._directory.uri, key, why)
        return kept


def _checksum(shard: bytes | None) -> int:
    return 0 if shard is None else checksum(shard)


def _row_bytes(array: Document, size: Sequence[int]) -> int:
    """Bytes of a row of an array, packed; `size` is its height and width."""
    planes: int = array["shape"][3] if len(array["shape"]) == 4 else 1
    return int(size[0]) * int(size[1]) * planes * np.dtype(array["data_type"]).itemsize
