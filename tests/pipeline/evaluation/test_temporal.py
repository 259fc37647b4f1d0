"""Figures of clips, against hand and NumPy."""

import numpy as np
import pytest

from depthmill.pipeline.evaluation.metrics import Moments
from depthmill.pipeline.evaluation.temporal import alignment_error, steadiness

K = np.array([[50.0, 0, 19.5], [0, 50.0, 14.5], [0, 0, 1]])
H, W = 30, 40


def pose(*position_m, turn_deg=0.0):
    c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
    made = np.eye(4)
    made[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
    made[:3, 3] = position_m or 0
    return made


def test_a_wall_that_comes_nearer_agrees_with_itself():
    far, near = np.full((H, W), 4.0), np.full((H, W), 3.5)
    assert alignment_error(far, near, K, K, pose(), pose(0, 0, 0.5)) == pytest.approx(0, abs=1e-12)
    assert alignment_error(near, far, K, K, pose(0, 0, 0.5), pose()) == pytest.approx(0, abs=1e-12)


def test_a_wrong_depth_counts_as_a_share_of_the_other():
    depth = np.full((H, W), 4.0)
    assert alignment_error(depth, depth, K, K, pose(), pose(0, 0, 0.5)) == pytest.approx(0.5 / 4)
    assert alignment_error(depth, 1.25 * depth, K, K, pose(), pose()) == pytest.approx(0.2)


def test_sideways_only_what_both_see_counts():
    depth = np.full((H, W), 5.0)
    wrong = depth.copy()
    wrong[:, 30:] = 10.0  # what the one frame, a metre to the left, does not see of the other: its last 10 columns
    wrong[0, 0] = 10.0  # the last that it does see
    assert alignment_error(depth, wrong, K, K, pose(), pose(1, 0, 0)) == pytest.approx(0.5 / (30 * H))
    assert alignment_error(depth, wrong, K, K, pose(1, 0, 0), pose()) == pytest.approx(0.5 * 10 / 30)


def test_the_nearest_of_several_is_seen():
    one = np.full((1, 40), 10.0)
    one[0, 10] = 2.0  # moves by 25 / 2 pixels where the wall moves by 2.5, over it
    k = K.copy()
    k[1, 2] = 0
    other = np.full((1, 40), 10.0)
    other[0, 22] = 2.0
    assert alignment_error(one, other, k, k, pose(), pose(-0.48, 0, 0)) == pytest.approx(0, abs=1e-12)


def test_a_turning_camera_and_pixels_without_depth():
    v, u = np.mgrid[:H, :W]
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T

    def wall(at):  # the plane z = 6 of the world, seen by a camera at the origin
        return 6.0 / (rays @ at[:3, :3].T)[..., 2]

    here, there = pose(), pose(turn_deg=5)
    assert alignment_error(wall(here), wall(there), K, K, here, there) < 0.003  # half a pixel beside
    holes = wall(here).copy()
    holes[::2] = np.nan
    holes[1::4] = 0
    assert alignment_error(holes, wall(there), K, K, here, there) < 0.003


def test_no_overlap_is_no_figure():
    depth = np.full((H, W), 4.0)
    assert np.isnan(alignment_error(depth, depth, K, K, pose(), pose(turn_deg=180)))
    assert np.isnan(alignment_error(depth, np.full((H, W), np.nan), K, K, pose(), pose()))


def test_steadiness_is_of_the_maps_that_suit_each_frame():
    rng = np.random.default_rng(1)
    truth = rng.uniform(2, 6, (8, 200))
    scale, shift = rng.uniform(1.5, 3, 8), rng.uniform(-0.5, 0.5, 8)
    frames = [Moments.of((t - b) / a, t) for t, a, b in zip(truth, scale, shift, strict=True)]
    found = steadiness(frames)
    assert found["scale_spread"] == pytest.approx(np.log(scale).std())
    assert found["scale_flicker"] == pytest.approx(np.diff(np.log(scale)).std())
    middle = (scale * np.mean((truth - shift[:, None]) / scale[:, None]) + shift) / truth.mean()
    assert found["shift_spread"] == pytest.approx(middle.std())
    assert found["shift_flicker"] == pytest.approx(np.diff(middle).std())
    assert np.isnan(steadiness(frames[:1])["scale_spread"])
    gap = steadiness([*frames[:3], None, *frames[3:]])
    assert gap["scale_spread"] == pytest.approx(found["scale_spread"])
    steps = np.diff(np.log(scale))
    assert gap["scale_flicker"] == pytest.approx(np.delete(steps, 2).std()), "no step leads across a frame left out"
    assert np.isnan(steadiness(frames[:2])["scale_flicker"])
    backwards = Moments.of(-frames[3].p - np.arange(3.0), np.arange(3.0))  # its scale is -1
    assert steadiness([*frames[:3], backwards, *frames[3:]])["scale_spread"] == pytest.approx(found["scale_spread"])
