"""The store: one Zarr v3 hierarchy per run. The only package that knows its layout on disk."""

from depthmill.pipeline.store.files import write_atomically
from depthmill.pipeline.store.layout import Layout
from depthmill.pipeline.store.opening import create, open_datasets, open_store
from depthmill.pipeline.store.store import Progress, Store

__all__ = [
    "Layout",
    "Progress",
    "Store",
    "create",
    "open_datasets",
    "open_store",
    "write_atomically",
]
