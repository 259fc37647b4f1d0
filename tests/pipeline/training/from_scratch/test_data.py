from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depthmill.pipeline.training import pool, scenes
from depthmill.pipeline.training.degrade import degrade
from depthmill.pipeline.training.from_scratch import data
from depthmill.pipeline.training.from_scratch.config import Stage

H, W = 24, 32


def stage(**changes: object) -> Stage:
    base = {
        "name": "s",
        "objective": "end_to_end",
        "scenes": 100,
        "steps": 100,
        "batch_size": 4,
        "height": 12,
        "width": 16,
        "smallest_cut": 0.5,
        "learning_rate": 1e-3,
    }
    return Stage.model_validate(base | changes)


@pytest.fixture(scope="module")
def small_pool(scene_pool: Path) -> pool.Pool:
    return pool.open_pool(scene_pool, pool.SHARD, H, W, processes=1)


def test_pool_gives_back_what_was_rendered(small_pool: pool.Pool) -> None:
    assert len(small_pool) == 100
    read, rendered = small_pool.read(np.array([7, 3])), scenes.view([7, 3], H, W)
    assert torch.equal(read.mask, rendered.mask)
    assert (read.rgb - rendered.rgb).abs().max() < 0.51 / 255
    mask = read.mask
    torch.testing.assert_close(read.depth[mask], rendered.depth[mask], rtol=1e-3, atol=0)
    assert (read.normals - rendered.normals).abs().max() < 0.01


def test_a_pool_in_a_devices_memory_gives_the_same(small_pool: pool.Pool) -> None:
    resident = replace(small_pool, resident=pool._bytes(np.stack([small_pool.pixels(i) for i in range(100)])))
    one, other = (some.read(np.array([7, 99, 3])) for some in (small_pool, resident))
    for name in ("rgb", "depth", "normals", "mask"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.gpu
def test_a_batch_is_made_on_the_gpu(small_pool: pool.Pool) -> None:
    resident = small_pool.to(torch.device("cuda"))
    ours, theirs = (data.batch(some, stage(), seed=3, step=30) for some in (resident, small_pool))
    assert ours.rgb.device.type == "cuda"
    for name in ("depth", "normals", "mask"):
        torch.testing.assert_close(getattr(ours, name).cpu(), getattr(theirs, name))
    # Noise is of the device's own generator.
    assert (ours.rgb.cpu() - theirs.rgb).abs().mean() < 0.02


def test_a_shard_is_rendered_once_and_left_no_pieces(tmp_path: Path) -> None:
    path = tmp_path / "0000006.npy"
    pool._fill(path, range(6, 9), H, W)
    written = path.stat().st_mtime_ns
    pool._fill(path, range(6, 9), H, W)
    assert path.stat().st_mtime_ns == written
    assert list(tmp_path.iterdir()) == [path]
    assert np.array_equal(np.load(path), pool.render(range(6, 9), H, W))


def test_a_steps_batch_is_its_own_whenever_it_is_asked_for(small_pool: pool.Pool) -> None:
    first = data.batch(small_pool, stage(), seed=3, step=30)
    again = data.batch(small_pool, stage(), seed=3, step=30)
    other = data.batch(small_pool, stage(), seed=3, step=31)
    assert torch.equal(first.rgb, again.rgb)
    assert torch.equal(first.depth, again.depth)
    assert not torch.equal(first.rgb, other.rgb)
    assert first.rgb.shape == (4, 3, 12, 16)
    assert first.normals.shape == (4, 3, 12, 16)


def test_every_scene_is_shown_once_before_any_again(small_pool: pool.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    read = small_pool.read
    monkeypatch.setattr(pool.Pool, "read", lambda _, indices: (shown.extend(indices.tolist()), read(indices))[1])
    for step in range(34):  # batches of 6 do not divide 100, so one batch spans two epochs
        data.batch(small_pool, stage(batch_size=6), seed=0, step=step)
    assert sorted(shown[:100]) == list(range(100))
    assert sorted(shown[100:200]) == list(range(100))
    assert shown[:100] != shown[100:200]


def test_a_batch_may_show_scenes_several_times(small_pool: pool.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    read = small_pool.read
    monkeypatch.setattr(pool.Pool, "read", lambda _, indices: (shown.extend(indices.tolist()), read(indices))[1])
    assert len(data.batch(small_pool, stage(batch_size=250), seed=0, step=1).rgb) == 250
    counts = np.bincount(shown, minlength=100)
    assert counts.min() >= 2
    assert counts.max() <= 3


def test_flip_mirrors_everything_and_turns_the_normals_x() -> None:
    views = scenes.view([1, 2], H, W)
    flipped = data.flip(views, torch.tensor([True, False]))
    assert torch.equal(flipped.depth[0], views.depth[0].flip(1))
    assert torch.equal(flipped.mask[0], views.mask[0].flip(1))
    assert torch.equal(flipped.rgb[0], views.rgb[0].flip(2))
    assert torch.equal(flipped.normals[0, 0], -views.normals[0, 0].flip(1))
    assert torch.equal(flipped.normals[0, 1:], views.normals[0, 1:].flip(2))
    for name in ("rgb", "depth", "normals", "mask"):
        assert torch.equal(getattr(flipped, name)[1], getattr(views, name)[1])


def test_a_whole_cut_at_the_same_size_changes_nothing() -> None:
    views = scenes.view([1, 2], H, W)
    same = data.cut(views, H, W, np.ones(2), np.random.default_rng(0))
    torch.testing.assert_close(same.rgb, views.rgb)
    for name in ("depth", "normals", "mask"):
        assert torch.equal(getattr(same, name), getattr(views, name))


def test_cuts_are_resized_as_antialiased_bilinear_resizing_does() -> None:
    views = scenes.view([1, 2, 3], H, W)
    share = np.array([1.0, 0.75, 0.25])  # to fewer pixels, to as many, and to more
    start = np.random.default_rng(4)
    rows, columns = (start.integers(size - (size * share).astype(int) + 1) for size in (H, W))
    found = data.cut(views, 18, 24, share, np.random.default_rng(4)).rgb
    for i, (part, top, left) in enumerate(zip(share, rows, columns, strict=True)):
        h, w = round(H * part), round(W * part)
        piece = views.rgb[i : i + 1, :, top : top + h, left : left + w]
        expected = torch.nn.functional.interpolate(piece, (18, 24), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-5)


def test_a_cut_takes_labels_from_where_it_takes_colours() -> None:
    views = scenes.view([1], H, W)
    marked = views.depth.clone()
    marked[0] = torch.arange(W).float()[None, :] + 1
    rgb = (marked / W)[:, None].expand(1, 3, H, W).contiguous()
    labelled = type(views)(rgb, marked, views.normals, torch.ones_like(views.mask))
    piece = data.cut(labelled, 12, 16, np.array([0.75]), np.random.default_rng(4))
    torch.testing.assert_close(piece.rgb[0, 0] * W, piece.depth[0], rtol=0, atol=1.0)


def test_degraded_pictures_differ_stay_in_range_and_follow_the_generator() -> None:
    rgb = scenes.view(range(8), H, W).rgb
    once, again = (degrade(rgb, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(once, again)
    assert ((once >= 0) & (once <= 1)).all()
    assert ((once - rgb).abs().mean((1, 2, 3)) > 1e-3).all()
    # What is left must still be the picture.
    for clean, dirty in zip(rgb, once, strict=True):
        assert torch.corrcoef(torch.stack([clean.mean(0).flatten(), dirty.mean(0).flatten()]))[0, 1] > 0.5
