"""Smoothed labels, lazily: scale and shift are applied to the rows that are read, and to no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray
from xarray.backends import BackendArray
from xarray.core.indexing import IndexingSupport, LazilyIndexedArray, explicit_indexing_adapter

from depthmill.pipeline.store.rows import Rows, smoothed_rows
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.store.temporal import Temporal, not_smoothed


def smoothed(store: Store, datasets: Mapping[str, xarray.Dataset], *, named: bool = False) -> dict[str, xarray.Dataset]:
    """The datasets of those sources that are smoothed, with smoothed labels; not of those that had to be left out.

    Args:
        store: Theirs.
        datasets: Source id -> dataset.
        named: Whether these are sources that were asked for, and not all.

    Raises:
        StoreError: If none is, or one is not up to date.
    """
    found = {}
    for source_id, dataset in datasets.items():
        temporal = Temporal(store, source_id)
        if temporal.usable():
            found[source_id] = _applied(temporal, dataset)
    if not found:
        asked = list(datasets) if named else store.sources()
        if not named and any(store.attributes(source_id)["kind"] == "video" for source_id in asked):
            asked = []  # it is smoothed without being named
        raise not_smoothed(store, asked)
    return found


def _applied(temporal: Temporal, dataset: xarray.Dataset) -> xarray.Dataset:
    labels = {
        name: (dataset[name].dims, LazilyIndexedArray(_Lazy(rows)), {"units": "1", "long_name": f"{name}, smoothed"})
        for name, rows in smoothed_rows(temporal).items()
    }
    return dataset.assign({**labels, "shot": ("frame", temporal.read("shot"))})


class _Lazy(BackendArray):
    """Rows as xarray asks for them."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.shape, self.dtype = rows, rows.stored.shape, np.dtype(np.float32)

    def __getitem__(self, key: Any) -> Any:
        return explicit_indexing_adapter(key, self.shape, IndexingSupport.OUTER, self.rows.__getitem__)
