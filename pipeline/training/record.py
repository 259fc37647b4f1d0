"""What a run leaves to be looked at: the table of losses; figures and a sheet of held-out pictures.

Figures are the evaluation's own (`evaluation/metrics.py`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from depthmill.pipeline.evaluation.metrics import Moments, angles_deg, depth_metrics
from depthmill.pipeline.store import write_atomically


class LossTable:
    """`losses.csv`: a row a step. The file is not touched before the first row is written.

    Args:
        path: Of the file, which may have an earlier call's rows.
        stays: Whether one of those, by column, is of a step that will not be done again; the others are dropped.
    """

    def __init__(self, path: Path, stays: Callable[[Mapping[str, str]], bool]):
        self._path, self._stays = path, stays
        self._rows: csv.DictWriter[str] | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; the first one decides the columns."""
        if self._rows is None:
            before: list[dict[str, str]] = []
            if self._path.exists():
                with self._path.open(newline="") as file:  # whose last row a full disk may have cut
                    before = [one for one in csv.DictReader(file) if None not in one.values() and self._stays(one)]
            text = io.StringIO(newline="")
            kept = csv.DictWriter(text, list(row), extrasaction="ignore")
            kept.writeheader()
            kept.writerows(before)
            write_atomically(self._path, text.getvalue().encode())
            self._file = self._path.open("a", newline="")
            self._rows = csv.DictWriter(self._file, list(row), extrasaction="ignore")
        self._rows.writerow(row)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rows is not None:
            self._file.close()


def abs_rel(prediction: Tensor, depth: Tensor, mask: Tensor, depth_range: tuple[float, float]) -> float:
    """AbsRel after affine alignment, mean over the pictures that have truth; NaN if none has.

    Args:
        prediction: (B, H, W), affine-invariant.
        depth: (B, H, W), greater than 0 where `mask` is True.
        mask: (B, H, W) bool.
        depth_range: What aligned predictions are held to, in the unit of `depth`.
    """
    figures = []
    for p, t, valid in zip(*(part.cpu().numpy() for part in (prediction.float(), depth, mask)), strict=True):
        if valid.any():
            affine = Moments.of(p[valid], t[valid]).affine
            figures.append(depth_metrics(p[valid], t[valid], *affine, depth_range)["abs_rel"])
    return float(np.mean(figures)) if figures else float("nan")


def mean_angle_deg(prediction: Tensor, normals: Tensor, mask: Tensor) -> float:
    """Mean angle between normals (B, 3, H, W), over all pixels where `mask` (B, H, W) is True; NaN if there is none."""
    p, t = (part.float().movedim(1, -1)[mask].cpu().numpy() for part in (prediction, normals))
    return float(angles_deg(p, t).mean()) if len(p) else float("nan")


def draw_sheet(rows: Sequence[Tensor], path: Path) -> None:
    """Save rows of pictures, (B, 3, H, W) in [0, 1] each, below one another."""
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()).save(path)
