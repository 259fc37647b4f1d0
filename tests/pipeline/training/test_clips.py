import numpy as np
import pytest

from depthmill.pipeline.training.clips import disturbed, normalised, render_clip

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
    assert (still.rgb[0] == still.rgb[3]).all()
    assert np.ptp(pan.poses[:, :3, 3]) == np.ptp(pan.poses[0, :3, 3])
    moved = forward.poses[3, :3, 3] - forward.poses[0, :3, 3]
    np.testing.assert_allclose(moved / np.linalg.norm(moved), forward.poses[0, :3, 2], atol=1e-5)
    lengths = np.linalg.norm(forward.normals[forward.valid], axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=1e-4)


def test_disturbed_depth_is_the_depth_scaled_and_shifted():
    clip = render_clip(3, "forward", 4, 48, 64)
    depth = normalised(clip.depth_m, clip.valid)
    assert np.nanmin(depth) >= 0
    assert np.nanmax(depth) <= 1
    got, scales, shifts = disturbed(depth, np.random.default_rng(0), noise=0)
    inside = np.isfinite(got) & (got > 0) & (got < 1)
    expected = depth * scales[:, None, None] + shifts[:, None, None]
    np.testing.assert_allclose(got[inside], expected[inside], atol=1.01e-4)


def test_an_unknown_camera_is_refused():
    with pytest.raises(ValueError, match="expected one of static, pan, forward"):
        render_clip(0, "spin", 2, 48, 64)
