import numpy as np
import pytest

from depthmill.pipeline.evaluation.metrics import Moments, depth_metrics
from depthmill.pipeline.smoothing.edges import GAPS, segment_edges, view
from depthmill.pipeline.smoothing.solve import _track, _trusted, solve
from depthmill.tests.pipeline.smoothing import worlds

LEAK = 0.05
FRAMES = 40


def smooth(images, depth, leak=LEAK):
    edges, score = segment_edges(map(view, images, depth), 0)
    return solve(edges, score, np.ones(len(depth), bool), leak=leak)


def applied(solution, depth):
    return solution.scale[:, None, None] * depth + solution.shift[:, None, None]


def figures(depth, metres):
    return depth_metrics(depth.ravel(), metres.ravel(), *Moments.of(depth.ravel(), metres.ravel()).affine, (1e-3, 1e3))


def left(scale, error=0.002, wrong=0.0):
    """What smoothing leaves of the log-scales of a video whose edges are off by 0.001, and how much it corrects.

    The edges say that they are off by `error` for each frame between theirs; a share of them is `wrong`, by 0.5.
    """
    frames, rng = len(scale), np.random.default_rng(0)
    edges = np.full((frames, len(GAPS), 6), np.nan, np.float32)
    for row, gap in enumerate(GAPS):
        ratio = np.log(scale[:-gap] / scale[gap:])
        middle, weight = np.full(len(ratio), 0.5), np.full(len(ratio), 1 / (error * gap) ** 2)
        noise = rng.normal(0, (0.001, 0.0001), (len(ratio), 2)).T * (ratio != 0)
        noise[0] += 0.5 * (np.random.default_rng(gap).random(len(ratio)) < wrong)
        fields = ratio + noise[0], middle, middle + noise[1], weight, 25 * weight, np.full(len(ratio), 0.9)
        edges[gap:, row] = np.stack(fields, -1)
    solution = solve(edges, np.full(frames, 0.02, np.float32), np.ones(frames, bool), leak=0.1)
    return np.log(scale * solution.scale), np.abs(np.log(solution.scale)) + np.abs(solution.shift)


@pytest.mark.parametrize(("camera", "times"), [("static", 50), ("pan", 50), ("forward", 20)])
def test_flicker_goes(camera, times):
    images, metres = worlds.room(FRAMES, camera)
    depth, scale, _ = worlds.disturbed(worlds.normalised(metres), seed=0)
    solution = smooth(images, depth)
    before, after = (np.diff(np.log(s)).std() for s in (scale, scale * solution.scale))
    assert after * times <= before
    assert figures(applied(solution, depth), metres)["abs_rel"] < 0.5 * figures(depth, metres)["abs_rel"]


def test_real_motion_stays():
    images, metres = worlds.room(FRAMES, "forward")
    depth = worlds.stored(worlds.normalised(metres))
    before, after = figures(depth, metres), figures(applied(smooth(images, depth), depth), metres)
    assert after["abs_rel"] <= before["abs_rel"] + 5e-4
    assert after["delta1"] >= before["delta1"] - 0.005


def test_constant_input_stays():
    images, metres = worlds.room(1, "static")
    depth = worlds.stored(worlds.normalised(metres))
    solution = smooth(np.repeat(images, 10, 0), np.repeat(depth, 10, 0))
    np.testing.assert_allclose(solution.scale, 1, atol=1e-6)
    np.testing.assert_allclose(solution.shift, 0, atol=1e-6)


@pytest.mark.parametrize("glitch", [0.05, 0.1, 0.4])
def test_one_frame_of_a_long_calm_shot_that_flickers(glitch):
    scale = np.ones(5000)
    scale[2500] = np.exp(glitch)
    log_scale, said = left(scale)
    assert abs(log_scale[2500]) <= 0.1 * glitch
    assert not np.delete(said, np.r_[2350:2650]).any(), "the rest is calm, and stays as it is"


def test_a_part_of_a_long_calm_shot_that_flickers():
    scale = np.ones(5000)
    scale[:100] = np.exp(np.random.default_rng(0).normal(0, 0.02, 100))
    log_scale, said = left(scale)
    assert np.diff(log_scale[:99]).std() < 0.1 * np.diff(np.log(scale[:99])).std()
    assert not said[300:].any()


