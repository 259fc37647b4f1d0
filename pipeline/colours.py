"""Colours of labels, for people."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Rgb = npt.NDArray[np.uint8]

# ColorBrewer's Spectral: warm where near.
SPECTRAL = (
    (158, 1, 66),
    (213, 62, 79),
    (244, 109, 67),
    (253, 174, 97),
    (254, 224, 139),
    (255, 255, 191),
    (230, 245, 152),
    (171, 221, 164),
    (102, 194, 165),
    (50, 136, 189),
    (94, 79, 162),
)
GREY = 128  # of what has no labels


def depth_rgb(depth: npt.NDArray[np.float32], near: float, far: float) -> Rgb:
    """Colour depth, warm where near.

    Args:
        depth: (H, W) float32, NaN where invalid.
        near: Depth of the first colour; what is nearer has it too.
        far: Depth of the last colour.

    Returns:
        (H, W, 3) uint8, grey where invalid.
    """
    anchors = np.array(SPECTRAL, np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in anchors.T], -1)
    index = np.nan_to_num(np.clip((depth - near) / max(far - near, 1e-6), 0, 1)) * 255
    colours: Rgb = np.rint(palette).astype(np.uint8)[np.rint(index).astype(np.uint8)]
    colours[np.isnan(depth)] = GREY
    return colours


def normals_rgb(normals: npt.NDArray[np.float32]) -> Rgb:
    """Colour normals: x to the right is red, y up is green, z towards the viewer is blue.

    Args:
        normals: (H, W, 3) float32 unit vectors, (0, 0, 0) where invalid.

    Returns:
        (H, W, 3) uint8, grey where invalid.
    """
    colours: Rgb = np.clip(normals * 127.5 + 128, 0, 255).astype(np.uint8)  # rounds, as + 127.5 + 0.5
    colours[(normals[..., 0] == 0) & (normals[..., 1] == 0) & (normals[..., 2] == 0)] = GREY
    return colours
