"""Sizes and axes: how a frame reaches the network's resolution and how its labels come back."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from depthmill.pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch  # for names of types alone: its import takes seconds, which a finished run has no other need of

# Of the longer side: at 768 pixels in steps of 64, by which Stable Diffusion's VAE and UNet together divide a side.
_STEPS = 12
_LARGEST_REDUCTION = 64

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


def rounded_size(height: int, width: int, resolution: int, multiple: int) -> tuple[int, int]:
    """Height and width at which the network sees a picture whose aspect ratio is rounded, so that few shapes occur.

    The longer side becomes `resolution`; the other the nearest twelfth of it (thinner than 1:2, the nearest 24th; than
    1:4, 48th; and so on), then the nearest multiple of `multiple`. So 1:1, 3:4, 2:3 and 1:2 stay as they are, no
    picture is stretched by more than 1 in 12 and the rounding to `multiple`, and nothing is padded where that divides
    `resolution`. Pictures so thin that the steps were less than `multiple` have their `processed_size`.
    """
    shorter, longer = min(height, width), max(height, width)
    parts = _STEPS
    while 2 * parts * shorter < _STEPS * longer:
        parts *= 2
    if parts * multiple > resolution:
        return processed_size(height, width, resolution)
    part = round(parts * shorter / longer)
    side = resolution if part == parts else min(resolution, round(part * resolution / (parts * multiple)) * multiple)
    return (side, resolution) if height <= width else (resolution, side)


def padded_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width with the padding of `to_network`: each the next multiple."""
    return size[0] + -size[0] % multiple, size[1] + -size[1] % multiple


def to_network(frame: torch.Tensor, size: tuple[int, int], multiple: int) -> torch.Tensor:
    """Resize and pad one frame for the network.

    Args:
        frame: (H, W, 3) uint8.
        size: (h, w) from `processed_size` or `rounded_size`.
        multiple: What both padded sides must divide by: the VAE's factor.

    Returns:
        (3, h', w') float32 in [-1, 1]: antialiased bilinear, then padded on the right and below by repeating the edge.
    """
    import torch.nn.functional as F

    image = frame.permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    if frame.is_cuda:  # whose kernel keeps its weights in shared memory: those of a reduction by 94 have no room there
        shrink = [ceil(frame.shape[side] / (_LARGEST_REDUCTION * size[side])) for side in (0, 1)]
        image = F.avg_pool2d(image, shrink, ceil_mode=True) if max(shrink) > 1 else image
    image = F.interpolate(image, size, mode="bilinear", antialias=True) / 127.5 - 1  # fewer pixels, as a rule
    height, width = padded_size(size, multiple)
    return F.pad(image, (0, width - size[1], 0, height - size[0]), mode="replicate")[0]


def from_network(labels: torch.Tensor, size: tuple[int, int], original: tuple[int, int]) -> torch.Tensor:
    """Undo `to_network` for one frame's labels.

    Args:
        labels: (C, h', w') float32, padded.
        size: (h, w) without the padding.
        original: (H, W) of the frame.

    Returns:
        (C, H, W) float32, bilinear without antialiasing.
    """
    import torch.nn.functional as F

    # One by one: of three channels at once, torch's kernel for CPUs takes twice as long.
    channels = labels[:, None, : size[0], : size[1]].contiguous()
    return F.interpolate(channels, original, mode="bilinear")[:, 0]


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
