"""Training batches out of a pool of scenes: cut, flipped, degraded; the same for a step whenever it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.batch import flip as flip_batch
from depthmill.pipeline.training.degrade import degrade
from depthmill.pipeline.training.from_scratch.config import Stage
from depthmill.pipeline.training.mixing import plan
from depthmill.pipeline.training.pool import Pool
from depthmill.pipeline.training.raycast import Views


def batch(pool: Pool, stage: Stage, seed: int, step: int) -> Views:
    """What step `step` of a stage is trained on.

    Every scene is shown once before any is shown again. All draws follow from (seed, step), so that a resumed run needs
    no sampler's state.

    Args:
        pool: Scenes.
        stage: How many to use, and how to show them.
        seed: Of the stage.
        step: From 0.
    """
    _, indices = plan([stage.scenes], [1], stage.batch_size, seed, step)
    rng = np.random.default_rng((seed, 1, step))
    views = pool.read(np.array(indices))
    views = cut(views, stage.height, stage.width, rng.uniform(stage.smallest_cut, 1, stage.batch_size), rng)
    views = flip(views, torch.from_numpy(rng.random(stage.batch_size) < 0.5).to(views.rgb.device))
    return Views(degrade(views.rgb, rng), views.depth, views.normals, views.mask)


def cut(views: Views, height: int, width: int, share: np.ndarray, rng: np.random.Generator) -> Views:
    """Cut a piece of the scene's own aspect ratio out of each, anywhere, and resize it.

    Colours are averaged down; depth and normals are taken at the nearest pixel, since a mean across an edge is true of
    neither side. A cut is a camera of longer focal length (off its axis), so normals and depth stay what they are.

    Args:
        views: Scenes.
        height: Rows wanted.
        width: Columns wanted.
        share: (B,) share of the scene's width and height to cut.
        rng: Draws the places.
    """
    B, H, W = views.depth.shape
    device = views.depth.device

    def along(size: int, wanted: int) -> tuple[Tensor, Tensor]:
        length = np.maximum(np.rint(size * share), 1).astype(np.int64)
        start = rng.integers(size - length + 1)
        return _taken(torch.from_numpy(start).to(device), torch.from_numpy(length).to(device), size, wanted)

    (by_rows, rows), (by_columns, columns) = along(H, height), along(W, width)
    pick = torch.arange(B, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]
    return Views(
        rgb=by_rows[:, None] @ views.rgb @ by_columns[:, None].mT,
        depth=views.depth[pick],
        normals=views.normals.permute(0, 2, 3, 1)[pick].permute(0, 3, 1, 2),
        mask=views.mask[pick],
    )


def _taken(start: Tensor, length: Tensor, size: int, wanted: int) -> tuple[Tensor, Tensor]:
    """How pieces of rows (or columns) [start, start + length) of `size` become `wanted` each.

    Args:
        start: (B,) int64.
        length: (B,) int64.
        size: Of the scenes.
        wanted: Of the pictures.

    Returns:
        Weights (B, wanted, size) of a triangle filter as wide as the pixels that are averaged, as antialiased bilinear
        resizing has them; and the nearest ones (B, wanted) int64.
    """
    start, length = start[:, None], length[:, None]
    scale = length / wanted
    centre = (torch.arange(wanted, device=start.device) + 0.5) * scale  # (B, wanted), within the piece
    at = torch.arange(size, device=start.device) - start  # (B, size), within the piece
    distance = (at[:, None] + 0.5 - centre[..., None]).abs()
    inside = ((at >= 0) & (at < length))[:, None]
    weight = (1 - distance / scale.clamp(min=1)[..., None]).clamp(min=0) * inside
    return weight / weight.sum(-1, keepdim=True), start + centre.long()


def flip(views: Views, rows: Tensor) -> Views:
    """Mirror those pictures left to right where `rows` (B,) is True; a normal's x changes its sign with it."""
    mirrored = flip_batch(Batch(views.rgb, views.normals, views.mask), rows)
    depth = torch.where(rows.view(-1, 1, 1), views.depth.flip(2), views.depth)
    return Views(mirrored.rgb, depth, mirrored.target, mirrored.mask)
