"""The store: one Zarr v3 hierarchy per run. The only package that knows its layout on disk."""

from depthmill.pipeline.store.files import write_atomically
from depthmill.pipeline.store.layout import Layout
from depthmill.pipeline.store.store import Store, create, open_datasets, open_store, write_failures
from depthmill.pipeline.store.writer import SegmentWriter

__all__ = [
    "Layout",
    "SegmentWriter",
    "Store",
    "create",
    "open_datasets",
    "open_store",
    "write_atomically",
    "write_failures",
]
