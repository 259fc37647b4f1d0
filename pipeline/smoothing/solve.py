"""Solve: one scale and shift a frame, from the edges of a whole video.

Two steps a shot, for the logarithm of the scales and then for the shifts. First a *track*: the values that make the
depths agree along every edge, by robust least squares. It removes flicker, but real change as well: a camera that moves
forward changes every depth by a little in every frame, and an edge cannot tell that from flicker. Only frequency can:
what is slow is kept. So, second, the track's own slow *trend* is taken off it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import solveh_banded

from depthmill.pipeline.smoothing.edges import FIELDS, GAPS
from depthmill.pipeline.smoothing.shots import find_shots

Floats = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]

_ROUNDS = 12
_LEAST_SPREAD = 0.25  # of the residuals, in standard deviations that their weights say: frozen frames have none
_HUBER = 1.345  # 95 % efficient on normal residuals
_TIE = 1e-6  # of the median weight: holds neighbours together where no edge does
_LEVEL = 1e-9  # how little the trend may slope, against how little it may bend
_LEAST_WEIGHT = 1e-3  # of the median weight: less is no trust at all
# What the solve finds in rendered clips that do not flicker, panning and forward (benchmarks/smoothing.md).
_SCALE_ERROR, _SHIFT_ERROR = 0.003, 0.001
_AROUND = 64  # frames to either side whose flicker is a frame's own
_LEAST_SCALE_WEIGHT = 100.0  # a log-scale that is off by 0.1 tells nothing: depth is flat there


@dataclass(frozen=True, eq=False)
class Solution:
    """What makes a video's depth consistent: scale * raw + shift.

    Attributes:
        scale: (N,) float32, greater than 0.
        shift: (N,) float32, in the unit of the raw depth.
        shot: (N,) int32, number of the shot of each frame; scale and shift of two shots have nothing to do with each
            other.
    """

    scale: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    shot: npt.NDArray[np.int32]


def solve(edges: Floats, score: Floats, labelled: npt.NDArray[np.bool_], *, leak: float) -> Solution:
    """Find the shots, and each frame's scale and shift.

    Args:
        edges: (N, gaps, FIELDS) of `segment_edges`; NaN where there is no edge.
        score: (N,) of `segment_edges`.
        labelled: (N,) whether a frame has a label; the others get what lies between their neighbours'.
        leak: Radians a frame, 0 or from 0.001 on: below, float64 has too few digits. Changes of the raw scale and shift
            that are slower stay, faster ones go; half of a change of exactly this frequency stays, if it is from 0.002
            to 0.5 (0.54 at 1, and 0.67 at 0.001). At 0 nothing but each shot's mean stays.
    """
    shot = find_shots(score, edges, labelled)
    scale, shift = np.ones(len(shot)), np.zeros(len(shot))
    starts = np.flatnonzero(np.diff(shot, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(shot)], strict=True):
        part = slice(start, stop)
        scale[part], shift[part] = _shot(edges[part], labelled[part], leak)
    return Solution(scale.astype(np.float32), shift.astype(np.float32), shot)


def _shot(edges: Floats, labelled: npt.NDArray[np.bool_], leak: float) -> tuple[Doubles, Doubles]:
    """Scale and shift of the frames of one shot."""
    log_scale, later, earlier, scale_weight, shift_weight = (
        edges[..., FIELDS.index(name)] for name in ("log_scale", "later", "earlier", "scale_weight", "shift_weight")
    )
    frames = len(edges)
    scale_weight = np.where(scale_weight >= _LEAST_SCALE_WEIGHT, scale_weight, np.float32(0))
    log = _trusted(_without_trend(_track(log_scale, scale_weight), labelled, leak), _SCALE_ERROR)
    scale = np.exp(log)
    # scale[t - g] * earlier + shift[t - g] = scale[t] * later + shift[t]
    step = np.full_like(later, np.nan)
    for row, gap in enumerate(GAPS[: edges.shape[1]]):
        if gap < frames:
            step[gap:, row] = scale[:-gap] * earlier[gap:, row] - scale[gap:] * later[gap:, row]
    shift = _without_trend(_track(step, shift_weight), labelled, leak)
    # What becomes of the middle of the depths, which no longer depends on the scale.
    inside = later[np.isfinite(step)]
    middle = float(np.median(inside)) if inside.size else 0.5
    moved = _trusted(scale * middle + shift - middle, _SHIFT_ERROR)
    return scale, middle + moved - scale * middle


def _trusted(correction: Doubles, error: float) -> Doubles:
    """A correction without what may be the solve's own error.

    A Wiener filter, 1 - error² / variance, of the variance of `_AROUND` frames to either side: where a shot hardly
    flickers it is left as it is, rather than given the errors of its flow, however much it flickers elsewhere. A frame
    that stands out alone hardly raises that variance, so each keeps 1 - (3 error / correction)² at least: the
    nonnegative garrote (Breiman, Technometrics 37, 1995) at three standard deviations.

    Args:
        correction: (N,) of a shot.
        error: Standard deviation that it has where nothing flickers.
    """
    square = np.square(correction)
    sums, frame = np.cumsum([0.0, *square]), np.arange(len(square))
    start, stop = np.maximum(frame - _AROUND, 0), np.minimum(frame + _AROUND + 1, len(square))
    variance = (sums[stop] - sums[start]) / (stop - start)
    lost, least = error**2 / np.maximum(variance, error**2), (3 * error) ** 2
    kept: Doubles = 1 - np.minimum(lost, least / np.maximum(square, least))
    return correction * kept


def _track(step: Floats, weight: Floats) -> Doubles:
    """Values u, up to a constant, with u[t] - u[t - g] nearest to step[t, g]: robust least squares.

    Iteratively reweighted by Huber's function of the residuals in units of their own spread (Holland and Welsch, Comm.
    Statist. A6, 1977), but not of less than `_LEAST_SPREAD`: where most frames repeat the one before, most residuals
    are 0, and all that flickers would be outliers. The normal equations are banded, `max_edge` wide: time and memory
    are linear in the frames. The pairs are float32, as they were measured.

    Args:
        step: (N, gaps); NaN where unknown.
        weight: (N, gaps) inverse variances.
    """
    frames, gaps = step.shape
    spans = [gap for gap in GAPS[:gaps] if gap < frames]
    known = np.isfinite(step) & (weight > 0)
    for row, gap in enumerate(GAPS[:gaps]):
        known[:gap, row] = False  # leads out of the shot
    if frames == 1 or not known.any():
        return np.zeros(frames)
    typical = np.median(weight[known])
    weight = np.where(known & (weight >= _LEAST_WEIGHT * typical), weight / typical, np.float32(0))
    used, robust = weight > 0, weight
    step = np.where(used, step, np.float32(0))
    for _ in range(_ROUNDS):
        u = _least_squares(step, robust, spans)
        residual = np.zeros_like(step)
        for row, gap in enumerate(spans):
            residual[gap:, row] = u[gap:] - u[:-gap] - step[gap:, row]
        size = np.abs(residual) * np.sqrt(weight)
        spread = max(1.4826 * float(np.median(size[used])), _LEAST_SPREAD / float(np.sqrt(typical)))
        robust = weight / np.maximum(size / (_HUBER * spread), 1)
    return u


def _least_squares(step: Floats, weight: Floats, spans: list[int]) -> Doubles:
    """Solve the normal equations of `_track` for given weights, the first value held near 0."""
    frames = len(step)
    # Lower form: bands[g, t] is A[t + g, t]; in the order that LAPACK wants, lest it copy.
    bands, right = np.zeros((spans[-1] + 1, frames), order="F"), np.zeros(frames)
    for row, gap in enumerate(spans):
        w = weight[gap:, row].astype(np.float64)
        pull = w * step[gap:, row]
        w += _TIE if gap == 1 else 0.0
        bands[0, gap:] += w
        bands[0, :-gap] += w
        bands[gap, :-gap] -= w
        right[gap:] += pull
        right[:-gap] -= pull
    bands[0, 0] += 1.0
    u: Doubles = solveh_banded(bands, right, lower=True, overwrite_ab=True, overwrite_b=True, check_finite=False)
    return u


def _without_trend(track: Doubles, labelled: npt.NDArray[np.bool_], leak: float) -> Doubles:
    """Take off a track what is slower than the leak: the correction that leaves the raw prediction its slow changes.

    The trend c of a track x minimises leak⁴ Σ (x - c)² + Σ (second difference of c)², Whittaker's smoother (Proc.
    Edinburgh Math. Soc. 41, 1923), of which a share 1 / (1 + (ω / leak)⁴) of frequency ω passes. Unlike a penalty of
    the correction itself, it leaves steady motion as it is up to a shot's ends. A tiny penalty of first differences
    lets the trend go to the mean, not to a line, as the leak goes to 0.
    """
    x = track - (track[labelled].mean() if labelled.any() else 0.0)
    frames = len(x)
    if frames == 1 or leak == 0:
        return x
    data = leak**4 * labelled + 1e-12
    bands = np.zeros((min(frames, 3), frames))
    bands[0] += data
    for order, penalty, stencil in ((1, _LEVEL, (1.0, -1.0)), (2, 1.0, (1.0, -2.0, 1.0)))[: len(bands) - 1]:
        for i, a in enumerate(stencil):
            for j, b in enumerate(stencil[: i + 1]):
                bands[i - j, j : frames - order + j] += penalty * a * b
    trend: Doubles = solveh_banded(bands, data * x, lower=True, overwrite_ab=True, overwrite_b=True)
    return x - trend
