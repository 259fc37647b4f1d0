"""A folder in the layout of Virtual KITTI 2's archives, at its true size: a street with a wall across it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthmill.pipeline.errors import SampleError, TrainingError
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.sets.vkitti2 import VKitti2Options
from depthmill.tests.pipeline.training.sets.contract import SetContract

H, W = 375, 1242
FOCAL, CX, CY = 725.0087, 620.5, 187.0
EYE_M = 1.6  # above the street


def street(wall_m: float) -> np.ndarray:
    """Centimetres, as stored: a level street, a wall across the right half of it with a hole, a thin pole, and sky."""
    v, u = np.mgrid[:H, :W].astype(float)
    depth = np.where(v > CY, EYE_M * FOCAL / np.maximum(v - CY, 1e-9), 655.35)
    wall = (u > CX) & (np.abs(v - CY) < 0.2 * FOCAL)
    depth = np.where(wall, np.minimum(depth, wall_m), depth)
    depth[100:240, 400:402] = 5.0  # too thin to have a normal
    depth[150:160, 1200:1210] = 0.0  # nothing was measured
    return np.round(np.minimum(depth, 655.35) * 100).astype(np.uint16)


def write(root: Path, place: str, number: int, wall_m: float, *, apart: bool = True) -> None:
    for part in ("rgb", "depth"):
        top = root / f"vkitti_2.0.3_{part}" if apart else root
        scene, camera = place.split(":")
        folder = top / scene / "frames" / part / camera
        folder.mkdir(parents=True, exist_ok=True)
        if part == "depth":
            Image.fromarray(street(wall_m)).save(folder / f"depth_{number:05d}.png", compress_level=1)
        else:
            shade = np.broadcast_to((np.arange(W) * 255 // W).astype(np.uint8)[:, None], (H, W, 3))
            Image.fromarray(shade // (1 + number % 3)).save(folder / f"rgb_{number:05d}.jpg", quality=95)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vkitti2")
    write(root, "Scene01/morning:Camera_0", 0, 20.0)
    write(root, "Scene01/morning:Camera_1", 1, 30.0)
    write(root, "Scene20/fog:Camera_0", 836, 90.0)
    write(root, "Scene20/clone:Camera_0", 2, 20.0)  # not among the paper's conditions
    return root


class TestVKitti2(SetContract):
    def focal(self, index: int) -> float:
        return FOCAL / 1216

    @pytest.fixture
    def config(self, folder: Path) -> VKitti2Options:
        return VKitti2Options(path=folder)


def test_depth_is_in_metres_cropped_as_kitti_is_and_ends_at_80(folder: Path) -> None:
    batch = open_set(VKitti2Options(path=folder), "depth").read(0)
    assert batch.rgb.shape == (1, 3, 352, 1216)
    stored = street(20.0)[375 - 352 :, 13 : 13 + 1216].astype(np.int64)
    assert np.array_equal(batch.mask[0].numpy(), (stored > 0) & (stored < 8000))
    mask = batch.mask[0]
    torch.testing.assert_close(batch.target[0, 0][mask], torch.from_numpy(stored)[mask] / 100)
    assert (batch.target[0, 0][~mask] == 0).all()
    # The picture is cut alike: it is as bright as its column is far to the right.
    assert batch.rgb[0, 0, 0, 0] * 255 == pytest.approx(13 * 255 // W, abs=3)


def test_normals_of_the_street_and_of_the_wall(folder: Path) -> None:
    batch = open_set(VKitti2Options(path=folder), "normals").read(0)
    normals, mask = batch.target[0], batch.mask[0]
    wall = normals[:, 40:200, 700:1100]
    assert mask[40:200, 700:1100].all()
    torch.testing.assert_close(wall, torch.tensor([0.0, 0, 1]).view(3, 1, 1).expand_as(wall))
    road = normals[:, 250:, 100:600]
    assert mask[250:, 100:600].all()
    # Depth is rounded to a centimetre.
    torch.testing.assert_close(road.mean((1, 2)), torch.tensor([0.0, 1, 0]), rtol=0, atol=5e-3)
    stored = torch.from_numpy(street(20.0)[375 - 352 :, 13 : 13 + 1216].astype(np.int64))
    near = (stored > 0) & (stored < 8000)
    assert not (mask & ~near).any()
    assert mask.sum() > 0.98 * near.sum()


def test_conditions_and_order(folder: Path) -> None:
    assert len(open_set(VKitti2Options(path=folder), "depth")) == 3
    only = open_set(VKitti2Options(path=folder, conditions=("clone",)), "depth")
    assert len(only) == 1
    paper = open_set(VKitti2Options(path=folder), "depth")
    assert [paper.read(i).target.max() > 60 for i in range(3)] == [True, True, True]
    assert [float(paper.read(i).target[0, 0, 100, 900]) for i in range(3)] == [20.0, 30.0, 0.0]


def test_both_archives_in_one_folder(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "Scene01/morning:Camera_0", 0, 20.0, apart=False)
    together = open_set(VKitti2Options(path=tmp_path), "depth")
    assert torch.equal(together.read(0).target, open_set(VKitti2Options(path=folder), "depth").read(0).target)


def test_missing_files_are_counted_or_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingError, match=r"no picture at all.*unpack vkitti_2.0.3_rgb.tar"):
        open_set(VKitti2Options(path=tmp_path), "depth")
    write(tmp_path, "Scene01/morning:Camera_0", 0, 20.0)
    write(tmp_path, "Scene01/morning:Camera_0", 1, 20.0)
    caplog.clear()
    depths = tmp_path / "vkitti_2.0.3_depth/Scene01/morning/frames/depth/Camera_0"
    (depths / "depth_00001.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(open_set(VKitti2Options(path=tmp_path), "depth")) == 1
    assert "49 folders without a picture, first vkitti_2.0.3_rgb/Scene01/morning" in caplog.messages[0]
    assert "1 of 2 pictures lack files" in caplog.messages[1]
    (depths / "depth_00000.png").unlink()
    with pytest.raises(TrainingError, match=r"depth_00000.png, and none of 2 pictures .*unpack"):
        open_set(VKitti2Options(path=tmp_path), "depth")


def test_another_size_and_nothing_but_sky(tmp_path: Path) -> None:
    write(tmp_path, "Scene01/morning:Camera_0", 0, 20.0)
    path = tmp_path / "vkitti_2.0.3_depth/Scene01/morning/frames/depth/Camera_0/depth_00000.png"
    pictures = open_set(VKitti2Options(path=tmp_path), "normals")
    Image.fromarray(np.full((H, W), 65535, np.uint16)).save(path)
    with pytest.raises(SampleError, match="not one pixel"):
        pictures.read(0)
    Image.fromarray(np.full((H, W + 1), 2000, np.uint16)).save(path)
    with pytest.raises(SampleError, match=r"expected \(375, 1242\)"):
        pictures.read(0)
