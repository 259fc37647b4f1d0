from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from depthmill.pipeline.training import loader
from depthmill.pipeline.training.batch import Batch, cut, flip
from depthmill.pipeline.training.config import Augment
from depthmill.pipeline.training.loader import MicroBatches, augmented
from depthmill.tests.pipeline.training.tiny import config


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_mirrors_everything_and_turns_the_normals_x_but_not_depth(channels: int) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.rand(3, 3, 4, 6), torch.randn(3, channels, 4, 6), torch.rand(3, 4, 6) > 0.3)
    rows = torch.tensor([True, False, True])
    flipped = flip(batch, rows)
    sign = torch.tensor([-1.0, 1, 1])[:, None, None] if channels == 3 else 1
    for b in range(3):
        if rows[b]:
            assert torch.equal(flipped.rgb[b], batch.rgb[b].flip(2))
            assert torch.equal(flipped.target[b], batch.target[b].flip(2) * sign)
            assert torch.equal(flipped.mask[b], batch.mask[b].flip(1))
        else:
            assert torch.equal(flipped.target[b], batch.target[b])
            assert torch.equal(flipped.rgb[b], batch.rgb[b])
            assert torch.equal(flipped.mask[b], batch.mask[b])
    again = flip(flipped, rows)
    assert torch.equal(again.target, batch.target)


def test_a_cut_without_truth_is_not_shown() -> None:
    mask = torch.zeros(1, 12, 16, dtype=torch.bool)
    mask[0, 11, 15] = True
    sky = Batch(torch.rand(1, 3, 12, 16), torch.ones(1, 1, 12, 16), mask)
    augment = Augment(height=12, width=16, smallest_cut=0.5)
    pieces = [augmented(sky, augment, np.random.default_rng(seed)) for seed in range(20)]
    assert all(piece.mask.any() for piece in pieces)


@pytest.mark.parametrize("size", [(240, 320), (24, 32), (7, 5), (400, 300)], ids=str)
def test_a_cut_of_a_picture_with_little_truth_holds_some_of_it(size: tuple[int, int]) -> None:
    wide = Batch(torch.zeros(1, 3, 352, 1216), torch.ones(1, 1, 352, 1216), torch.zeros(1, 352, 1216).bool())
    for row, column in ((0, 0), (351, 1215), (100, 3), (201, 640)):
        mask = torch.zeros_like(wide.mask)
        mask[0, row, column] = True
        augment = Augment(flip=False, height=size[0], width=size[1])
        piece = augmented(Batch(wide.rgb, wide.target, mask), augment, np.random.default_rng(row))
        assert piece.mask.shape == (1, *size)
        assert piece.mask.any()


def ramp(height: int, width: int) -> Batch:
    """Pictures whose colours and truth both say where a pixel was: its row and column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns, columns * 0]).float()[None]
    return Batch(place / 1000, place, torch.ones(1, height, width, dtype=torch.bool))


@pytest.mark.parametrize("size", [(12, 16), (48, 64), (60, 80), (16, 64), (48, 16)], ids=str)
def test_a_cut_takes_truth_from_where_it_takes_colours(size: tuple[int, int]) -> None:
    piece = cut(ramp(48, 64), *size, 1.0, np.random.default_rng(0))
    assert piece.mask.shape[1:] == size
    apart = (piece.rgb * 1000 - piece.target)[:, :2].mean((2, 3))
    assert apart.abs().max() <= 0.51  # of a pixel: of an even number of pixels none is in the middle


def test_a_cut_around_a_pixel_has_it_in_the_middle() -> None:
    piece = cut(ramp(48, 64), 24, 32, 0.5, np.random.default_rng(0), around=(20, 40))
    assert piece.target[0, :2, 12, 16].tolist() == [20, 40]


def test_a_picture_is_changed_as_it_is_told_and_no_more() -> None:
    picture = ramp(48, 64)

    def pieces(**options: object) -> list[Batch]:
        augment = Augment.model_validate({"flip": False, **options})
        return [augmented(picture, augment, np.random.default_rng(seed)) for seed in range(12)]

    assert all(torch.equal(one.rgb, picture.rgb) for one in pieces())
    turned = [torch.equal(one.rgb, picture.rgb) for one in pieces(flip=True)]
    assert {True, False} == set(turned)
    widths = [
        [float(one.target[0, 1].max() - one.target[0, 1].min()) for one in pieces(height=12, width=16, **options)]
        for options in ({"smallest_cut": 0.5}, {})
    ]
    assert 28 < min(widths[0]) < 45 < max(widths[0]) < 64
    assert min(widths[1]) > 58
    degraded = pieces(degrade=True)
    assert not any(torch.equal(one.rgb, picture.rgb) for one in degraded)
    assert all(torch.equal(one.target, picture.target) for one in degraded)


def test_each_batch_is_changed_in_its_own_way(scene_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(loader, "augmented", lambda part, augment, rng: drawn.append(rng.random()) or part)
    for seed, number in ((0, 0), (0, 1), (1, 0), (0, 0)):
        MicroBatches(config(scene_pool, seed=seed, batch_size=1))[number]
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]
