"""`depthmill evaluate`, whole: a set's pictures, their labels from the same workers as any other run, their figures."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from depthmill.pipeline.config import LabelConfig, make_folder
from depthmill.pipeline.errors import ConfigError, EvaluationError
from depthmill.pipeline.evaluation.archive import Archive
from depthmill.pipeline.evaluation.datasets import Colours, EvaluationSet
from depthmill.pipeline.evaluation.predictions import Predictions, from_folder, from_store
from depthmill.pipeline.evaluation.report import reasons, table, write_report
from depthmill.pipeline.evaluation.samples import Sample, open_samples, some, write_picture
from depthmill.pipeline.evaluation.score import Row, Scores, score
from depthmill.pipeline.geometry import STORED_AXES
from depthmill.pipeline.model.checkpoint import DEFAULT_RESOLUTION
from depthmill.pipeline.model.labeler import open_checkpoints
from depthmill.pipeline.room import room_in
from depthmill.pipeline.sources.naming import canonical_uri, source_id
from depthmill.pipeline.store import write_atomically
from depthmill.workers.label import label
from depthmill.workers.progress import RunConsole, progress_on, warn


@dataclass(frozen=True)
class Folder:
    """Predictions that are there already, as `.npy` files.

    Attributes:
        path: Where they lie.
        normals_axes: Where the x, y and z of normals point.
    """

    path: Path
    normals_axes: str = STORED_AXES


@dataclass(frozen=True)
class LabelledStore:
    """Predictions that are there already, in a store of `depthmill label`."""

    path: str | Path


def evaluate(
    wanted: EvaluationSet,
    data: Path,
    out: Path,
    what: LabelConfig | LabelledStore | Folder,
    *,
    split: Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Scores[Row]:
    """Evaluate on a set: label its pictures, unless they are labelled, score them, and write a report.

    Args:
        wanted: The set.
        data: Its tar or folder (`samples.open_samples`).
        out: Folder for `metrics.json` and `per_image.csv`; a labelling run also leaves `pictures/` and `labels.zarr`
            there, and goes on with what an earlier run left.
        what: How to label, or what was labelled. Of a configuration the labels are the set's; a resolution that is left
            open is the paper's for this set, if the checkpoint is one for 768 pixels, else the checkpoint's own; a
            dtype that is not given is float32, and a joint checkpoint's domain that is left open the set's,
            as in the paper's evaluation.
        split: A list of the pictures to use instead of all.
        overwrite: Replace figures, and label anew, whatever `out` holds.
        console: Where progress and the table are shown; by default standard output.

    Raises:
        EvaluationError: If files are missing, not one picture can be scored, or `out` is another evaluation's.
        RunStoppedError: If the disk is full, or memory.
        DepthmillError: Also whatever labelling raises.
    """
    console = console or RunConsole(highlight=False)
    archive, samples = open_samples(wanted, data, split)
    with closing(archive), room_in(out):
        if isinstance(what, LabelConfig):
            what = _configure(wanted, what)
            make_folder(out)
            predictions = _label(wanted, archive, samples, out, what, overwrite, console)
        else:
            if isinstance(what, Folder):
                predictions = from_folder(what.path, samples, wanted.modality, what.normals_axes)
            else:
                predictions = from_store(what.path, samples, wanted.modality)
            make_folder(out)
            keep_figures(wanted.name, predictions, out, overwrite=overwrite)
        with progress_on(console) as progress:
            task = progress.add_task("scoring", total=len(samples))
            scores = score(wanted, archive, samples, predictions, advance=lambda: progress.advance(task))
        config = what.model_dump(mode="json") if isinstance(what, LabelConfig) else None
        write_report(out, wanted, scores, predictions, config)
        console.print(table(wanted, scores, predictions))
        for line in reasons(scores):
            warn(console, line)
        console.print(f"written: {out / 'metrics.json'}, {out / 'per_image.csv'}", soft_wrap=True)
    return scores


def label_options(wanted: EvaluationSet, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a labelling run for a set: `checkpoint` means the one of the set's modality."""
    changed = {**options, "labels": (wanted.modality,)}
    if wanted.modality == "normals":
        changed["normals_checkpoint"] = changed.pop("checkpoint")
        changed["normals_dtype"] = "int16"  # int8 is off by as much as good models differ
    return changed


def _configure(wanted: EvaluationSet, config: LabelConfig) -> LabelConfig:
    if config.labels != (wanted.modality,):
        raise ConfigError(f"labels is {list(config.labels)}; {wanted.name} asks for {wanted.modality} alone")
    (checkpoint,) = open_checkpoints(config)
    changes: dict[str, Any] = {}
    if "dtype" not in config.model_fields_set:
        changes["dtype"] = "float32"  # as the paper's figures are
    if config.round_aspect is None:
        changes["round_aspect"] = False  # the paper's pictures are not squeezed, however many there are
    if config.processing_resolution is None and checkpoint.processing_resolution == DEFAULT_RESOLUTION:
        changes["processing_resolution"] = wanted.resolution
    if config.domain is None and checkpoint.domain is not None:
        changes["domain"] = wanted.domain
    return config.model_copy(update=changes)


