"""Tileable grey patterns, drawn once from fixed seeds or photographed, and a filtered look-up into them.

A pattern is a square of values in [0, 1] that repeats without a seam; a material colours it. Drawing them once into an
atlas with a mip pyramid, instead of evaluating them at each pixel, makes a texture's price independent of its
complexity, and lets distant surfaces be averaged, as a camera's pixels do, instead of aliasing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

SIZE = 256
Pattern = npt.NDArray[np.float32]

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE


def _rescaled(values: npt.NDArray[np.floating]) -> Pattern:
    low, high = np.percentile(values, [1, 99])
    return np.asarray(np.clip((values - low) / max(high - low, 1e-6), 0, 1), np.float32)


def _noise(rng: np.random.Generator, slope: float, stretch: float = 1.0) -> Pattern:
    """Gaussian noise with amplitude 1/f^slope (natural images have about 1), longer along y by `stretch`."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIZE) * SIZE * stretch, np.fft.fftfreq(SIZE) * SIZE, indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = np.inf
    spectrum = np.fft.fft2(rng.standard_normal((SIZE, SIZE))) / frequency**slope
    return _rescaled(np.fft.ifft2(spectrum).real)


def _clouds(rng: np.random.Generator) -> Pattern:
    return _noise(rng, rng.uniform(1.0, 2.0))


def _grain(rng: np.random.Generator) -> Pattern:
    return _noise(rng, rng.uniform(0.0, 0.8))


def _blotches(rng: np.random.Generator) -> Pattern:
    field = _noise(rng, rng.uniform(1.2, 2.2))
    return _rescaled(1 / (1 + np.exp(-(field - rng.uniform(0.4, 0.6)) * 60)) + 0.2 * _noise(rng, 0.8))


def _grass(rng: np.random.Generator) -> Pattern:
    return _rescaled(_noise(rng, 0.5, stretch=0.4) + 0.8 * _noise(rng, 1.4))


def _wood(rng: np.random.Generator) -> Pattern:
    return _rescaled(np.sin(2 * np.pi * (rng.integers(3, 9) * _X + 1.5 * _noise(rng, 1.8, stretch=6.0))))


def _checker(rng: np.random.Generator) -> Pattern:
    cells = 2 * int(rng.integers(1, 5))
    squares = (np.floor(_X * cells) + np.floor(_Y * cells)) % 2
    return _rescaled(squares + 0.3 * _noise(rng, 0.9))


def _stripes(rng: np.random.Generator) -> Pattern:
    phase = (_X * rng.integers(2, 10) + rng.integers(0, 3) * _Y) % 1
    return _rescaled((phase < rng.uniform(0.2, 0.8)) + 0.2 * _noise(rng, 0.9))


def _courses(rng: np.random.Generator, rows: int, columns: int, stagger: float, joint: float) -> Pattern:
    """Bricks, tiles or planks: rows of blocks of individual shades, with dark joints of `joint` of a row's height."""
    row = np.floor(_Y * rows).astype(int)
    along = (_X * columns + stagger * (row % 2)) % columns
    shade = rng.uniform(0.45, 1.0, (rows, columns))[row, np.floor(along).astype(int)]
    edge_y = np.minimum(_Y * rows % 1, 1 - _Y * rows % 1)
    edge_x = np.minimum(along % 1, 1 - along % 1) * rows / columns
    value = np.where(np.minimum(edge_x, edge_y) < joint, 0.05, shade)
    return np.asarray(np.clip(value + 0.25 * (_noise(rng, 0.7) - 0.5), 0, 1), np.float32)


