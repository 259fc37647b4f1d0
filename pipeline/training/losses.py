"""The losses of end-to-end fine-tuning (Martin Garcia et al., WACV 2025, section 4), in float32.

Depth: the prediction is affine-invariant, so each picture's prediction is first brought to the metric depth by the
scale and shift of a least-squares fit; the loss is the mean absolute difference. Normals: the mean angle.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Metric depth is clipped to these percentiles of its valid pixels before anything is fitted to it.
LOW_PERCENTILE, HIGH_PERCENTILE = 2, 98

# A picture whose depth spans less than this share of its farthest has no depth to learn a scale from.
_FLAT = 1e-3
# Up to this cosine the angle is arccos; its slope, 1/sin, is unbounded beyond.
_SAFE_COSINE = 1 - 1e-4


def clip_depth(depth: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Clip metric depth to its 2nd and 98th percentile, picture by picture.

    Args:
        depth: (B, H, W) metres; anything, infinities included, where `mask` is False.
        mask: (B, H, W) bool.

    Returns:
        (B, H, W) clipped depth, its upper bound where `mask` is False, and (B,) bool: whether the picture has a depth
        range to learn from.
    """
    # All pictures at once, with no number on the CPU in between: a GPU does not wait, and a CUDA graph can hold it.
    values = torch.where(mask, depth.float(), torch.inf).flatten(1).sort(dim=1).values
    count = mask.sum((1, 2))
    # Nearest-rank: torch.quantile refuses more than 16 million values, and a share of a rank is no matter here.
    last = (count - 1).clamp(min=0)
    ranks = [(last * percent + 50) // 100 for percent in (LOW_PERCENTILE, HIGH_PERCENTILE)]  # some GPUs lack float64
    low, high = (torch.where(count > 0, values.gather(1, rank[:, None])[:, 0], 0) for rank in ranks)
    filled = torch.where(mask, depth.float(), high[:, None, None])
    clipped = torch.minimum(torch.maximum(filled, low[:, None, None]), high[:, None, None])
    return clipped, (high - low) > _FLAT * high.clamp(min=1e-9)


def normalised_depth(depth: Tensor, mask: Tensor) -> Tensor:
    """Depth as Marigold shows it to its VAE: the 2nd percentile at -1, the 98th at +1, clipped; sky is far, +1.

    Args:
        depth: (B, H, W) metres.
        mask: (B, H, W) bool, False where there is sky.

    Returns:
        (B, H, W) float32 in [-1, 1]; all +1 in a picture without depth.
    """
    clipped, _ = clip_depth(depth, mask)
    low, high = clipped.amin((1, 2), keepdim=True), clipped.amax((1, 2), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, 2 * (clipped - low) / spread.clamp(min=1e-9) - 1, 1.0)


def fit_affine(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and shift of predictions to targets, picture by picture.

    From the centred normal equations, scale = cov(p, t) / var(p): unlike the raw 2 x 2 system they lose no digits where
    the mean is large against the spread. A constant prediction gets scale 0 and the target's mean.

    Args:
        prediction: (B, H, W), any unit.
        target: (B, H, W).
        mask: (B, H, W) bool, what to fit; both must be finite there.

    Returns:
        (B,) scale and (B,) shift, such that scale * prediction + shift is nearest to target.
    """
    weight = mask.float()
    count = weight.sum((1, 2)).clamp(min=1)
    p, t = torch.where(mask, prediction.float(), 0), torch.where(mask, target.float(), 0)
    p_mean, t_mean = p.sum((1, 2)) / count, t.sum((1, 2)) / count
    p_off, t_off = (p - p_mean[:, None, None]) * weight, (t - t_mean[:, None, None]) * weight
    variance = p_off.square().sum((1, 2)) / count
    covariance = (p_off * t_off).sum((1, 2)) / count
    # The floor bounds the scale's gradient where a prediction is all but constant.
    scale = covariance / (variance + 1e-6 * (1 + p_mean.square()))
    return scale, t_mean - scale * p_mean


def depth_loss(
    prediction: Tensor, depth: Tensor, mask: Tensor, *, relative: bool = False, pooled: bool = False
) -> Tensor:
    """Affine-invariant depth loss: masked L1 after a least-squares fit to clipped metric depth.

    The gradient passes through the fit, as in the paper. A picture with no depth range (a bare wall seen head-on, or no
    valid pixel) does not count.

    Args:
        prediction: (B, H, W), affine-invariant.
        depth: (B, H, W) metres; anything where `mask` is False.
        mask: (B, H, W) bool.
        relative: Divide each pixel's difference by its depth, as AbsRel does; depth must be greater than 0 then.
        pooled: Let every valid pixel count the same, as in the paper's code, instead of every picture.

    Returns:
        () float32, in `depth`'s unit, or without one if `relative`: mean over the pictures that count of the mean over
        each picture's valid pixels, or over all their valid pixels if `pooled`; 0 if none counts.
    """
    target, usable = clip_depth(depth, mask)
    valid = mask & usable[:, None, None]
    scale, shift = fit_affine(prediction, target, valid)
    error = (scale[:, None, None] * prediction.float() + shift[:, None, None] - target).abs() * valid
    if relative:
        error = error / torch.where(valid, target, 1)
    if pooled:
        return error.sum() / valid.sum().clamp(min=1)
    return (error.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)).sum() / valid.any(2).any(1).sum().clamp(min=1)


def slope_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Multi-scale gradient matching (Li and Snavely, CVPR 2018; Ranftl et al., TPAMI 2020, eq. 11), without a mask.

    The mean absolute slope of the difference, summed over both axes and over steps of 1, 2 and 4 pixels: it asks for
    edges where the target has them and for smoothness elsewhere, which a mean difference hardly does.

    Args:
        prediction: (B, H, W).
        target: (B, H, W), in the same unit, finite.

    Returns:
        () float32.
    """
    difference = (prediction.float() - target.float())[:, None]
    total = difference.new_zeros(())
    for step in (1, 2, 4):
        coarse = torch.nn.functional.avg_pool2d(difference, step)
        total = total + coarse.diff(dim=2).abs().mean() + coarse.diff(dim=3).abs().mean()
    return total


def normals_loss(prediction: Tensor, normals: Tensor, mask: Tensor) -> Tensor:
    """Mean angle between predicted and true normals, radians.

    Beyond a cosine of ±(1 - 1e-4), where arccos's slope runs to infinity, the angle goes on along its tangent: the
    gradient stays bounded, and keeps pulling an opposite normal round.

    Args:
        prediction: (B, 3, H, W), any length.
        normals: (B, 3, H, W), unit where `mask` is True.
        mask: (B, H, W) bool.

    Returns:
        () float32, mean over the valid pixels of the batch.
    """
    unit = torch.nn.functional.normalize(prediction.float(), dim=1, eps=1e-6)
    cosine = (unit * normals.float()).sum(1)
    safe = cosine.clamp(-_SAFE_COSINE, _SAFE_COSINE)
    slope = -1 / (1 - _SAFE_COSINE**2) ** 0.5
    # Clamped, the tangent's part is measured from the bound; it is 0 inside. At a cosine of 1 the angle so reached is
    # 0.7 % of a radian, not 0.
    angle = torch.acos(safe) + slope * (cosine - safe)
    mean: Tensor = (angle * mask).sum() / mask.sum().clamp(min=1)
    return mean
