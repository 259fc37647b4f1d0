"""Smoothed labels, lazily: scale and shift are applied to the rows that are read, and to no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr
from xarray.backends import BackendArray
from xarray.core.indexing import IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.store.temporal import Temporal


def smoothed(store: Store, datasets: Mapping[str, xarray.Dataset]) -> dict[str, xarray.Dataset]:
    """The datasets of those sources that are smoothed, with smoothed labels; not of those that had to be left out.

    Raises:
        StoreError: If none is, or one is not up to date.
    """
    found = {}
    for source_id, dataset in datasets.items():
        temporal = Temporal(store, source_id)
        if temporal.attributes() is not None and not temporal.left_out():
            temporal.check_current()
            found[source_id] = _applied(temporal, dataset)
    if not found:
        raise StoreError(f"{store.uri} has no smoothed source: run `depthmill smooth {store.uri}`")
    return found


def _applied(temporal: Temporal, dataset: xarray.Dataset) -> xarray.Dataset:
    store, source_id = temporal.store, temporal.source_id
    scale, shift = temporal.read("scale"), temporal.read("shift")
    rows = {"depth": _Rows(store.array(source_id, "depth"), scale, shift)}
    if temporal.filtered():
        rows = {name: _Rows(store.array(source_id, f"{name}_smooth")) for name in store.layout.labels}
    if store.layout.uncertainty:  # in units of depth, whose are others now
        rows["uncertainty"] = _Rows(store.array(source_id, "uncertainty"), scale, np.zeros_like(shift))
    labels = {
        name: (dataset[name].dims, LazilyIndexedArray(row), {"units": "1", "long_name": f"{name}, smoothed"})
        for name, row in rows.items()
    }
    return dataset.assign({**labels, "shot": ("frame", temporal.read("shot"))})


@dataclass(eq=False)
class _Rows(BackendArray):
    """A lazy array: decoded, and with scale and shift of (frames,) applied where they are given."""

    stored: zarr.Array[Any]
    scale: npt.NDArray[np.float32] | None = None
    shift: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        self.shape, self.dtype = self.stored.shape, np.dtype(np.float32)

    def __getitem__(self, key: Any) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> npt.NDArray[np.float32]:
        attributes: dict[str, Any] = dict(self.stored.attrs)
        step, offset = np.float32(attributes.get("scale_factor", 1)), np.float32(attributes.get("add_offset", 0))
        packed = np.asarray(self.stored.oindex[key])
        values = np.asarray(packed, np.float32) * step + offset
        if (fill := attributes.get("_FillValue")) is not None:
            values = np.where(packed == fill, np.float32(np.nan), values)
        if self.scale is not None and self.shift is not None:
            a, b = self.scale[key[0]], self.shift[key[0]]
            if np.ndim(a):
                a, b = (np.reshape(one, (-1,) + (1,) * (values.ndim - 1)) for one in (a, b))
            values = values * a + b
        return np.asarray(values, np.float32)
