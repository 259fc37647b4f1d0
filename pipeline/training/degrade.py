"""What a camera and a file format do to a clean picture: blur, exposure, colour casts, noise, vignetting, JPEG blocks.

Applied afresh each time that a scene is shown, so that a pool of rendered scenes does not wear out.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def degrade(rgb: Tensor, rng: np.random.Generator) -> Tensor:
    """Degrade each picture of a batch in its own way.

    Args:
        rgb: (B, 3, H, W) float32 in [0, 1], display-referred.
        rng: Draws everything; noise by a generator of the pictures' device, which this one seeds.

    Returns:
        (B, 3, H, W) float32 in [0, 1].
    """
    B, _, H, W = rgb.shape

    def per_picture(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.float32)).to(rgb.device).view(B, -1, 1, 1)

    def sometimes(chance: float) -> np.ndarray:
        return rng.random(B) < chance

    gain = per_picture(np.exp(rng.normal(0, 0.25, B)[:, None] + rng.normal(0, 0.08, (B, 3))))
    gamma = per_picture(np.exp(rng.normal(0, 0.22, B)))
    offset = per_picture(rng.uniform(0, 0.06, B) * sometimes(0.3))
    picture = (rgb * gain).clamp(1e-4, 1) ** gamma * (1 - offset) + offset
    grey = picture.mean(1, keepdim=True)
    # 0 is greyscale, above 1 is garish.
    saturation = per_picture(np.where(sometimes(0.06), 0, np.exp(rng.normal(0, 0.3, B))))
    picture = grey + saturation * (picture - grey)

    y, x = torch.linspace(-1, 1, H, device=rgb.device)[:, None], torch.linspace(-1, 1, W, device=rgb.device)
    picture = picture * (1 - per_picture(rng.uniform(0, 0.35, B) * sometimes(0.3)) * (x * x + y * y) / 2)
    picture = _blur(picture, per_picture(rng.uniform(0, 0.7, B) * sometimes(0.5)))
    sigma = per_picture(np.exp(rng.uniform(np.log(0.002), np.log(0.03), B)) * sometimes(0.5))
    generator = torch.Generator(rgb.device).manual_seed(int(rng.integers(2**63)))
    noise = torch.randn((B, 3, H, W), generator=generator, device=rgb.device)
    picture = (picture + sigma * noise).clamp(0, 1)
    step = per_picture(np.where(sometimes(0.3), np.exp(rng.uniform(np.log(0.01), np.log(0.06), B)), 0))
    return _blocks(picture, step).clamp(0, 1)


def _blur(picture: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (B, C, H, W) by (B, 1, 1, 1) pixels, separable, 5 taps; 0 leaves a picture as it is."""
    offsets = torch.arange(-2, 3, device=picture.device, dtype=picture.dtype)
    taps = torch.exp(-0.5 * (offsets / sigma.flatten()[:, None].clamp(min=0.05)) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    for axis in (2, 3):
        length = picture.shape[axis]
        padding = (0, 0, 2, 2) if axis == 2 else (2, 2, 0, 0)
        padded = torch.nn.functional.pad(picture, padding, mode="replicate")
        picture = sum(
            (padded.narrow(axis, i, length) * taps[:, i].view(-1, 1, 1, 1) for i in range(5)),
            start=torch.zeros_like(picture),
        )
    return picture


def _blocks(picture: Tensor, step: Tensor) -> Tensor:
    """Quantise the 8 x 8 block cosine transform, coarser at high frequencies, as JPEG does; a step of 0 does nothing.

    Rows and columns beyond a multiple of 8 are left alone.
    """
    B, C, H, W = picture.shape
    h, w = H // 8 * 8, W // 8 * 8
    k = torch.arange(8, device=picture.device, dtype=picture.dtype)
    basis = torch.cos(torch.pi * (2 * k + 1) * k[:, None] / 16) / 2
    basis[0] /= 2**0.5
    blocks = picture[:, :, :h, :w].reshape(B, C, h // 8, 8, w // 8, 8).permute(0, 1, 2, 4, 3, 5)
    coefficients = basis @ blocks @ basis.T
    steps = step.clamp(min=1e-9).view(B, 1, 1, 1, 1, 1) * (1 + 0.7 * (k + k[:, None]))
    blocks = basis.T @ (torch.round(coefficients / steps) * steps) @ basis
    quantised = picture.clone()
    quantised[:, :, :h, :w] = blocks.permute(0, 1, 2, 4, 3, 5).reshape(B, C, h, w)
    return torch.where(step > 0, quantised, picture)