def _bricks(rng: np.random.Generator) -> Pattern:
    rows = 2 * int(rng.integers(4, 12))
    return _courses(rng, rows, rows // 2, 0.5, rng.uniform(0.06, 0.12))


def _tiles(rng: np.random.Generator) -> Pattern:
    rows = int(rng.integers(2, 8))
    return _courses(rng, rows, rows, 0.0, rng.uniform(0.02, 0.06))


def _planks(rng: np.random.Generator) -> Pattern:
    base = _courses(rng, 2 * int(rng.integers(2, 6)), int(rng.integers(1, 3)), 0.37, 0.04)
    return np.asarray(np.clip(base + 0.5 * (_noise(rng, 1.0, stretch=0.1) - 0.5), 0, 1), np.float32)


def _cells(rng: np.random.Generator) -> Pattern:
    """Cobbles: the distance to the second nearest of random points less the distance to the nearest."""
    points = rng.uniform(0, 1, (int(rng.integers(20, 90)), 2)).astype(np.float32)
    dx = np.abs(_X[..., None] - points[:, 0])
    dy = np.abs(_Y[..., None] - points[:, 1])
    distance = np.hypot(np.minimum(dx, 1 - dx), np.minimum(dy, 1 - dy))
    nearest = np.argmin(distance, axis=-1)
    first, second = np.moveaxis(np.partition(distance, 1, axis=-1)[..., :2], -1, 0)
    gap = np.clip((second - first) * len(points) ** 0.5 * 4, 0, 1)
    return _rescaled(gap * rng.uniform(0.5, 1, len(points))[nearest] + 0.15 * _noise(rng, 0.8))


def _dots(rng: np.random.Generator) -> Pattern:
    count = int(rng.integers(3, 12))
    distance = np.hypot(_X * count % 1 - 0.5, _Y * count % 1 - 0.5)
    return _rescaled((distance < rng.uniform(0.15, 0.42)) + 0.15 * _noise(rng, 0.9))


def _text(rng: np.random.Generator) -> Pattern:
    """Lines of small dark marks on a light ground, broken into words: clutter with the statistics of print."""
    page = np.ones((SIZE, SIZE), np.float32)
    height = int(rng.integers(6, 22))
    for top in range(2, SIZE - height, int(height * 1.6)):
        left = int(rng.integers(2, 30))
        while left < SIZE - height:
            width = int(rng.integers(2, height))
            if rng.random() < 0.8:
                inset = int(rng.integers(0, height // 2))
                page[top + inset : top + height, left : left + width] = rng.uniform(0, 0.4)
            left += width + int(rng.integers(1, 4)) + (height if rng.random() < 0.15 else 0)
    return page


def _clutter(rng: np.random.Generator) -> Pattern:
    """Overlapping rectangles and discs of any shade and size."""
    field = np.full((SIZE, SIZE), 0.5, np.float32)
    for _ in range(int(rng.integers(30, 150))):
        centre, half = rng.uniform(0, 1, 2), rng.uniform(0.01, 0.16, 2)
        dx = np.abs((_X - centre[0] + 0.5) % 1 - 0.5) / half[0]
        dy = np.abs((_Y - centre[1] + 0.5) % 1 - 0.5) / half[1]
        inside = np.maximum(dx, dy) < 1 if rng.random() < 0.6 else dx**2 + dy**2 < 1
        field[inside] = rng.uniform(0, 1)
    return np.asarray(np.clip(field + 0.15 * (_noise(rng, 0.9) - 0.5), 0, 1), np.float32)


def _windows(rng: np.random.Generator) -> Pattern:
    """A facade: a grid of window panes, each of its own brightness (0 to 0.45 unlit, some lit), in a bright wall."""
    rows, columns = int(rng.integers(2, 12)), int(rng.integers(2, 12))
    wide, high = rng.uniform(0.45, 0.97), rng.uniform(0.35, 0.8)
    cell_x, cell_y = _X * columns, _Y * rows
    pane = (np.abs(cell_x % 1 - 0.5) < wide / 2) & (np.abs(cell_y % 1 - 0.5) < high / 2)
    frame = pane & ((np.abs(cell_x % 1 - 0.5) < 0.03) | (np.abs(cell_x % 1 - 0.5) > wide / 2 - 0.04))
    lit = np.where(rng.random((rows, columns)) < rng.uniform(0, 0.6), rng.uniform(0.6, 1.0, (rows, columns)), 0)
    shade = np.maximum(rng.uniform(0, 0.45, (rows, columns)), lit)
    value = np.where(pane, shade[np.floor(cell_y).astype(int), np.floor(cell_x).astype(int)], rng.uniform(0.5, 0.9))
    return np.asarray(np.clip(np.where(frame, 0.7, value) + 0.12 * (_noise(rng, 0.9) - 0.5), 0, 1), np.float32)


def _photograph(rng: np.random.Generator, *, number: int) -> Pattern:
    """One of the photographed textures (`photographs.LICENSE.txt`), in one of its eight positions."""
    with Image.open(Path(__file__).with_name("photographs.png")) as picture:
        tile = np.asarray(picture)[number * SIZE : (number + 1) * SIZE].astype(np.float32)
    turned = np.rot90(tile, int(rng.integers(4)))
    return _rescaled(turned.T if rng.random() < 0.5 else turned)


_DRAW: dict[str, tuple[Callable[[np.random.Generator], Pattern], int]] = {
    "clouds": (_clouds, 6),
    "grain": (_grain, 4),
    "blotches": (_blotches, 6),
    "grass": (_grass, 4),
    "wood": (_wood, 3),
    "checker": (_checker, 3),
    "stripes": (_stripes, 4),
    "bricks": (_bricks, 5),
    "tiles": (_tiles, 4),
    "planks": (_planks, 4),
    "cells": (_cells, 4),
    "dots": (_dots, 2),
    "text": (_text, 3),
    "clutter": (_clutter, 6),
    "windows": (_windows, 10),
    "lawn": (partial(_photograph, number=0), 2),
    "gravel": (partial(_photograph, number=1), 2),
}
PATTERNS = tuple(_DRAW)


@cache
def layers() -> dict[str, range]:
    """Which layers of the atlas hold each pattern's variants."""
    result, start = {}, 0
    for name, (_, count) in _DRAW.items():
        result[name] = range(start, start + count)
        start += count
    return result


@dataclass(frozen=True, eq=False)
class Atlas:
    """All patterns at all sizes, flat.

    Attributes:
        values: (sum of levels,) float32 in [0, 1]; level l is (layers, SIZE >> l, SIZE >> l), row by row.
        offsets: (levels,) int64, where each level starts.
    """

    values: Tensor
    offsets: Tensor


@cache
def atlas(device: torch.device) -> Atlas:
    """Draw every pattern (about a second, once a process); the same on every machine."""
    rng = np.random.default_rng(0)
    level = torch.from_numpy(np.stack([draw(rng) for draw, count in _DRAW.values() for _ in range(count)]))
    levels = [level]
    while levels[-1].shape[-1] > 1:
        levels.append(torch.nn.functional.avg_pool2d(levels[-1], 2))
    offsets = np.cumsum([0] + [level.numel() for level in levels[:-1]])
    return Atlas(torch.cat([level.flatten() for level in levels]).to(device), torch.from_numpy(offsets).to(device))


def sample(source: Atlas, layer: Tensor, u: Tensor, v: Tensor, footprint: Tensor) -> Tensor:
    """Look patterns up, bilinearly, at the mip level where a texel is about as large as the footprint.

    Args:
        source: The atlas.
        layer: Any shape, int64.
        u: Same shape, in repetitions of the pattern.
        v: Likewise, along the pattern's rows.
        footprint: Same shape: size of a pixel's footprint on the surface, in repetitions of the pattern.

    Returns:
        Same shape, float32 in [0, 1].
    """
    coarsest = source.offsets.numel() - 1
    level = (footprint * SIZE).clamp(1, SIZE).log2().round().long().clamp(max=coarsest)
    size = SIZE >> level
    # Reduced to one repetition before scaling: a ground plane's far end is thousands of repetitions away.
    x, y = (u - u.floor()) * size - 0.5, (v - v.floor()) * size - 0.5
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    base = source.offsets[level] + layer * size * size
    mask = size - 1  # sizes are powers of two, so this wraps, -1 included
    left, right = x0.long() & mask, (x0.long() + 1) & mask
    top, bottom = base + (y0.long() & mask) * size, base + ((y0.long() + 1) & mask) * size
    take = source.values.__getitem__
    upper = torch.lerp(take(top + left), take(top + right), fx)
    lower = torch.lerp(take(bottom + left), take(bottom + right), fx)
    return torch.lerp(upper, lower, fy)
