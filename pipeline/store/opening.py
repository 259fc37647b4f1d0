"""Make a store, or open one."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import depthmill
from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreMismatchError
from depthmill.pipeline.store.files import Directory, decoding, located, open_directory
from depthmill.pipeline.store.layout import FORMAT, Document, Layout
from depthmill.pipeline.store.removal import remove
from depthmill.pipeline.store.root import (
    METADATA,
    RECORDS,
    Root,
    differences,
    new_root,
    read_header,
    read_root,
    write_root,
)
from depthmill.pipeline.store.store import Store

if TYPE_CHECKING:
    import xarray

    from depthmill.pipeline.store.zarr_files import ZarrFiles

logger = logging.getLogger(__name__)


def create(
    uri: str | Path,
    layout: Layout,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    own_segments: bool = False,
) -> Store:
    """Make a store, or open the one that an earlier run of the same configuration left there.

    Args:
        uri: Directory of the store, or its URL (`s3://bucket/prefix`, `gs://bucket/prefix`).
        layout: How labels are laid out.
        identity: Whatever else decides the bytes in the store (options, checkpoints and their hashes), as JSON.
        overwrite: Remove the depthmill store that is there, if any, and start anew.
        own_segments: Whether the store that is there keeps its lengths of segments, whatever `layout` has.

    Raises:
        StoreMismatchError: If the store there was made with another layout, identity or version.
        StoreError: If what is there is no depthmill store; it is never touched.
    """
    directory = open_directory(uri)
    header = {
        "format": FORMAT,
        "version": depthmill.__version__,
        "layout": layout.document(),
        "identity": json.loads(json.dumps(dict(identity))),
    }
    root = read_root(directory)
    if root is None:
        _refuse_foreign(directory)
    elif overwrite or root.being_removed:
        remove(directory)
        root = None
    else:
        if own_segments:
            header["layout"] = _with_segments(layout.document(), root.header.get("layout", {}))
        if differences(_decisive(root.header), _decisive(header)):
            raise StoreMismatchError(
                f"{uri} was made by another run:\n{differences(root.header, header)}\n"
                "Give --overwrite to replace it, or another path to keep both."
            )
    for name in (METADATA, *RECORDS):
        directory.clear_partial(name)
    if root is not None:
        return _store(directory, _without_removed(directory, root))
    directory.make_root()
    write_root(directory, new_root(header))
    return _store(directory, read_root(directory), new=True)


def open_store(uri: str | Path, *, index: bool = True) -> Store:
    """Open an existing store, to read it or to write segments into it.

    Args:
        uri: Its directory, or URL.
        index: Whether to read the root's index of all sources; else each is read when it is asked for.

    Raises:
        StoreError: If there is none, or one of another format.
    """
    directory = open_directory(uri)
    return _store(directory, read_root(directory) if index else read_header(directory), indexed=index)


def _store(directory: Directory, root: Root | None, *, new: bool = False, indexed: bool = True) -> Store:
    uri = directory.uri
    if root is None:
        raise StoreError(
            f"{uri} is no depthmill store: it has no {METADATA}, as {platform.node()} sees it; `depthmill label` makes "
            "one"
        )
    if root.being_removed:
        raise StoreError(f"{uri} was being overwritten when the process was killed: run the same command again")
    if root.header.get("format") != FORMAT:
        raise StoreError(
            f"{uri} has store format {root.header.get('format')!r}, written by depthmill {root.header.get('version')};"
            f" this is depthmill {depthmill.__version__}, which reads format {FORMAT}"
        )
    return Store(directory, root, new=new, indexed=indexed)


def open_datasets(
    uri: str | Path, *, smooth: bool = False, sources: Iterable[str] | None = None
) -> dict[str, xarray.Dataset]:
    """Open every source of a store as a lazy xarray dataset, decoded.

    Args:
        uri: The store.
        smooth: With scale and shift applied.
        sources: Only those of these ids; None for all.

    Returns:
        Source id -> dataset with `depth` (frame, y, x) float32 in [0, 1], NaN where invalid; `normals`
        (frame, y, x, axis) float32, unit to the precision of the packing, (0, 0, 0) where invalid; `uncertainty`
        (frame, y, x) float32 of ensembles' depth; `status` and `reason` (frame,); the coordinate `time` in seconds
        (video) or `key` (images, which also have `size`).

    With `smooth`, of the smoothed sources only: `depth` is scale * raw + shift, not clipped, or what was filtered, as
    are `normals` then; `uncertainty` is scaled as well; and `shot` (frame,) int32.

    A source that is damaged so that it cannot be opened is left out, with a warning, unless it was asked for.

    Raises:
        StoreError: If there is no such store or source, or it is damaged; with `smooth`, if none of them is smoothed,
            or one has been labelled again since.
    """
    import xarray

    from depthmill.pipeline.store.zarr_files import ZarrFiles

    store = open_store(located(str(uri)))  # what is lazy is read wherever the process is by then
    files = ZarrFiles(store.directory, read_only=True)
    wanted = store.sources()
    indexed: Mapping[str, xarray.Dataset] = {}
    if sources is None:
        for why in store.damaged.values():
            logger.warning("%s; it is left out", why)
        with suppress(StoreDamagedError), decoding(store.uri, METADATA):  # each says of itself what the index does
            indexed = xarray.open_groups(files, engine="zarr", mask_and_scale=False)  # type: ignore[arg-type]
    else:
        sources = {sources} if isinstance(sources, str) else set(sources)
        for source_id in sorted(sources):
            store.attributes(source_id)  # that there is such a source
        wanted = [source_id for source_id in wanted if source_id in sources]
    datasets = {}
    for source_id in wanted:
        try:
            with decoding(store.uri, source_id):
                datasets[source_id] = _decoded(store, source_id, indexed.get(f"/{source_id}"), files)
        except StoreDamagedError as error:
            if sources is not None:
                raise
            logger.warning("%s; it is left out", error)
    if not smooth:
        return datasets
    from depthmill.pipeline.store.smoothed import smoothed

    return smoothed(store, datasets, named=sources is not None)


def _decoded(store: Store, source_id: str, group: xarray.Dataset | None, files: ZarrFiles) -> xarray.Dataset:
    import xarray

    if group is None:  # not in the root yet, or one of few
        group = xarray.open_zarr(files, group=source_id, consolidated=False, mask_and_scale=False, chunks=None)
    dataset = group.drop_vars(["checksum", "depth_smooth", "normals_smooth"], errors="ignore")
    said = store.attributes(source_id)
    shape = (said["frames"], *said["size"])
    for name in store.layout.arrays:
        attributes = dataset[name].attrs
        if dataset[name].shape[:3] != shape:
            raise ValueError(f"its {name} is of shape {dataset[name].shape}; its zarr.json says {shape}")
        # JSON has float64 only, in which xarray would then decode: twice the memory, for 13 bits of depth. What has no
        # scale, float16, becomes float32 by one of 1.
        attributes["scale_factor"] = np.float32(attributes.get("scale_factor", 1))
    return xarray.decode_cf(dataset)


def _with_segments(layout: Document, of: Document) -> Document:
    """A layout with the lengths of segments of another."""
    lengths = ("segment_frames", "corpus_segment_frames")
    return {
        **{key: value for key, value in layout.items() if key not in lengths},
        **{key: of[key] for key in lengths if key in of},
    }


def _decisive(header: Document) -> Document:
    """Of a store's header, what must be the same: not what checkpoints are called, nor the order of labels."""
    identity, layout = header.get("identity", {}), header.get("layout", {})
    checkpoints = {
        modality: {key: value for key, value in checkpoint.items() if key != "name"}
        for modality, checkpoint in identity.get("checkpoints", {}).items()
    }
    return {
        **header,
        "identity": {**identity, "checkpoints": checkpoints},
        "layout": {**layout, "labels": sorted(layout.get("labels", []))},
    }


def _without_removed(directory: Directory, root: Root) -> Root:
    """Take sources out of the index whose directories were removed by hand: the run may label them again, changed."""
    there = {name.rstrip("/") for name in directory.children()}
    left = Root(root.attributes, {path: text for path, text in root.members.items() if path.partition("/")[0] in there})
    if len(left.members) < len(root.members):
        write_root(directory, left)
    return left


def _refuse_foreign(directory: Directory) -> None:
    found = directory.children()
    if found:
        names = [name.rstrip("/") for name in found[:3]]
        raise StoreError(
            f"{directory.uri} has files in it ({', '.join(names)}{', …' if len(found) > 3 else ''}), but is no"
            " depthmill store: give another path; nothing was touched"
        )
