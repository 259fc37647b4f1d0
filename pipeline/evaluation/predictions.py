"""Where predictions come from: a labelled store, or a folder of `.npy`. Both are checked whole before any is scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from os.path import isdir, isfile, splitext
from pathlib import Path
from typing import Any

import numpy as np

from depthmill.pipeline.errors import EvaluationError, StoreDamagedError, UnscorableError, check_memory
from depthmill.pipeline.evaluation.decode import Floats
from depthmill.pipeline.evaluation.samples import Sample, some
from depthmill.pipeline.geometry import STORED_AXES, axes_signs
from depthmill.pipeline.store import open_store
from depthmill.pipeline.store.rows import open_labels
from depthmill.pipeline.store.temporal import Temporal, not_smoothed
from depthmill.pipeline.types import FAILED, PENDING, Modality

logger = logging.getLogger(__name__)

_OPEN_SOURCES = 16  # of which labels are read in turn; a picture's is the next one's more often than not


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is scored.

    Attributes:
        read: Gives a sample's (H, W) depth or (H, W, 3) normals (x right, y up, z towards the viewer); raises
            UnscorableError if there is none, EvaluationError or StoreError if it cannot be read. Threads may call it
            at once.
        checkpoint: Name of the checkpoint that made them; "" if that is not known.
        origin: What is known of where they come from, as JSON.
    """

    read: Callable[[Sample], Floats]
    checkpoint: str = ""
    origin: dict[str, Any] = field(default_factory=dict)


def from_folder(
    folder: Path, samples: Sequence[Sample], modality: Modality, normals_axes: str = STORED_AXES
) -> Predictions:
    """Predictions as `.npy` files, each at its sample's name: `test/kitchen_0004/rgb_0001.npy`.

    The names that Marigold's own `infer.py` gives are found too: `test/kitchen_0004/pred_0001.npy`.

    Args:
        folder: Where they lie.
        samples: Whose predictions are wanted.
        modality: What they are.
        normals_axes: Where the x, y and z of normals point.

    Raises:
        EvaluationError: If there is no such folder, or any is missing; names the first.
        ConfigError: If `normals_axes` names no axes.
    """
    signs = np.array(axes_signs(normals_axes), np.float32)
    if not isdir(folder):  # noqa: PTH112 (a refused Path raises)
        raise EvaluationError(f"{folder}: no such folder; expected one of .npy files: check the path")
    files: dict[str, Path] = {}
    missing = []
    for sample in samples:
        path = folder / f"{sample.name}.npy"
        candidates = (path, path.with_name(f"pred_{path.name.removeprefix('rgb_')}"))
        found = next(filter(isfile, candidates), None)
        if found is None:
            missing.append(f"{sample.name}.npy")
        else:
            files[sample.name] = found
    if missing:
        raise EvaluationError(
            f"{folder} has predictions of {len(files)} of {len(samples)} pictures; {some(missing)} are missing: "
            "name each after its picture, in the same folders, or score those alone: --split with a list of them, with "
            "--video an index"
        )

    def read(sample: Sample) -> Floats:
        path = files[sample.name]
        try:
            with path.open("rb") as file:
                values = np.load(file, allow_pickle=False)
        except OSError as error:  # which is no fault of the prediction's
            raise EvaluationError(
                f"{path} cannot be read ({error.strerror or error}); expected it whole: see to its disk, and try again"
            ) from error
        except Exception as error:  # what NumPy takes for an archive, zipfile's
            check_memory(error)
            raise UnscorableError(f"its prediction cannot be read: {error}") from error
        if not isinstance(values, np.ndarray):
            raise UnscorableError(
                "its prediction is an archive of arrays (.npz); expected one array, as numpy.save has it"
            )
        if values.dtype.kind not in "fiu":
            raise UnscorableError(f"its prediction is an array of {values.dtype}; expected numbers")
        if modality == "normals" and values.dtype.kind == "u":
            raise UnscorableError(
                f"its prediction is an array of {values.dtype}, as a picture of normals is; expected vectors: map "
                "[0, 255] to [-1, 1] first"
            )
        plane: Floats = values.squeeze()
        if modality == "depth":
            return plane
        if plane.ndim != 3 or plane.shape[2] != 3:
            raise UnscorableError(f"its prediction is of shape {values.shape}; expected (H, W, 3)")
        return plane * signs

    origin: dict[str, Any] = {"predictions": str(folder)}
    if modality == "normals":
        origin["normals_axes"] = normals_axes
    return Predictions(read, origin=origin)


