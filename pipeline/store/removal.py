"""Remove a store, and nothing that depthmill did not write into it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import Directory
from depthmill.pipeline.store.layout import Layout, source_arrays
from depthmill.pipeline.store.metadata import attributes_of, is_source
from depthmill.pipeline.store.root import BEING_REMOVED, METADATA, RECORDS, Root, write_root
from depthmill.pipeline.store.store import READERS

_EVERYTHING = Layout(uncertainty=True)
_ARRAYS = {
    name
    for kind in ("video", "images")
    for name in source_arrays({"kind": kind, "frames": 1, "size": [1, 1]}, _EVERYTHING)
}
_SMOOTHED = {"temporal", *(f"{name}_smooth" for name in _EVERYTHING.labels)}
_WRITTEN = {METADATA, *(f"{name}/" for name in _ARRAYS | _SMOOTHED)}  # what is in a source's directory


def remove(directory: Directory) -> None:
    """Empty a store, so that being killed half way leaves one that only says so.

    Files at its root that are not depthmill's stay.

    Raises:
        StoreError: If a directory in it holds anything else than depthmill writes; then nothing is touched.
    """
    names = [name.rstrip("/") for name in directory.children() if name.endswith("/")]
    _refuse_others(directory, names)
    write_root(directory, Root({"depthmill": {BEING_REMOVED: True}}, {}))
    for name in names:
        directory.remove(name)
    for name in RECORDS:
        directory.delete(name)


def _refuse_others(directory: Directory, names: list[str]) -> None:
    """Refuse directories that are neither sources nor what a killed `Store.add_source`, or removal, left of one."""
    with ThreadPoolExecutor(READERS) as pool:
        unknown = {
            name: next((child for child in children if child not in _WRITTEN), "")
            for name, children in zip(names, pool.map(directory.children, names), strict=True)
        }
    groups = directory.read_all(f"{name}/{METADATA}" for name in names)
    for name in names:
        if unknown[name] or not _is_source(groups.get(f"{name}/{METADATA}")):
            raise StoreError(
                f"{directory.uri}/{name}{'/' * bool(unknown[name])}{unknown[name].rstrip('/')} was not written by "
                "depthmill, and --overwrite would remove it: move it away, or give another path; nothing was touched"
            )


def _is_source(group: bytes | None) -> bool:
    """Whether this is the zarr.json of a source's group; it comes last, so none is what a kill left of one."""
    try:
        return group is None or is_source(attributes_of(json.loads(group)))
    except ValueError:
        return False
