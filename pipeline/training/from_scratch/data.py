"""Training batches out of a pool of scenes: cut, flipped, degraded; the same for a step whenever it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from depthmill.pipeline.training.degrade import degrade
from depthmill.pipeline.training.from_scratch.config import Stage
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
    first = step * stage.batch_size
    epochs = {i // stage.scenes for i in (first, first + stage.batch_size - 1)}
    order = np.concatenate(
        [np.random.default_rng((seed, 0, epoch)).permutation(stage.scenes) for epoch in sorted(epochs)]
    )
    start = first - min(epochs) * stage.scenes
    rng = np.random.default_rng((seed, 1, step))
    views = pool.read(order[start : start + stage.batch_size])
    views = cut(views, stage.height, stage.width, rng.uniform(stage.smallest_cut, 1, stage.batch_size), rng)
    views = flip(views, torch.from_numpy(rng.random(stage.batch_size) < 0.5))
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
    H, W = views.depth.shape[1:]
    pieces = []
    for b, part in enumerate(share):
        h, w = max(round(H * part), 1), max(round(W * part), 1)
        top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
        rows = top + ((torch.arange(height) + 0.5) * h / height).long()
        columns = left + ((torch.arange(width) + 0.5) * w / width).long()
        piece = views.rgb[b : b + 1, :, top : top + h, left : left + w]
        rgb = torch.nn.functional.interpolate(piece, (height, width), mode="bilinear", antialias=True)
        pick = rows[:, None], columns
        pieces.append((rgb[0], views.depth[b][pick], views.normals[b][:, pick[0], pick[1]], views.mask[b][pick]))
    return Views(*(torch.stack(column) for column in zip(*pieces, strict=True)))


def flip(views: Views, rows: Tensor) -> Views:
    """Mirror those pictures left to right where `rows` (B,) is True; a normal's x changes its sign with it."""
    mirror = rows.view(-1, 1, 1, 1)
    rgb = torch.where(mirror, views.rgb.flip(3), views.rgb)
    sign = torch.tensor([-1.0, 1.0, 1.0]).view(1, 3, 1, 1)
    normals = torch.where(mirror, views.normals.flip(3) * sign, views.normals)
    depth = torch.where(mirror[:, 0], views.depth.flip(2), views.depth)
    mask = torch.where(mirror[:, 0], views.mask.flip(2), views.mask)
    return Views(rgb, depth, normals, mask)