def from_store(
    path: str | Path,
    samples: Sequence[Sample],
    modality: Modality,
    *,
    smooth: bool = False,
    among: Collection[str] | None = None,
) -> Predictions:
    """Predictions of a labelled store. A row is a sample's if the path of its picture ends in the sample's name.

    Only the sources whose ids are `among` some are looked in, if that is given.

    Raises:
        EvaluationError: If the store has other labels, is not finished, or lacks a sample.
        StoreError: If there is no such store, it is damaged, or no source that holds a sample is smoothed, though that
            is asked for, or one not to the end.
    """
    store = open_store(path)
    if modality not in store.layout.labels:
        raise EvaluationError(f"{path} holds {', '.join(store.layout.labels)}; the set asks for {modality}")
    wanted = {sample.name for sample in samples}
    depths = {name.count("/") + 1 for name in wanted}
    rows: dict[str, tuple[str, int]] = {}
    seen = ""
    unsmoothed: list[str] = []
    sources = store.sources()
    for why in store.damaged.values():
        logger.warning("%s; it is left out", why)
    for source in sources:
        attributes = store.attributes(source)
        if attributes["kind"] != "images" or (among is not None and source not in among):
            continue
        keys = store.keys(source)
        seen = keys[-1]
        found = list(named(attributes["uri"], keys, wanted, depths))
        if found and smooth and not Temporal(store, source).usable():
            unsmoothed.append(source)
            continue
        for name, row in found:
            if name in rows:
                raise EvaluationError(
                    f"{path} has two rows for {name}: in {rows[name][0]} and {source}; expected one: label the set's "
                    "folder into a store of its own"
                )
            rows[name] = (source, row)
    if unsmoothed and not rows:
        raise not_smoothed(store, unsmoothed)
    missing = [sample.name for sample in samples if sample.name not in rows]
    if missing:
        raise EvaluationError(
            f"{path} has {len(rows)} of {len(samples)} pictures; {some(missing)} are missing (the last of its own "
            f"is {seen or 'none: it has no pictures'}): label the set's folder whole, or score those alone: --split "
            "with a list of them, with --video an index"
        )
    status = {source: store.status(source) for source in {source for source, _ in rows.values()}}
    pending = [name for name, (source, row) in rows.items() if status[source][row] == PENDING]
    if pending:
        raise EvaluationError(
            f"{path} is not finished: {some(pending)} have no labels yet; run the same `depthmill label` again"
        )
    labels = lru_cache(_OPEN_SOURCES)(partial(open_labels, store, name=modality, smooth=smooth))

    def read(sample: Sample) -> Floats:
        source, row = rows[sample.name]
        try:
            if status[source][row] == FAILED:
                raise UnscorableError(f"it has no labels: {store.reasons(source, np.array([row]))[0]}")
            return labels(source).read(row)
        except StoreDamagedError as error:
            raise UnscorableError(str(error)) from error

    checkpoint = store.identity.get("checkpoints", {}).get(modality, {}).get("name", "")
    packing = "uint16 in steps of 1/5120" if modality == "depth" else store.layout.normals_dtype
    return Predictions(read, checkpoint, {"store": str(path), "identity": store.identity, "packing": packing})


def named(uri: str, keys: Sequence[str], wanted: Collection[str], depths: Collection[int]) -> Iterator[tuple[str, int]]:
    """The wanted names, of so many parts, that the paths of a source's pictures end in, and their rows."""
    folder = Path(uri).as_posix()
    if list(keys) == [folder.rpartition("/")[2]]:
        folder = folder.rpartition("/")[0]  # a source that is one picture
    for row, key in enumerate(keys):
        path, _ = splitext(f"{folder}/{key}")  # noqa: PTH122 (there may be millions; pathlib takes 8 times as long)
        parts = path.rsplit("/", max(depths, default=0))
        for name in ("/".join(parts[-depth:]) for depth in depths):
            if name in wanted:
                yield name, row
