"""Write one segment: rows in any order, whole shards as they fill, the status chunk last."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import AtomicStore, remove_partial
from depthmill.pipeline.store.layout import DEPTH_INVALID, Layout, pack_depth, pack_normals
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Segment


class SegmentWriter:
    """Takes the labels of one segment and commits them. Made by `Store.writer`.

    Rows are packed as they come and held until their shard is full; it is then compressed and written by a thread of
    the writer's own, while the next one fills. So memory holds two shards where rows come in order, and never more than
    the segment and a shard.
    """

    def __init__(
        self, segment: Segment, height: int, width: int, layout: Layout, arrays: Mapping[str, zarr.Array[Any]]
    ) -> None:
        self._segment = segment
        self._height = height
        self._width = width
        self._layout = layout
        self._arrays = arrays
        self._shard_frames = layout.frames_per_shard(height, width)
        self._status = np.full(segment.frames, PENDING, np.uint8)
        self._size = np.zeros((segment.frames, 2), np.int32)
        self._reasons = [""] * segment.frames
        # Row in the segment -> packed labels by name, until the row's shard is written.
        self._rows: dict[int, dict[str, npt.NDArray[Any]]] = {}
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._writing: Future[None] | None = None
        for array in arrays.values():
            for file in _chunk_files(array, segment):
                remove_partial(file)

    def put(
        self,
        index: int,
        depth: npt.NDArray[np.float32] | None,
        normals: npt.NDArray[np.float32] | None,
        uncertainty: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Give one frame's labels: exactly those that the store's layout names.

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
                labels[name] = (
                    pack_normals(label, self._layout.normals_dtype) if name == "normals" else pack_depth(label)
                )
        sizes = {label.shape[:2] for label in labels.values()}
        if len(sizes) > 1:
            raise StoreError(f"frame {index} of {self._segment} has labels of different sizes: {sizes}")
        self._size[row] = sizes.pop()
        self._rows[row] = labels
        self._finish_row(row, LABELLED)

    def fail(self, index: int, reason: str) -> None:
        """Mark one frame as failed, with the reason."""
        row = self._free_row(index)
        self._reasons[row] = reason
        self._finish_row(row, FAILED)

    def commit(self) -> None:
        """Publish the segment. Every frame must have been given.

        Raises:
            StoreError: If some were not, or could not be written.
        """
        missing = self._segment.start + np.flatnonzero(self._status == PENDING)
        if missing.size:
            raise StoreError(f"{self._segment} cannot be committed: frames {missing.tolist()} were never given")
        self._finish_writing()
        self._thread.shutdown()
        rows = slice(self._segment.start, self._segment.stop)
        if "size" in self._arrays:
            self._write("size", rows, self._size)
        self._write("reason", rows, np.array(self._reasons, dtype=object))
        self._write("status", rows, self._status)

    def _free_row(self, index: int) -> int:
        if not self._segment.start <= index < self._segment.stop:
            raise StoreError(f"frame {index} is not in {self._segment}")
        row = index - self._segment.start
        if self._status[row] != PENDING:
            raise StoreError(f"frame {index} of {self._segment} was given twice")
        return row

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
        rows = [self._rows.pop(i, {}) for i in range(start, stop)]
        self._finish_writing()
        self._writing = self._thread.submit(self._write_shard, self._segment.start + start, rows)

    def _finish_writing(self) -> None:
        """Wait for the shard that is being written; raises what went wrong with it."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write_shard(self, start: int, rows: list[dict[str, npt.NDArray[Any]]]) -> None:
        for name in self._layout.arrays:
            array = self._arrays[name]
            fill = 0 if name == "normals" else DEPTH_INVALID
            shard = np.full((len(rows), *array.shape[1:]), fill, array.dtype)
            for canvas, labels in zip(shard, rows, strict=True):
                if name in labels:
                    height, width = labels[name].shape[:2]
                    canvas[:height, :width] = labels[name]
            self._write(name, slice(start, start + len(rows)), shard)

    def _write(self, name: str, rows: slice, values: npt.NDArray[Any]) -> None:
        try:
            self._arrays[name][rows] = values
        except OSError as error:
            raise StoreError(
                f"{name} of frames {rows.start} to {rows.stop} of {self._segment} cannot be written: {error}; check the"
                " disk's space and permissions, then run the same command again"
            ) from error


def _chunk_files(array: zarr.Array[Any], segment: Segment) -> list[Path]:
    """The files that hold this segment's rows of an array."""
    assert isinstance(array.store, AtomicStore)
    rows = (array.shards or array.chunks)[0]
    zeros = "/0" * (array.ndim - 1)
    first, last = segment.start // rows, (segment.stop - 1) // rows
    return [array.store.root / array.path / f"c/{chunk}{zeros}" for chunk in range(first, last + 1)]
