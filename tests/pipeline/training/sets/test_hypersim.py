"""A folder in the layout of Marigold's preprocessing script, with Hypersim's own previews of normals beside it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthmill.pipeline.errors import SampleError, TrainingError
from depthmill.pipeline.training.mixing import read_usable
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.sets.hypersim import HypersimOptions
from depthmill.tests.pipeline.training.sets.contract import SetContract

H, W = 48, 64
FACING = np.array([0.6, 0.0, 0.8])
FRAMES = [
    ("ai_001_001", "cam_00", 0),
    ("ai_001_001", "cam_00", 17),
    ("ai_001_001", "cam_01", 3),
    ("ai_002_005", "cam_00", 99),
]


def names(scene: str, camera: str, frame: int) -> tuple[str, str, str]:
    return (
        f"train/{scene}/rgb_{camera}_fr{frame:04d}.png",
        f"train/{scene}/depth_plane_{camera}_fr{frame:04d}.png",
        f"normals/{scene}/images/scene_{camera}_geometry_preview/frame.{frame:04d}.normal_cam.png",
    )


def encode(normals: np.ndarray) -> np.ndarray:
    return np.round((normals + 1) * 127.5).astype(np.uint8)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def config(tmp_path: Path) -> HypersimOptions:
    """Four pictures. The nearest depth is the frame's number in decimetres, plus a metre; it grows to the right."""
    rng = np.random.default_rng(0)
    for frame in FRAMES:
        rgb, depth, normals = (tmp_path / name for name in names(*frame))
        save(rgb, rng.integers(0, 256, (H, W, 3), dtype=np.uint8))
        millimetres = np.broadcast_to(1000 + 100 * frame[2] + np.arange(W) * 10, (H, W)).astype(np.uint16)
        millimetres[0] = 0  # no geometry
        millimetres[1] = 65_000  # as far as the paper looks, and farther
        save(depth, millimetres)
        truth = np.broadcast_to(FACING, (H, W, 3)).copy()
        truth[2] = -FACING  # towards the wall
        truth[3] = 0  # none
        truth[4] = -1  # NaN, saved as black
        truth[5] = 0.8 * FACING  # not of unit length
        save(normals, encode(truth))
    with (tmp_path / "train" / "filename_meta_train.csv").open("w", newline="") as file:
        # As pandas writes it, less most of the statistics.
        table = csv.writer(file)
        table.writerow(
            ["", "scene_name", "camera_name", "frame_id", "split_partition_name", "rgb_path", "depth_path", "depth_max"]
        )
        for i, (scene, camera, frame) in enumerate(FRAMES):
            rgb, depth, _ = (name.removeprefix("train/") for name in names(scene, camera, frame))
            table.writerow([i, scene, camera, frame, "train", rgb, depth, 65.0])
    return HypersimOptions(path=tmp_path, height=H, width=W)


class TestHypersim(SetContract):
    def focal(self, index: int) -> float:
        return 886.81 / 1024


def test_depth_is_in_metres_and_ends_at_65(config: HypersimOptions) -> None:
    batch = open_set(config, "depth").read(1)
    assert not batch.mask[0, :2].any()
    assert batch.mask[0, 2:].all()
    torch.testing.assert_close(batch.target[0, 0, 2:], (2.7 + torch.arange(W) / 100).expand(H - 2, W))
    rgb = np.array(Image.open(config.path / names(*FRAMES[1])[0]))
    torch.testing.assert_close(batch.rgb[0], torch.from_numpy(rgb).permute(2, 0, 1) / 255)


def test_normals_are_turned_to_the_camera_and_left_out_where_there_are_none(config: HypersimOptions) -> None:
    batch = open_set(config, "normals").read(0)
    assert batch.mask[0].any(1).tolist() == [False, False, True, False, False] + [True] * (H - 5)
    normals = batch.target[0][:, batch.mask[0]].T
    torch.testing.assert_close(normals, torch.tensor(FACING).float().expand_as(normals), rtol=0, atol=0.005)


