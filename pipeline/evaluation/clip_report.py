"""What an evaluation on clips leaves: a table for people, `metrics.json` and `per_clip.csv` for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

import depthmill
from depthmill.pipeline.errors import printable
from depthmill.pipeline.evaluation.clip_score import CLIP_METRICS, ClipRow
from depthmill.pipeline.evaluation.clips import ClipSet
from depthmill.pipeline.evaluation.predictions import Predictions
from depthmill.pipeline.evaluation.report import write_files
from depthmill.pipeline.evaluation.score import Scores

_LABELS = {
    "abs_rel": "AbsRel",
    "delta1": "δ1",
    "tae": "TAE",
    "scale_spread": "ln scale, spread",
    "scale_flicker": "ln scale, frame to frame",
    "shift_spread": "shift, spread",
    "shift_flicker": "shift, frame to frame",
}
_COUNTS = ("frames", "pixels", "scale", "shift", "empty", "pairs", "unpaired")


def write_clip_report(
    out: Path,
    wanted: ClipSet,
    scores: Mapping[str, Scores[ClipRow]],
    predictions: Mapping[str, Predictions],
    config: dict[str, Any] | None,
) -> None:
    """Write `metrics.json` and `per_clip.csv`, as `write_report`; scored are `raw` and, maybe, `smoothed` labels."""
    document = {
        "set": wanted.name,
        "title": wanted.title,
        "metrics": {which: _known(one.metrics) for which, one in scores.items()},
        "how": "one affine least-squares fit a clip, in depth; means over frames, then over clips",
        "clips": {which: len(one.rows) for which, one in scores.items()},
        "skipped": {
            which: [{"name": skip.name, "reason": skip.reason} for skip in one.skipped] for which, one in scores.items()
        },
        "checkpoint": predictions["raw"].checkpoint,
        "predictions": predictions["raw"].origin,
        "config": config,
        "depthmill": depthmill.__version__,
    }
    lines: list[list[Any]] = [["name", "labels", *CLIP_METRICS, *_COUNTS, "skipped"]]
    for which, one in scores.items():
        for row in one.rows:
            known = _known(row.metrics)
            figures = ["" if known[name] is None else known[name] for name in CLIP_METRICS]
            lines.append([row.name, which, *figures, *(getattr(row, name) for name in _COUNTS), ""])
        for skip in one.skipped:
            lines.append([skip.name, which, *[""] * (len(CLIP_METRICS) + len(_COUNTS)), skip.reason])
    write_files(out, document, "per_clip.csv", lines)


def clip_table(wanted: ClipSet, scores: Mapping[str, Scores[ClipRow]], checkpoint: str) -> Table:
    """The set's figures, raw beside smoothed."""
    raw = scores["raw"]
    title = f"{wanted.title}: {len(raw.rows)} clips, {sum(row.frames for row in raw.rows)} frames"
    shown = Table(title=f"{title}, {len(raw.skipped)} clips skipped")
    shown.add_column(Text(printable(checkpoint or "predictions")))
    for which in scores:
        shown.add_column(which, justify="right")
    for name in CLIP_METRICS:
        values = [one.metrics[name] for one in scores.values()]
        shown.add_row(_LABELS[name], *("-" if math.isnan(value) else f"{value:.4f}" for value in values))
    return shown


def clip_reasons(scores: Mapping[str, Scores[ClipRow]]) -> list[str]:
    """What was left out, and why: lines for people."""
    lines = [f"{skip.name} skipped, {which}: {skip.reason}" for which, one in scores.items() for skip in one.skipped]
    rows = scores["raw"].rows
    empty, pairs, unpaired = (sum(getattr(row, name) for row in rows) for name in ("empty", "pairs", "unpaired"))
    if empty:
        lines.append(f"{empty} frames have no valid depth: not scored")
    if unpaired and pairs:
        lines.append(f"TAE is of {pairs} pairs of frames; {unpaired} have no poses, or nothing in common")
    if not pairs:
        lines.append("no TAE: no two consecutive frames have poses (pose), intrinsics (K) and something in common")
    return lines


def _known(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}