def _label(
    wanted: EvaluationSet,
    archive: Archive,
    samples: Sequence[Sample],
    out: Path,
    config: LabelConfig,
    overwrite: bool,
    console: Console,
) -> Predictions:
    with progress_on(console) as progress:
        every = progress.track(samples, description="checking")
        checksums = [(sample.name, zlib.crc32(archive.read(sample.picture))) for sample in every]
    claim(wanted.name, wanted.colours, checksums, out, overwrite=overwrite)
    pictures = out / "pictures"
    if overwrite:
        shutil.rmtree(pictures, ignore_errors=True)
    files = [file for file in pictures.rglob("*") if file.is_file() and not file.name.startswith(".")]
    there = {file.relative_to(pictures).with_suffix("").as_posix() for file in files}
    with progress_on(console) as progress:
        for sample in progress.track(samples, description="preparing"):
            if sample.name not in there:
                path = pictures / sample.picture
                write_picture(archive.read(sample.picture), path, crop=wanted.crop, colours=wanted.colours)
    store = out / "labels.zarr"
    label([str(pictures)], store, config, overwrite=overwrite, retry_failed=True, console=console)
    # Where `out` has been moved, those of the old place are there, too.
    return from_store(store, samples, wanted.modality, among=(source_id(pictures),))


def claim(
    name: str, colours: Colours | None, pictures: Sequence[tuple[str, int]], out: Path, *, overwrite: bool
) -> None:
    """Mark `out` as this evaluation's, so that `overwrite` never removes what no evaluation wrote.

    Args:
        name: Of the set.
        colours: Of it.
        pictures: Name, and CRC-32 of the file in the data, of each.
        out: The folder.
        overwrite: Whether what it holds is to be replaced.

    Raises:
        EvaluationError: If it is another's, or, without `overwrite`, of other pictures, or has other figures.
    """
    # A folder of another version's, where pictures had their own colours, is another's.
    called = name if colours is None else f"{name}, {colours.__name__}"
    marker = out / "evaluation.json"
    names, checksums = (list(values) for values in zip(*pictures, strict=True))
    made = {"set": called, "pictures": names, "checksums": checksums}
    if marker.is_file():
        before = made if overwrite else json.loads(marker.read_text(encoding="utf-8"))
        if "checksums" not in before or {**before, "checksums": checksums} != made:
            raise EvaluationError(
                f"{out} was made of another set or split, or by another version: give another --out, or --overwrite"
            )
        if changed := [one for one, old, new in zip(names, before["checksums"], checksums, strict=True) if old != new]:
            raise EvaluationError(
                f"{out} was made of other data: {some(changed)} changed since; expected the same pictures: give "
                "another --out, or --overwrite"
            )
    elif out.exists() and {entry.name for entry in out.iterdir()} - {"metrics.json", "per_image.csv", "per_clip.csv"}:
        raise EvaluationError(
            f"{out} has files in it that no evaluation wrote: give another --out; nothing was touched"
        )
    else:
        keep_figures(name, None, out, overwrite=overwrite)
    write_atomically(marker, (json.dumps(made, indent=1) + "\n").encode())


def keep_figures(name: str, predictions: Predictions | None, out: Path, *, overwrite: bool) -> None:
    """Refuse to replace figures of other predictions.

    Args:
        name: Of the set.
        predictions: What is to be scored; None if that is not labelled yet.
        out: The folder.
        overwrite: Whether the figures that it holds are to be replaced.

    Raises:
        EvaluationError: If it holds other figures, without `overwrite`.
    """
    figures = out / "metrics.json"
    if overwrite or not figures.is_file():
        return
    try:
        document = json.loads(figures.read_text(encoding="utf-8"))
        before = _scored(document["set"], document["checkpoint"], document["predictions"])
    except (ValueError, LookupError, TypeError):
        before = ("another program", "", "")
    if predictions is None or before != _scored(name, predictions.checkpoint, predictions.origin):
        of = ", ".join(word for word in before if word)
        raise EvaluationError(
            f"{out} holds the figures of {of}; expected none, or those of the same predictions: give another --out, or "
            "--overwrite"
        )


def _scored(name: str, checkpoint: str, origin: Mapping[str, Any]) -> tuple[str, str, str]:
    """Set, checkpoint and place of what was scored."""
    return name, checkpoint, canonical_uri(origin["store"] if "store" in origin else origin["predictions"])