def test_a_normal_is_turned_by_the_ray_that_sees_it_not_by_the_axis(config: HypersimOptions) -> None:
    # Seen at the picture's left edge (x = -0.58 at depth 1), it faces the camera though its z points away from it.
    grazing = np.array([0.9, 0.0, -0.3]) / np.hypot(0.9, 0.3)
    save(config.path / names(*FRAMES[0])[2], encode(np.broadcast_to(grazing, (H, W, 3))))
    normals = open_set(config, "normals").read(0).target[0, :, 10]
    torch.testing.assert_close(normals[:, 0], torch.tensor(grazing).float(), rtol=0, atol=0.01)
    torch.testing.assert_close(normals[:, -1], -torch.tensor(grazing).float(), rtol=0, atol=0.01)


def test_resized_truth_is_truth_of_the_place(config: HypersimOptions) -> None:
    small = config.model_copy(update={"height": 24, "width": 16})  # narrower: the middle is cut out
    batch = open_set(small, "depth").read(0)
    assert batch.rgb.shape == (1, 3, 24, 16)
    columns = 16 + torch.arange(16) * 2  # 32 of 64 columns, every other
    torch.testing.assert_close(batch.target[0, 0, 12], 1 + (columns + 1) / 100)
    assert not batch.mask[0, 0].any()


def test_missing_files_are_left_out_and_counted(config: HypersimOptions, caplog: pytest.LogCaptureFixture) -> None:
    (config.path / names(*FRAMES[1])[2]).unlink()
    (config.path / names(*FRAMES[3])[1]).unlink()
    with caplog.at_level(logging.WARNING):
        assert len(open_set(config, "depth")) == 3
        assert len(open_set(config, "normals")) == 2
    assert "1 of 4 pictures lack files" in caplog.messages[0]
    assert "2 of 4 pictures lack files" in caplog.messages[1]
    assert "frame.0017.normal_cam.png" in caplog.messages[1]


def test_a_table_that_is_cut_lists_what_is_before_and_a_damaged_one_is_told_of(config: HypersimOptions) -> None:
    table = config.path / "train" / "filename_meta_train.csv"
    with table.open("a") as file:
        file.write("4,ai_002_005,cam")
    assert len(open_set(config, "depth")) == len(open_set(config, "normals")) == len(FRAMES)
    table.write_bytes(table.read_bytes() + b"\xff")
    with pytest.raises(TrainingError, match=r"filename_meta_train.csv cannot be read .*preprocess_hypersim.py"):
        open_set(config, "depth")


def test_nothing_there_says_what_to_do(config: HypersimOptions, tmp_path: Path) -> None:
    for scene in ("ai_001_001", "ai_002_005"):
        for path in (config.path / "train" / scene).glob("depth*"):
            path.unlink()
    with pytest.raises(TrainingError, match=r"depth_plane_cam_00_fr0000.png.*none of 4 .*preprocess_hypersim.py"):
        open_set(config, "depth")
    table = config.path / "train" / "filename_meta_train.csv"
    table.write_text("rgb_path,depth_path\na,b\n")
    with pytest.raises(TrainingError, match="no column camera_name, frame_id, scene_name"):
        open_set(config, "depth")
    table.unlink()
    with pytest.raises(TrainingError, match=r"No such file.*preprocess_hypersim.py"):
        open_set(config, "depth")


def test_pictures_that_cannot_be_used_are_counted_and_replaced(
    config: HypersimOptions, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [config.path / names(*frame)[1] for frame in FRAMES]
    save(paths[0], np.zeros((H, W), np.uint16))
    save(paths[1], np.zeros((H, W, 3), np.uint8))
    paths[2].write_bytes(paths[2].read_bytes()[:60])
    pictures = open_set(config, "depth")
    for index, reason in enumerate(["not one pixel has truth", "expected grey with 16 bits", "cannot be decoded"]):
        with pytest.raises(SampleError, match=f"{paths[index].name}: .*{reason}"):
            pictures.read(index)
    skipped: dict[int, str] = {}
    with caplog.at_level(logging.WARNING):
        for index in (3, 0, 1, 0):
            assert torch.equal(read_usable(pictures, index, skipped).target, pictures.read(3).target)
    assert sorted(skipped) == [0, 1, 2]
    assert len(caplog.messages) == 3


def test_sizes_that_differ(config: HypersimOptions) -> None:
    save(config.path / names(*FRAMES[0])[2], encode(np.ones((H, 2 * W, 3))))
    with pytest.raises(SampleError, match="differ in size"):
        open_set(config, "normals").read(0)
