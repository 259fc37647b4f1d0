import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from depthmill.pipeline.errors import EvaluationError
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.clips import SEEDS, check_version, export_clips, render_clip
from depthmill.pipeline.training.from_scratch.train import HELD_OUT_SEED
from depthmill.pipeline.training.raycast import render

H, W = 96, 128


@pytest.mark.parametrize("camera", ["static", "pan", "forward"])
@pytest.mark.parametrize("seed", [3, 11])
def test_a_frame_seen_from_the_next_ones_camera_is_the_next_frame(camera, seed):
    clip = render_clip(seed, camera, 8, H, W, samples=1)
    assert clip.rgb.shape == (8, H, W, 3)
    i, j = 2, 4
    v, u = np.mgrid[:H, :W]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(clip.intrinsics).T
    points = (rays * np.where(clip.valid[i], clip.depth_m[i], 1)[..., None]) @ clip.poses[i, :3, :3].T
    world = points + clip.poses[i, :3, 3]
    there = (world - clip.poses[j, :3, 3]) @ clip.poses[j, :3, :3]
    x, y = (there[..., k] / there[..., 2] * clip.intrinsics[k, k] + clip.intrinsics[k, 2] for k in (0, 1))
    inside = clip.valid[i] & (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
    found = clip.depth_m[j][y[inside].round().astype(int), x[inside].round().astype(int)]
    # Half a pixel beside the point, and not where something else hides it.
    error = np.abs(found - there[..., 2][inside]) / there[..., 2][inside]
    assert inside.mean() > 0.3
    assert np.median(error) < 0.01
    assert (error < 0.05).mean() > 0.9


def test_only_a_camera_that_moves_changes_the_picture():
    still, pan, forward = (render_clip(3, camera, 4, 48, 64) for camera in ("static", "pan", "forward"))
    views = render([scenes.sample(3)] * 4, 48, 64, samples=2)
    assert (still.rgb == views.frames()).all()
    assert (still.depth_m == views.depth.numpy()).all()
    assert (pan.poses[:, :3, 3] == pan.poses[0, :3, 3]).all()
    turns = pan.poses[1:, :3, :3] @ pan.poses[:-1, :3, :3].transpose(0, 2, 1)
    np.testing.assert_allclose(np.degrees(np.arccos((np.trace(turns, axis1=1, axis2=2) - 1) / 2)), 0.25, atol=1e-3)
    moved = forward.poses[3, :3, 3] - forward.poses[0, :3, 3]
    np.testing.assert_allclose(moved / np.linalg.norm(moved), forward.poses[0, :3, 2], atol=1e-5)
    lengths = np.linalg.norm(forward.normals[forward.valid], axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=1e-4)


def test_an_unknown_camera_is_refused():
    with pytest.raises(ValueError, match="expected one of static, pan, forward"):
        render_clip(0, "spin", 2, 48, 64)


def test_a_scene_of_nothing_but_sky_is_refused(monkeypatch):
    def looks_up(seed):
        scene = scenes.sample(seed)
        away = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)  # from above all, at the sky
        return replace(scene, rotation=away, position=np.array([0, 1e4, 0], np.float32))

    monkeypatch.setattr("depthmill.pipeline.training.clips.scenes", type("S", (), {"sample": staticmethod(looks_up)}))
    with pytest.raises(ValueError, match="nothing but sky"):
        render_clip(3, "forward", 2, 48, 64)


def test_an_export_that_was_stopped_goes_on(tmp_path):
    writing = export_clips(tmp_path, seeds=(3,), frames=2, height=32, width=48)
    assert next(writing) == "static_3"
    assert not (tmp_path / "rendered_video.json").exists()
    before = (tmp_path / "static_3/clip.json").stat().st_mtime_ns
    assert list(export_clips(tmp_path, seeds=(3,), frames=2, height=32, width=48)) == ["static_3", "pan_3", "forward_3"]
    assert (tmp_path / "static_3/clip.json").stat().st_mtime_ns == before
    clip = render_clip(3, "forward", 2, 32, 48)
    entry = json.loads((tmp_path / "rendered_video.json").read_text())["rendered"][2]["forward_3"][1]
    depth = np.asarray(Image.open(tmp_path / entry["gt_depth"])) / entry["factor"]
    np.testing.assert_allclose(depth[clip.valid[1]], clip.depth_m[1][clip.valid[1]], atol=0.51 / entry["factor"])
    assert (depth[~clip.valid[1]] == 0).all()
    np.testing.assert_allclose(entry["pose"], clip.poses[1])
    assert (np.asarray(Image.open(tmp_path / entry["image"])) == clip.rgb[1]).all()


def test_clips_of_other_sizes_or_scenes_are_not_taken_for_those_asked_for(tmp_path, monkeypatch):
    def exported(**size):
        list(export_clips(tmp_path, seeds=(3,), **size))
        index = json.loads((tmp_path / "rendered_video.json").read_text())["rendered"]
        frames = index[0]["static_3"]
        with Image.open(tmp_path / frames[-1]["image"]) as picture:
            return len(frames), picture.size

    assert exported(frames=2, height=32, width=48) == (2, (48, 32))
    assert exported(frames=3, height=32, width=48) == (3, (48, 32))
    assert exported(frames=3, height=24, width=32) == (3, (32, 24))
    about = tmp_path / "static_3/clip.json"
    before = about.stat().st_mtime_ns
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    assert next(export_clips(tmp_path, seeds=(3,), frames=3, height=24, width=32)) == "static_3"
    assert not (tmp_path / "rendered_video.json").exists()  # before all of them are
    assert about.stat().st_mtime_ns > before


def test_the_sets_scenes_are_held_out():
    assert min(SEEDS) > HELD_OUT_SEED


def test_clips_of_scenes_that_were_trained_on_are_rendered_anew(tmp_path):
    """An earlier version exported such ones, and did not write down their seeds."""
    assert next(export_clips(tmp_path, seeds=(3,), frames=2, height=24, width=32)) == "static_3"
    check_version(tmp_path)
    about = tmp_path / "static_3/clip.json"
    there = json.loads(about.read_text())
    del there["made"]["seed"]
    about.write_text(json.dumps(there))
    with pytest.raises(EvaluationError, match=r"scenes that models are trained on.*remove .*rendered_video\.json"):
        check_version(tmp_path)
    assert next(export_clips(tmp_path, seeds=(5,), frames=2, height=24, width=32)) == "static_5"
    check_version(tmp_path)
    assert next(export_clips(tmp_path, seeds=(3,), frames=2, height=24, width=32)) == "static_3"
    assert json.loads(about.read_text())["made"]["seed"] == 3
