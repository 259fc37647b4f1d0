"""Predictions against ground truth: each picture's figures, and the set's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import EvaluationError, UnscorableError
from depthmill.pipeline.evaluation.archive import Archive
from depthmill.pipeline.evaluation.datasets import EvaluationSet
from depthmill.pipeline.evaluation.decode import Floats
from depthmill.pipeline.evaluation.metrics import (
    DEPTH_METRICS,
    AnglePool,
    Moments,
    angles_deg,
    depth_metrics,
    normals_metrics,
    thin_columns,
    unscorable,
)
from depthmill.pipeline.evaluation.predictions import Predictions
from depthmill.pipeline.evaluation.samples import Sample, Truth, read_truth
from depthmill.pipeline.machine import cores

R = TypeVar("R")

_THREADS = 4  # ETH3D takes about a gigabyte in each


@dataclass(frozen=True)
class Row:
    """One picture that was scored.

    Attributes:
        name: Of the sample.
        metrics: Its figures.
        pixels: How many were scored.
        nan_pixels: How many the ground truth has as NaN or infinite; none of them was scored.
        scale: Of the alignment; NaN for normals.
        shift: Of the alignment, metres; NaN for normals.
    """

    name: str
    metrics: dict[str, float]
    pixels: int
    nan_pixels: int
    scale: float = np.nan
    shift: float = np.nan


@dataclass(frozen=True)
class Skip:
    """One picture, or clip, that could not be scored, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Scores(Generic[R]):
    """Outcome of an evaluation.

    Attributes:
        metrics: The set's figures. Depth: means over pictures, as Marigold. Normals: pooled over pixels, as DSINE. Of
            clips: means over those that have a figure; NaN if none has.
        rows: Pictures, or clips, that were scored, in the order of the set.
        skipped: Those that were not.
    """

    metrics: dict[str, float]
    rows: tuple[R, ...]
    skipped: tuple[Skip, ...]


def score(
    wanted: EvaluationSet,
    archive: Archive,
    samples: Sequence[Sample],
    predictions: Predictions,
    *,
    advance: Callable[[], object] = lambda: None,
) -> Scores[Row]:
    """Score pictures of a set; `advance` is called after each.

    Raises:
        EvaluationError: If not one picture can be scored.
    """
    pool = AnglePool()
    rows: list[Row] = []
    skipped: list[Skip] = []

    def one(sample: Sample) -> tuple[Row, npt.NDArray[np.float32] | None] | Skip:
        try:
            return _score_one(wanted, sample, read_truth(wanted, archive, sample), predictions.read(sample))
        except UnscorableError as error:
            return Skip(sample.name, str(error))

    with ThreadPoolExecutor(min(_THREADS, cores()), "depthmill-score") as threads:
        for outcome in threads.map(one, samples):  # in order, so that sums round alike in every run
            if isinstance(outcome, Skip):
                skipped.append(outcome)
            else:
                row, angles = outcome
                rows.append(row)
                if angles is not None:
                    pool.add(angles)
            advance()
    if not rows:
        raise EvaluationError(
            f"none of the {len(skipped)} pictures of {wanted.name} can be scored; {skipped[0].name}: "
            f"{skipped[0].reason}"
        )
    if wanted.modality == "normals":
        metrics = pool.metrics()
    else:
        metrics = {name: float(np.mean([row.metrics[name] for row in rows])) for name in DEPTH_METRICS}
    return Scores(metrics, tuple(rows), tuple(skipped))


def _score_one(
    wanted: EvaluationSet, sample: Sample, truth: Truth, prediction: Floats
) -> tuple[Row, npt.NDArray[np.float32] | None]:
    if prediction.shape != truth.values.shape:
        raise UnscorableError(
            f"its prediction is of shape {prediction.shape}, its ground truth of {truth.values.shape}"
            + (" (after the set's crop)" if wanted.crop else "")
        )
    p, t = prediction[truth.mask], truth.values[truth.mask]
    if bad := int(unscorable(p).reshape(len(p), -1).any(1).sum()):
        raise UnscorableError(f"its prediction is NaN, infinite or above 3.4e38 at {bad} of {len(p)} valid pixels")
    if wanted.modality == "normals":
        angles = angles_deg(p, t)
        return Row(sample.name, normals_metrics(angles), len(p), truth.nan_pixels), angles.astype(np.float32)
    columns = slice(None) if wanted.fit_columns is None else thin_columns(truth.mask.shape[1], wanted.fit_columns)
    fitted = truth.mask[:, columns]
    if not fitted.any():
        raise UnscorableError(f"none of its {len(p)} valid pixels is in the columns that the alignment is fitted on")
    scale, shift = Moments.of(prediction[:, columns][fitted], truth.values[:, columns][fitted]).affine
    metrics = depth_metrics(p, t, scale, shift, wanted.valid_range)
    return Row(sample.name, metrics, len(p), truth.nan_pixels, scale, shift), None
