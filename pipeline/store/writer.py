"""Write one segment: rows in any order, whole shards as they fill, the status chunk last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import Store as ZarrStore

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import Directory
from depthmill.pipeline.store.layout import (
    DEPTH_INVALID,
    Document,
    Layout,
    file_key,
    pack_depth,
    pack_normals,
    segment_files,
)
from depthmill.pipeline.store.zarr_files import WholeFiles, ZarrFiles, open_array
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Segment


class SegmentWriter:
    """Takes the labels of one segment and commits them. Made by `Store.writer`.

    Rows are packed as they come and held until their shard is full; it is then compressed and written by a thread of
    the writer's own, while the next one fills. So memory holds two shards where rows come in order, and `waiting_bytes`
    and a shard where they do not.

    Two writers of one segment, a worker given up for dead and its successor, do not hinder each other: both write the
    same bytes, and whichever commits first has committed it.
    """

    def __init__(
        self,
        segment: Segment,
        size: tuple[int, int],
        layout: Layout,
        directory: Directory,
        documents: Mapping[str, Document],
        redo: Sequence[int] | None,
    ) -> None:
        """See `Store.writer`.

        Args:
            segment: Which frames.
            size: Height and width of the source's canvas.
            layout: The store's.
            directory: The store's.
            documents: The zarr.json of the arrays of the source's group, by name.
            redo: The frames of a committed segment that are given anew; None for a segment as a whole.
        """
        self._segment = segment
        self._height, self._width = size
        self._layout = layout
        self._documents = documents
        self._files = WholeFiles(directory)
        self._arrays = self._open(self._files)
        self._keys = list(segment_files(segment, documents))
        self._shard_frames = layout.frames_per_shard(*size)
        self._status = np.full(segment.frames, PENDING, np.uint8)
        self._size = np.zeros((segment.frames, 2), np.int32)
        self._reasons = [""] * segment.frames
        self._checksums = np.zeros(documents["checksum"]["shape"][1] if "checksum" in documents else 0, np.uint64)
        self._number = segment.start // documents["status"]["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._kept: frozenset[int] = frozenset()  # rows that stay as they were committed
        self._stored: dict[str, zarr.Array[Any]] = {}
        if redo is not None:
            self._keep(redo)
        # Row in the segment -> packed labels by name, until the row's shard is written.
        self._rows: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._waiting_bytes = 0
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._writing: Future[None] | None = None
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
                raise StoreError(f"frame {index} of {self._segment} has {given}{name}, but {self._expected()}")
            if label is not None:
                self._check_shape(index, name, label)
                labels[name] = self._packed(index, name, label)
        sizes = {label.shape[:2] for label in labels.values()}
        if len(sizes) > 1:
            raise StoreError(f"frame {index} of {self._segment} has labels of different sizes: {sizes}")
        self._size[row] = sizes.pop()
        self._rows[row] = labels
        self._waiting_bytes += sum(label.nbytes for label in labels.values())
        self._finish_row(row, LABELLED)

    def fail(self, index: int, reason: str) -> None:
        """Mark one frame as failed, with the reason."""
        row = self._free_row(index)
        self._reasons[row] = reason or "no reason was given"  # a reason is what tells failed rows apart
        self._finish_row(row, FAILED)

    @property
    def waiting_bytes(self) -> int:
        """Of the packed labels that are held until their shard is full; it depends on the rows given, not on time."""
        return self._waiting_bytes

    def commit(self) -> int:
        """Publish the segment. Every frame must have been given.

        Returns:
            Bytes written.

        Raises:
            StoreFullError: If no space is left.
            StoreError: If frames were not given, or could not be written.
        """
        missing = self._segment.start + np.flatnonzero(self._status == PENDING)
        if missing.size:
            raise StoreError(f"{self._segment} cannot be committed: frames {missing.tolist()} were never given")
        self._finish_writing()
        self._thread.shutdown()
        rows = slice(self._segment.start, self._segment.stop)
        if "size" in self._arrays:
            self._arrays["size"][rows] = self._size
        self._arrays["reason"][rows] = np.array(self._reasons, dtype=object)
        if "checksum" in self._arrays:
            for column, key in enumerate(self._keys):
                if key in self._files.written:
                    self._checksums[column] = self._files.written[key]
            self._arrays["checksum"][self._number] = self._checksums
        self._arrays["status"][rows] = self._status
        return sum(value >> 32 for value in self._files.written.values())

    def _open(self, files: ZarrStore) -> dict[str, zarr.Array[Any]]:
        return {
            name: open_array(files, f"{self._segment.source_id}/{name}", document)
            for name, document in self._documents.items()
        }

    def _keep(self, redo: Sequence[int]) -> None:
        """Take over what was committed of the rows that are not given anew."""
        self._stored = self._open(ZarrFiles(self._files.directory))
        start, stop = self._segment.start, self._segment.stop
        status = np.asarray(self._stored["status"][start:stop], np.uint8)
        if not redo or not set(redo) <= set(range(start, stop)) or (status == PENDING).any():
            raise StoreError(f"frames {list(redo)} cannot be redone: expected some of {self._segment}, committed")
        again = np.array(redo) - start
        status[again] = PENDING
        self._status = status
        self._kept = frozenset(np.flatnonzero(status).tolist())
        self._reasons = [str(reason) for reason in np.asarray(self._stored["reason"][start:stop])]
        if "size" in self._stored:
            self._size = np.array(self._stored["size"][start:stop], np.int32)
        if "checksum" in self._stored:
            self._checksums = np.array(self._stored["checksum"][self._number], np.uint64)
        for row in again:
            self._reasons[row], self._size[row] = "", 0

    def _last_keys(self) -> list[str]:
        """The files that are written after the labels."""
        rows = {"checksum": self._number, "status": self._segment.start}
        return [
            file_key(self._segment.source_id, name, self._documents[name], row)
            for name, row in rows.items()
            if name in self._documents
        ]

    def _free_row(self, index: int) -> int:
        if not self._segment.start <= index < self._segment.stop:
            raise StoreError(f"frame {index} is not in {self._segment}")
        row = index - self._segment.start
        if self._status[row] != PENDING:
            raise StoreError(f"frame {index} of {self._segment} was given twice")
        return row

    def _packed(self, index: int, name: str, label: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if label.dtype == self._documents[name]["data_type"]:
            return label
        if label.dtype.kind != "f":
            raise StoreError(
                f"{name} of frame {index} of {self._segment} is {label.dtype}; expected float32, or packed as "
                f"{self._documents[name]['data_type']}, as this store keeps it"
            )
        return pack_normals(label, self._layout.normals_dtype) if name == "normals" else pack_depth(label)

    def _check_shape(self, index: int, name: str, label: npt.NDArray[np.float32]) -> None:
        height, width, *rest = label.shape if label.ndim >= 2 else (0, 0)
        fits = 0 < height <= self._height and 0 < width <= self._width
        whole = (height, width) == (self._height, self._width)
        if rest != ([3] if name == "normals" else []) or not (fits if "size" in self._arrays else whole):
            bound = "at most " if "size" in self._arrays else ""
            expected = (self._height, self._width, *([3] if name == "normals" else []))
            raise StoreError(f"{name} of frame {index} of {self._segment} is {label.shape}, not {bound}{expected}")

    def _expected(self) -> str:
        return f"the store's labels are {list(self._layout.arrays)}"

    def _finish_row(self, row: int, status: int) -> None:
        self._status[row] = status
        start = row - row % self._shard_frames
        stop = min(start + self._shard_frames, self._segment.frames)
        if (self._status[start:stop] == PENDING).any():
            return
        given = {row - start: self._rows.pop(row, {}) for row in range(start, stop) if row not in self._kept}
        self._waiting_bytes -= sum(label.nbytes for labels in given.values() for label in labels.values())
        self._finish_writing()
        self._writing = self._thread.submit(self._write_shard, self._segment.start + start, stop - start, given)

    def _finish_writing(self) -> None:
        """Wait for the shard that is being written; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write_shard(self, start: int, frames: int, given: Mapping[int, Mapping[str, npt.NDArray[Any]]]) -> None:
        """Write the shard whose first frame is `start`; `given` has the labels of its rows, but for those kept."""
        for name in self._layout.arrays:
            array = self._arrays[name]
            fill = 0 if name == "normals" else DEPTH_INVALID
            rows = slice(start, start + frames)
            if len(given) < frames:
                shard = np.array(self._stored[name][rows])
                shard[list(given)] = fill
            else:
                shard = np.full((frames, *array.shape[1:]), fill, array.dtype)
            for row, labels in given.items():
                if name in labels:
                    height, width = labels[name].shape[:2]
                    shard[row, :height, :width] = labels[name]
            array[rows] = shard