def test_a_frozen_picture_is_no_measure_of_flicker():
    scale = np.exp(np.random.default_rng(0).normal(0, 0.08, 40))
    log_scale, _ = left(np.append(scale, np.full(200, scale[-1])))
    assert np.diff(log_scale[:40]).std() < 0.05 * np.diff(np.log(scale)).std()


def test_edges_that_are_wrong_are_not_followed():
    scale = np.exp(np.random.default_rng(1).normal(0, 0.08, 200))
    log_scale, _ = left(scale, wrong=0.05)
    assert np.diff(log_scale).std() < 0.05 * np.diff(np.log(scale)).std()


def test_scales_that_flat_depth_cannot_tell_are_not_followed():
    _, said = left(np.exp(np.random.default_rng(0).normal(0, 0.08, 40)), error=0.2)
    assert not said.any()


def test_which_way_time_runs_makes_no_difference_to_what_is_kept():
    correction = np.random.default_rng(0).normal(0, 0.01, 400)
    np.testing.assert_allclose(_trusted(correction[::-1], 0.005), _trusted(correction, 0.005)[::-1], rtol=1e-9)


def test_what_leads_out_of_a_shot_has_no_say():
    rng = np.random.default_rng(0)
    step, weight = 0.01 * rng.standard_t(1.5, (40, len(GAPS))), rng.uniform(1, 9, (40, len(GAPS)))
    inside = step.copy()
    for row, gap in enumerate(GAPS):
        inside[:gap, row] = np.nan
    np.testing.assert_array_equal(_track(step, weight), _track(inside, weight))


def test_joined_clips_give_what_each_gives():
    clips = []
    for seed, camera, grey in ((0, "pan", 0.4), (7, "forward", 1.0)):
        images, metres = worlds.room(12, camera, seed)
        clips.append(((images * grey).astype(np.uint8), worlds.disturbed(worlds.normalised(metres), seed)[0]))
    joined = smooth(*(np.concatenate(part) for part in zip(*clips, strict=True)))
    assert np.bincount(joined.shot).tolist() == [12, 12]
    for name in ("scale", "shift"):
        alone = np.concatenate([getattr(smooth(*clip), name) for clip in clips])
        np.testing.assert_allclose(getattr(joined, name), alone, atol=1e-6)


def test_another_affine_per_frame_changes_one_affine_per_shot():
    images, metres = worlds.room(12, "static")
    depth = worlds.normalised(metres)
    _, scale, shift = worlds.disturbed(depth, 3)
    other = (scale[:, None, None] * depth + shift[:, None, None]).astype(np.float32)
    errors = []
    for leak in (LEAK, 0.0):
        one, two = (applied(smooth(images, d, leak), d).ravel() for d in (depth, other))
        fit = Moments.of(two, one).affine
        errors.append(np.abs(fit[0] * two + fit[1] - one).max())
    assert errors[1] < 1e-3 < errors[0]


def test_frames_without_edges_lie_between_their_neighbours():
    images, metres = worlds.room(12, "static")
    depth = worlds.disturbed(worlds.normalised(metres), 1)[0]
    views = list(map(view, images, depth))
    views[5] = None
    labelled = np.arange(12) != 5
    got = solve(*segment_edges(views, 0), labelled, leak=LEAK)
    assert got.scale[5] == pytest.approx(np.sqrt(got.scale[4] * got.scale[6]), rel=0.01)
    assert got.shot.max() == 0


def test_one_frame_and_none():
    images, metres = worlds.room(1, "static")
    solution = smooth(images, worlds.stored(worlds.normalised(metres)))
    assert (solution.scale.tolist(), solution.shift.tolist(), solution.shot.tolist()) == ([1.0], [0.0], [0])
    blind = solve(np.full((3, 6, 6), np.nan), np.full(3, np.nan), np.zeros(3, bool), leak=LEAK)
    assert (blind.scale.tolist(), blind.shift.tolist()) == ([1.0] * 3, [0.0] * 3)
