"""The figures, in float64: depth by Marigold's definitions, normals by DSINE's.

Depth: Marigold (Ke et al., CVPR 2024, section 4.1), in the code that E2E-FT evaluates with: `src/util/metric.py` and
`src/util/alignment.py`. Normals: DSINE (Bae and Davison, CVPR 2024, section 5), `utils/utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

DEPTH_METRICS = ("abs_rel", "delta1", "delta2", "delta3", "rmse", "log10", "silog")
_ANGLES_DEG = {"under_5": 5.0, "under_7.5": 7.5, "under_11.25": 11.25, "under_22.5": 22.5, "under_30": 30.0}
NORMALS_METRICS = ("mean", "median", "rmse", *_ANGLES_DEG)

_LEAST_DEPTH = 1e-6  # an aligned depth is at least this, so that it has a logarithm
_BINS_PER_DEGREE = 1000


@dataclass(frozen=True)
class Moments:
    """What a least-squares fit needs of pairs of prediction p and truth t: a frame's, or a clip's.

    Attributes:
        count: Pairs.
        p: Mean of the predictions.
        t: Mean of the truths.
        pp: Σ (p - mean)².
        pt: Σ (p - mean) (t - mean).
    """

    count: int
    p: float
    t: float
    pp: float
    pt: float

    @classmethod
    def of(cls, prediction: Floats, truth: Floats) -> Moments:
        """Of (N,) pairs, N >= 1, finite."""
        p, t = prediction.astype(np.float64), truth.astype(np.float64)
        mean_p, mean_t = float(p.mean()), float(t.mean())
        p -= mean_p
        return cls(len(p), mean_p, mean_t, float((p * p).sum()), float((p * (t - mean_t)).sum()))

    @classmethod
    def pooled(cls, parts: Sequence[Moments]) -> Moments:
        """Of all pairs of the parts (Chan et al., The American Statistician 37, 1983)."""
        counts = np.array([one.count for one in parts], np.float64)
        p, t = (float(np.average([getattr(one, name) for one in parts], weights=counts)) for name in ("p", "t"))
        pp = sum(one.pp + one.count * (one.p - p) ** 2 for one in parts)
        pt = sum(one.pt + one.count * (one.p - p) * (one.t - t) for one in parts)
        return cls(int(counts.sum()), p, t, pp, pt)

    @property
    def affine(self) -> tuple[float, float]:
        """Scale and shift that bring the predictions nearest to the truths, by least squares.

        From the centred normal equations, scale = cov(p, t) / var(p), which lose no digits where the mean is large
        against the spread. Constant predictions get scale 0 and the truths' mean.
        """
        rounding = 4 * np.finfo(np.float64).eps * abs(self.p)  # what a mean may be off by
        scale = self.pt / self.pp if self.pp > self.count * rounding**2 else 0.0
        return scale, self.t - scale * self.p


def unscorable(prediction: Floats) -> npt.NDArray[np.bool_]:
    """Where a prediction of any shape is NaN, infinite, or beyond float32: float64 cannot hold sums of such squares."""
    beyond: npt.NDArray[np.bool_] = ~(np.abs(prediction) <= np.finfo(np.float32).max)
    return beyond


def thin_columns(width: int, wanted: int) -> npt.NDArray[np.intp]:
    """The columns that Marigold's `--alignment_max_res` leaves to the fit: all, or nearest-neighbour samples.

    The reference means to shrink both sides, but hands `torch.nn.Upsample` a 3-D tensor, which resamples the last axis
    alone: its figures come from every row and `wanted` columns, and so do ours.
    """
    if width <= wanted:
        return np.arange(width)
    return (np.arange(wanted) * (width / wanted)).astype(np.intp)


def depth_metrics(
    prediction: Floats, truth: Floats, scale: float, shift: float, valid_range: tuple[float, float]
) -> dict[str, float]:
    """One picture's figures, after alignment and clipping to the set's range.

    Args:
        prediction: (N,) valid pixels, N >= 1, affine-invariant.
        truth: (N,) metres, greater than 0.
        scale: Of the alignment.
        shift: Of the alignment, metres.
        valid_range: Nearest and farthest depth of the set, metres.

    Returns:
        abs_rel: mean |p - t| / t. delta1, delta2, delta3: shares of pixels with max(p / t, t / p) below 1.25, 1.25² and
        1.25³. rmse: metres. log10: mean |log10 p - log10 t|. silog: 100 times the standard deviation of ln p - ln t
        (Eigen et al., NIPS 2014).
    """
    t = truth.astype(np.float64)
    p = np.clip(prediction.astype(np.float64) * scale + shift, *valid_range)
    np.maximum(p, _LEAST_DEPTH, out=p)
    difference = p - t
    log_ratio = np.log(p / t)
    ratio = np.exp(np.abs(log_ratio))
    return {
        "abs_rel": float((np.abs(difference) / t).mean()),
        "delta1": float((ratio < 1.25).mean()),
        "delta2": float((ratio < 1.25**2).mean()),
        "delta3": float((ratio < 1.25**3).mean()),
        "rmse": float(np.sqrt(np.square(difference).mean())),
        "log10": float(np.abs(log_ratio).mean() / math.log(10)),
        "silog": float(100 * log_ratio.std()),
    }


def angles_deg(prediction: Floats, truth: Floats) -> npt.NDArray[np.float64]:
    """Angles between vectors, degrees in [0, 180]; 90 where one has no length, as with DSINE's cosine.

    By atan2(|a × b|, a · b), which keeps its digits at 0° and 180° where arccos does not.

    Args:
        prediction: (N, 3), any length.
        truth: (N, 3), any length.
    """
    a, b = prediction.astype(np.float64), truth.astype(np.float64)
    cross, dot = np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)
    angles: npt.NDArray[np.float64] = np.rad2deg(np.arctan2(cross, dot))
    angles[(cross == 0) & (dot == 0)] = 90.0
    return angles


def normals_metrics(angles: npt.NDArray[np.float64]) -> dict[str, float]:
    """Figures of angular errors.

    Args:
        angles: (N,) degrees, N >= 1.

    Returns:
        mean, median and rmse in degrees; under_5 … under_30: per cent of pixels below so many degrees.
    """
    figures = {
        "mean": float(angles.mean()),
        "median": float(np.median(angles)),
        "rmse": float(np.sqrt(np.square(angles).mean())),
    }
    return figures | {name: float(100 * (angles < bound).mean()) for name, bound in _ANGLES_DEG.items()}


class AnglePool:
    """Angular errors of a whole set, without keeping them: Sintel has half a billion.

    Sums and counts are exact; the median comes from a histogram and is good to 0.0005°.
    """

    def __init__(self) -> None:
        self._histogram = np.zeros(180 * _BINS_PER_DEGREE, np.int64)
        self._under = np.zeros(len(_ANGLES_DEG), np.int64)
        self._sum = self._squares = 0.0
        self.pixels = 0

    def add(self, angles: npt.NDArray[np.floating[Any]]) -> None:
        """Add (N,) angles, degrees in [0, 180]."""
        bins = np.minimum((angles * _BINS_PER_DEGREE).astype(np.int64), len(self._histogram) - 1)
        self._histogram += np.bincount(bins, minlength=len(self._histogram))
        self._under += [int((angles < bound).sum()) for bound in _ANGLES_DEG.values()]
        self._sum += float(angles.sum(dtype=np.float64))
        self._squares += float(np.square(angles, dtype=np.float64).sum())
        self.pixels += len(angles)

    def metrics(self) -> dict[str, float]:
        """The figures of `normals_metrics`, of all pixels that were added; there must be one."""
        upto = self._histogram.cumsum()
        middle = np.searchsorted(upto, [(self.pixels - 1) // 2, self.pixels // 2], side="right")
        figures = {
            "mean": self._sum / self.pixels,
            "median": float((middle.mean() + 0.5) / _BINS_PER_DEGREE),
            "rmse": math.sqrt(self._squares / self.pixels),
        }
        shares = (100 * self._under / self.pixels).tolist()
        return figures | dict(zip(_ANGLES_DEG, shares, strict=True))
