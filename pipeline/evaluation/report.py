"""What an evaluation leaves: a table for people, `metrics.json` and `per_image.csv` for programs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

import depthmill
from depthmill.pipeline.evaluation.datasets import EvaluationSet
from depthmill.pipeline.evaluation.metrics import DEPTH_METRICS, NORMALS_METRICS
from depthmill.pipeline.evaluation.predictions import Predictions
from depthmill.pipeline.evaluation.score import Scores
from depthmill.pipeline.store import write_atomically

_LABELS = {
    "depth": dict(zip(DEPTH_METRICS, ("AbsRel", "δ1", "δ2", "δ3", "RMSE, m", "log10", "SI-log × 100"), strict=True)),
    "normals": {
        name: f"{name.replace('_', ' ')}°, %" if name.startswith("under_") else f"{name.replace('rmse', 'RMSE')}, °"
        for name in NORMALS_METRICS
    },
}
_REASONS_SHOWN = 10

# AbsRel, and mean angles in degrees, of the paper's models: README of E2E-FT's repository, section Metrics (the AbsRel
# there is in per cent).
_SOURCE = "E2E-FT, README, section Metrics"
_SETS = {
    "depth": ("nyuv2", "kitti", "eth3d", "scannet", "diode"),
    "normals": ("nyuv2-normals", "scannet-normals", "ibims", "sintel"),
}
_PAPER: dict[tuple[str, str], tuple[str, tuple[float, ...]]] = {
    ("stable-diffusion-e2e-ft-depth", "depth"): ("Stable Diffusion + E2E FT", (0.054, 0.096, 0.064, 0.058, 0.303)),
    ("marigold-e2e-ft-depth", "depth"): ("Marigold + E2E FT", (0.052, 0.096, 0.062, 0.058, 0.302)),
    ("geowizard-e2e-ft", "depth"): ("GeoWizard + E2E FT", (0.056, 0.098, 0.063, 0.059, 0.306)),
    ("stable-diffusion-e2e-ft-normals", "normals"): ("Stable Diffusion + E2E FT", (16.5, 15.3, 16.1, 33.5)),
    ("marigold-e2e-ft-normals", "normals"): ("Marigold + E2E FT", (16.2, 14.7, 15.8, 33.5)),
    ("geowizard-e2e-ft", "normals"): ("GeoWizard + E2E FT", (16.1, 14.7, 16.2, 33.4)),
}


def paper_figures(wanted: EvaluationSet, checkpoint: str) -> tuple[str, dict[str, float]]:
    """What the paper reports of a set.

    Args:
        wanted: The set.
        checkpoint: Name of a published checkpoint, or of its directory; for any other, Marigold + E2E FT stands.

    Returns:
        Whose figures, and the figures; none if the paper has none of this set.
    """
    modality = wanted.modality
    stand_in = (f"marigold-e2e-ft-{modality}", modality)
    model, figures = _PAPER.get((Path(checkpoint).name, modality), _PAPER[stand_in])
    if wanted.name not in _SETS[modality]:
        return model, {}
    return model, {"abs_rel" if modality == "depth" else "mean": figures[_SETS[modality].index(wanted.name)]}


def write_report(
    out: Path, wanted: EvaluationSet, scores: Scores, predictions: Predictions, config: Mapping[str, Any] | None
) -> None:
    """Write `metrics.json` and `per_image.csv` into the folder `out`.

    Args:
        out: The folder; made if it is not there.
        wanted: The set.
        scores: What came of it.
        predictions: What was scored.
        config: The labelling run's options, if the predictions come from one.
    """
    model, paper = paper_figures(wanted, predictions.checkpoint)
    document = {
        "set": wanted.name,
        "title": wanted.title,
        "modality": wanted.modality,
        "metrics": scores.metrics,
        "how": "affine least-squares alignment; means over pictures"
        if wanted.modality == "depth"
        else "pooled over all valid pixels; angles in degrees, shares in per cent",
        "paper": {"model": model, "metrics": paper, "source": _SOURCE},
        "pictures": len(scores.rows),
        "pixels": sum(row.pixels for row in scores.rows),
        "nan_pixels": sum(row.nan_pixels for row in scores.rows),
        "skipped": [{"name": skip.name, "reason": skip.reason} for skip in scores.skipped],
        "checkpoint": predictions.checkpoint,
        "predictions": predictions.origin,
        "config": config,
        "depthmill": depthmill.__version__,
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(out / "metrics.json", text.encode())
    write_atomically(out / "per_image.csv", _csv(wanted, scores).encode())


def _csv(wanted: EvaluationSet, scores: Scores) -> str:
    names = DEPTH_METRICS if wanted.modality == "depth" else NORMALS_METRICS
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    fit = ("scale", "shift") if wanted.modality == "depth" else ()
    writer.writerow(["name", *names, *fit, "pixels", "nan_pixels", "skipped"])
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
    writer.writerows([name, *lines[name]] for name in sorted(lines))
    return buffer.getvalue()


def table(wanted: EvaluationSet, scores: Scores, checkpoint: str) -> Table:
    """The set's figures, the paper's beside them."""
    model, paper = paper_figures(wanted, checkpoint)
    shown = Table(title=f"{wanted.title}: {len(scores.rows)} pictures, {len(scores.skipped)} skipped")
    shown.add_column("")
    shown.add_column(checkpoint or "predictions", justify="right")
    if paper:
        shown.add_column(f"paper: {model}", justify="right")
    for name, value in scores.metrics.items():
        beside = [_text(wanted, name, paper[name], paper=True) if name in paper else ""] if paper else []
        shown.add_row(_LABELS[wanted.modality][name], _text(wanted, name, value), *beside)
    return shown


def reasons(scores: Scores) -> list[str]:
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
