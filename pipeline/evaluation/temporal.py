"""Figures of a clip: how accurate its depth is under one scale and shift, and how steady.

What a clip's frames share is one affine map, fitted to all of its valid pixels at once, in depth. (Video-Depth-Anything
fits in disparity, which is what its network predicts: figures of the two fits do not compare.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.evaluation.metrics import Floats, Moments

Doubles = npt.NDArray[np.float64]


def steadiness(frames: Sequence[Moments | None]) -> dict[str, float]:
    """How the affine map that suits each frame alone varies over a clip.

    Args:
        frames: Of each frame in order; None for one without truth. Those whose best scale is not positive tell no
            logarithm, and are left out as well.

    Returns:
        scale_spread: standard deviation of ln scale over the frames; scale_flicker: of its change from frame to frame.
        shift_spread, shift_flicker: the same of what a frame's map makes of the clip's mean prediction, as a share of
        the clip's mean depth. NaN where fewer than two frames are left, or two pairs of consecutive ones for a flicker.
    """
    clip = Moments.pooled([one for one in frames if one is not None])
    maps = np.array([(np.nan, np.nan) if one is None else one.affine for one in frames])
    scale, shift = np.where(maps[:, :1] > 0, maps, np.nan).T
    figures = {}
    for name, values in (("scale", np.log(scale)), ("shift", (scale * clip.p + shift) / clip.t)):
        for figure, several in (("spread", values), ("flicker", np.diff(values))):
            known = several[np.isfinite(several)]
            figures[f"{name}_{figure}"] = float(known.std()) if len(known) > 1 else np.nan
    return figures


def alignment_error(
    one: Floats, other: Floats, intrinsics: Doubles, other_intrinsics: Doubles, pose: Doubles, other_pose: Doubles
) -> float:
    """How far two frames' depths disagree where they show the same place: a term of the temporal alignment error.

    TAE (Video-Depth-Anything, CVPR 2025, section 4.1) is 100 times the mean of this over consecutive frames, both ways.
    Each pixel of the one frame is put into the world, and from there into the other frame, at the nearest pixel. Unlike
    the paper's code, this keeps the nearest of several that fall on one pixel.

    Args:
        one: (H, W) depth along the optical axis, metres; NaN, infinite or not above 0 where there is none.
        other: (H, W), likewise.
        intrinsics: (3, 3) of the one, pixels; the centre of the first pixel is at (0, 0).
        other_intrinsics: (3, 3) of the other: a camera may zoom.
        pose: (4, 4) camera to world of the one, axes of OpenCV: x right, y down, z forward.
        other_pose: (4, 4) of the other.

    Returns:
        Mean of |other - projected| / other; NaN if no pixel of the one falls on one of the other.
    """
    H, W = other.shape
    rows, columns = np.nonzero(np.isfinite(one) & (one > 0))
    depth = one[rows, columns].astype(np.float64)
    points = np.stack([columns * depth, rows * depth, depth])
    motion = np.linalg.inv(other_pose) @ pose
    x, y, z = other_intrinsics @ (motion[:3, :3] @ np.linalg.inv(intrinsics) @ points + motion[:3, 3:])
    ahead = z > 1e-6
    x, y, z = (np.rint(x[ahead] / z[ahead]), np.rint(y[ahead] / z[ahead]), z[ahead])
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    nearest = np.full(H * W, np.inf)
    np.minimum.at(nearest, (y[inside] * W + x[inside]).astype(np.intp), z[inside])
    there = other.ravel().astype(np.float64)
    seen = np.isfinite(nearest) & np.isfinite(there) & (there > 0)
    return float((np.abs(there[seen] - nearest[seen]) / there[seen]).mean()) if seen.any() else np.nan
