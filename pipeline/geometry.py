"""Sizes and axes: how a frame reaches the network's resolution and how its labels come back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from depthmill.pipeline.errors import ConfigError

STORED_AXES = "right-up-towards"
_SIGNS = ({"right": 1.0, "left": -1.0}, {"up": 1.0, "down": -1.0}, {"towards": 1.0, "away": -1.0})


def processed_size(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width at which the network sees a frame, before padding.

    The longer side becomes `resolution`, whichever way that scales it, and the other follows, rounded down, at least
    one pixel: Marigold's rule (diffusers, `MarigoldImageProcessor.resize_to_max_edge`), which alone would refuse a
    side that rounds to nothing.
    """
    longer = max(height, width)
    return max(1, height * resolution // longer), max(1, width * resolution // longer)


def to_network(frame: torch.Tensor, size: tuple[int, int], multiple: int) -> torch.Tensor:
    """Resize and pad one frame for the network.

    Args:
        frame: (H, W, 3) uint8.
        size: (h, w) from `processed_size`.
        multiple: What both padded sides must divide by: the VAE's factor.

    Returns:
        (3, h', w') float32 in [-1, 1]: antialiased bilinear, then padded on the right and below by repeating the edge.
    """
    image = frame.permute(2, 0, 1)[None].float() / 255.0 * 2.0 - 1.0  # (1, 3, H, W)
    image = F.interpolate(image, size, mode="bilinear", antialias=True)
    padding = (0, -size[1] % multiple, 0, -size[0] % multiple)
    return F.pad(image, padding, mode="replicate")[0]


def from_network(labels: torch.Tensor, size: tuple[int, int], original: tuple[int, int]) -> torch.Tensor:
    """Undo `to_network` for one frame's labels.

    Args:
        labels: (C, h', w') float32, padded.
        size: (h, w) without the padding.
        original: (H, W) of the frame.

    Returns:
        (C, H, W) float32, bilinear without antialiasing.
    """
    return F.interpolate(labels[None, :, : size[0], : size[1]], original, mode="bilinear")[0]


def axes_signs(axes: str) -> tuple[float, float, float]:
    """Factors that turn normals given in `axes` into the stored ones: x right, y up, z towards the viewer.

    Args:
        axes: Where x, y and z point, as in `left-up-towards`.

    Raises:
        ConfigError: If `axes` does not name a direction for each.
    """
    words = axes.split("-")
    if len(words) != 3 or any(word not in signs for word, signs in zip(words, _SIGNS, strict=True)):
        raise ConfigError(
            f"normals_axes is {axes!r}; expected where x, y and z point, as in {STORED_AXES!r} or 'left-up-towards' "
            "(right|left, up|down, towards|away)"
        )
    x, y, z = (signs[word] for word, signs in zip(words, _SIGNS, strict=True))
    return x, y, z
