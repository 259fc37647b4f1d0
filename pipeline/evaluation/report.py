"""What an evaluation leaves: a table for people, `metrics.json` and `per_image.csv` for programs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import depthmill
from depthmill.pipeline.errors import printable
from depthmill.pipeline.evaluation.datasets import EvaluationSet
from depthmill.pipeline.evaluation.metrics import DEPTH_METRICS, NORMALS_METRICS
from depthmill.pipeline.evaluation.predictions import Predictions
from depthmill.pipeline.evaluation.score import Row, Scores
from depthmill.pipeline.store import write_atomically

_LABELS = {
    "depth": dict(zip(DEPTH_METRICS, ("AbsRel", "δ1", "δ2", "δ3", "RMSE, m", "log10", "SI-log × 100"), strict=True)),
    "normals": {
        name: f"{name.replace('_', ' ')}°, %" if name.startswith("under_") else f"{name.replace('rmse', 'RMSE')}, °"
        for name in NORMALS_METRICS
    },
}
_REASONS_SHOWN = 10

# The paper's tables (Martin Garcia et al., WACV 2025). Of each set, depth: AbsRel and δ1, in per cent; normals: mean
# angle in degrees, and per cent under 11.25°. The README of the paper's code has the mean angles on ScanNet of Stable
# Diffusion and of GeoWizard the other way round.
_SOURCE = {"depth": "arXiv 2409.11355v2, tables 1 and A-3", "normals": "arXiv 2409.11355v2, tables 2 and 3"}
_SETS = {
    "depth": ("nyuv2", "kitti", "eth3d", "scannet", "diode"),
    "normals": ("nyuv2-normals", "scannet-normals", "ibims", "sintel"),
}
_PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "depth": {
        "Marigold, 50 leading steps x 10": (5.5, 96.4, 9.9, 91.6, 6.5, 96.0, 6.4, 95.1, 30.8, 77.3),
        "Marigold, 50 leading steps": (6.0, 95.9, 10.5, 90.4, 7.1, 95.1, 6.9, 94.5, 31.0, 77.2),
        "Marigold, 1 trailing step": (5.7, 96.2, 10.8, 89.6, 6.9, 95.5, 6.6, 95.2, 31.1, 76.8),
        "Marigold + E2E FT": (5.2, 96.6, 9.6, 91.9, 6.2, 95.9, 5.8, 96.2, 30.2, 77.9),
        "Stable Diffusion + E2E FT": (5.4, 96.5, 9.6, 92.1, 6.4, 95.9, 5.8, 96.5, 30.3, 77.6),
        "GeoWizard, 1 trailing step": (5.8, 96.1, 13.3, 84.7, 7.8, 94.3, 6.2, 95.7, 32.0, 76.0),
        "GeoWizard + E2E FT": (5.6, 96.1, 9.8, 91.4, 6.3, 95.7, 5.9, 96.2, 30.6, 77.9),
    },
    "normals": {
        "Marigold, 50 leading steps x 10": (18.8, 55.9, 17.7, 58.8, 18.4, 64.3, 39.1, 14.9),
        "Marigold, 1 trailing step": (17.4, 56.5, 16.8, 57.6, 18.1, 62.9, 37.1, 15.7),
        "Marigold + E2E FT": (16.2, 61.4, 14.7, 66.0, 15.8, 69.9, 33.5, 21.5),
        "Stable Diffusion + E2E FT": (16.5, 60.4, 14.7, 66.1, 16.1, 69.7, 33.5, 22.3),
        "GeoWizard, 1 trailing step": (17.0, 54.1, 15.5, 59.3, 18.3, 62.5, 35.9, 15.6),
        "GeoWizard + E2E FT": (16.1, 60.7, 15.3, 63.6, 16.2, 69.4, 33.4, 22.4),
    },
}
_MODELS = {
    "stable-diffusion-e2e-ft-depth": "Stable Diffusion + E2E FT",
    "stable-diffusion-e2e-ft-normals": "Stable Diffusion + E2E FT",
    "geowizard-e2e-ft": "GeoWizard + E2E FT",
    "geowizard": "GeoWizard, 1 trailing step",
    "marigold-depth-v1-0": "Marigold, 1 trailing step",
    "marigold-normals": "Marigold, 1 trailing step",
}
_MANY_STEPS = {(50, 10): "Marigold, 50 leading steps x 10", (50, 1): "Marigold, 50 leading steps"}


def paper_figures(wanted: EvaluationSet, predictions: Predictions) -> tuple[str, dict[str, float]]:
    """What the paper reports of a set: tables 1 and A-3 for depth, 2 and 3 for normals, of arXiv 2409.11355v2.

    Args:
        wanted: The set.
        predictions: Whose checkpoint, a published one or a directory of its name, and steps and ensemble decide whose
            figures they are. If it is none of the paper's, Marigold + E2E FT stands; for a number of steps that the
            tables lack, its single step.

    Returns:
        Whose figures, and the figures; none if the paper has none of this set.
    """
    rows, checkpoint = _PAPER[wanted.modality], predictions.checkpoint.casefold()
    names = (Path(checkpoint).name, Path(checkpoint.partition("@")[0]).name)  # a directory's; a hub id's, unrevised
    model = next((_MODELS[name] for name in names if name in _MODELS), "Marigold + E2E FT")
    if model == "Marigold, 1 trailing step":
        sampling = predictions.origin.get("identity", {}).get("sampling", {})
        many = _MANY_STEPS.get((sampling.get("steps", 1), sampling.get("ensemble", 1)), model)
        model = many if many in rows else model
    if wanted.name not in _SETS[wanted.modality]:
        return model, {}
    at = 2 * _SETS[wanted.modality].index(wanted.name)
    first, second = rows[model][at : at + 2]
    if wanted.modality == "depth":
        return model, {"abs_rel": round(first / 100, 3), "delta1": round(second / 100, 3)}
    return model, {"mean": first, "under_11.25": second}


def write_report(
    out: Path, wanted: EvaluationSet, scores: Scores[Row], predictions: Predictions, config: Mapping[str, Any] | None
) -> None:
    """Write `metrics.json` and `per_image.csv` into the folder `out`; `config` is the labelling run's, if any."""
    model, paper = paper_figures(wanted, predictions)
    document = {
        "set": wanted.name,
        "title": wanted.title,
        "modality": wanted.modality,
        "metrics": scores.metrics,
        "how": "affine least-squares alignment; means over pictures"
        if wanted.modality == "depth"
        else "pooled over all valid pixels; angles in degrees, shares in per cent",
        "paper": {"model": model, "metrics": paper, "source": _SOURCE[wanted.modality]},
        "pictures": len(scores.rows),
        "pixels": sum(row.pixels for row in scores.rows),
        "nan_pixels": sum(row.nan_pixels for row in scores.rows),
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in scores.skipped],
        "checkpoint": predictions.checkpoint,
        "predictions": predictions.origin,
        "config": config,
        "depthmill": depthmill.__version__,
    }
    write_files(out, document, "per_image.csv", _lines(wanted, scores))


