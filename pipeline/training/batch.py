"""What training sets give: pictures with the truth of one modality, and where that truth is to be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from depthmill.pipeline.types import Modality


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures of one size and their truth.

    Attributes:
        rgb: (B, 3, H, W) float32 in [0, 1], sRGB.
        target: depth (B, 1, H, W) float32, greater than 0: metres along the viewing axis, or, from labels that are
            affine-invariant themselves, in their own unit; normals (B, 3, H, W) float32 unit vectors, camera frame,
            x right, y up, z towards the viewer, facing the camera. Finite, but meaningless, where `mask` is False.
        mask: (B, H, W) bool, where the truth is to be trusted.
    """

    rgb: Tensor
    target: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Put batches of one picture size together."""
    return Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Batch)))


def flip(batch: Batch, rows: Tensor) -> Batch:
    """Mirror those pictures left to right where `rows` (B,) bool is True; a normal's x changes its sign with it."""
    mirror = rows.to(batch.mask.device).view(-1, 1, 1, 1)
    target = batch.target.flip(3)
    if target.shape[1] == 3:
        target = target * target.new_tensor([-1, 1, 1]).view(1, 3, 1, 1)
    return Batch(
        rgb=torch.where(mirror, batch.rgb.flip(3), batch.rgb),
        target=torch.where(mirror, target, batch.target),
        mask=torch.where(mirror[:, 0], batch.mask.flip(2), batch.mask),
    )


def cut(
    batch: Batch,
    height: int,
    width: int,
    share: float,
    rng: np.random.Generator,
    around: tuple[int, int] | None = None,
) -> Batch:
    """Cut a piece out of the pictures, anywhere, and resize it.

    Colours are averaged down; truth is taken at the nearest pixel, since a mean across an edge is true of neither side.
    A cut is a camera of longer focal length (off its axis), so normals and depth stay what they are.

    Args:
        batch: Pictures.
        height: Rows wanted.
        width: Columns wanted.
        share: Of the largest piece that has the wanted aspect ratio, in (0, 1].
        rng: Draws the place.
        around: Row and column of the pixel to be in the middle, or as near to it as borders allow; nothing is drawn.
    """
    H, W = batch.mask.shape[1:]
    scale = share * min(H / height, W / width)
    h, w = max(round(height * scale), 1), max(round(width * scale), 1)
    if around is None:
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    else:
        top, left = (min(max(at - n // 2, 0), N - n) for at, n, N in zip(around, (h, w), (H, W), strict=True))
    rows = top + ((torch.arange(height) + 0.5) * h / height).long()[:, None]
    columns = left + ((torch.arange(width) + 0.5) * w / width).long()
    piece = batch.rgb[:, :, top : top + h, left : left + w]
    rgb = torch.nn.functional.interpolate(piece, (height, width), mode="bilinear", antialias=True)
    return Batch(rgb, batch.target[:, :, rows, columns], batch.mask[:, rows, columns])


class TrainingSet(Protocol):
    """Pictures with truth. One file in `pipeline/training/sets/` for each kind; `open_set` picks.

    Attributes:
        modality: What the truth is of.
    """

    modality: Modality

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def read(self, index: int) -> Batch:
        """One picture, B = 1, the same whenever it is asked for; safe to call from several threads or processes.

        Raises:
            SampleError: If the picture cannot be used: a file is damaged, or no pixel has truth. Training counts it and
                takes another.
            OSError, SourceError, StoreError: If it cannot be read for a reason that is not its own: a disk or network
                does not answer, a mount is away. Training asks again, for a minute.
        """
        ...