def write_files(out: Path, document: Mapping[str, Any], table: str, lines: Iterable[Sequence[Any]]) -> None:
    """Write `metrics.json`, the document, and a CSV file called `table`, the lines, into the folder `out`."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    for name, content in (("metrics.json", text), (table, buffer.getvalue())):
        write_atomically(out / name, content.encode(errors="backslashreplace"))  # names may be no UTF-8


def _lines(wanted: EvaluationSet, scores: Scores[Row]) -> list[list[Any]]:
    names = DEPTH_METRICS if wanted.modality == "depth" else NORMALS_METRICS
    fit = ("scale", "shift") if wanted.modality == "depth" else ()
    lines = {
        row.name: [
            *(row.metrics[name] for name in names),
            *(getattr(row, name) for name in fit),
            row.pixels,
            row.nan_pixels,
            "",
        ]
        for row in scores.rows
    } | {skip.name: [*[""] * (len(names) + len(fit)), "", "", skip.reason] for skip in scores.skipped}
    head = ["name", *names, *fit, "pixels", "nan_pixels", "skipped"]
    return [head, *([name, *lines[name]] for name in sorted(lines))]


def table(wanted: EvaluationSet, scores: Scores[Row], predictions: Predictions) -> Table:
    """The set's figures, the paper's beside them."""
    model, paper = paper_figures(wanted, predictions)
    shown = Table(title=f"{wanted.title}: {len(scores.rows)} pictures, {len(scores.skipped)} skipped")
    shown.add_column("")
    shown.add_column(Text(printable(predictions.checkpoint or "predictions")), justify="right")
    if paper:
        shown.add_column(f"paper: {model}", justify="right")
    for name, value in scores.metrics.items():
        beside = [_text(wanted, name, paper[name], paper=True) if name in paper else ""] if paper else []
        shown.add_row(_LABELS[wanted.modality][name], _text(wanted, name, value), *beside)
    return shown


def reasons(scores: Scores[Row]) -> list[str]:
    """Why pictures were skipped, the most frequent first, and what the ground truth has of NaN: lines for people."""
    counted = Counter(skip.reason for skip in scores.skipped).most_common()
    lines = [f"{count} skipped: {reason}" for reason, count in counted[:_REASONS_SHOWN]]
    if len(counted) > _REASONS_SHOWN:
        lines.append(f"{len(counted) - _REASONS_SHOWN} more reasons, in metrics.json")
    pixels = sum(row.nan_pixels for row in scores.rows)
    if pixels:
        pictures = sum(row.nan_pixels > 0 for row in scores.rows)
        lines.append(f"{pixels} pixels of {pictures} pictures are NaN or infinite in the ground truth: not scored")
    return lines


def _text(wanted: EvaluationSet, name: str, value: float, *, paper: bool = False) -> str:
    digits = 2 if wanted.modality == "normals" or name == "silog" else 4
    return f"{value:.{digits - paper}f}"
