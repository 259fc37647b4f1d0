"""Smoothing of the project's own scenes, whose depth is known: what a model that flickers is made better by."""

import numpy as np
import pytest

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.evaluation.metrics import Moments
from depthmill.pipeline.smoothing.edges import segment_edges, view
from depthmill.pipeline.smoothing.solve import solve
from depthmill.pipeline.training.clips import render_clip
from depthmill.tests.pipeline.smoothing import worlds

FRAMES, H, W = 40, 96, 128
FACTORS = {"static": 50, "pan": 50, "forward": 20}
_CLIPS = [
    pytest.param(seed, camera, marks=[] if (seed, camera) == (3, "forward") else pytest.mark.slow)
    for seed in range(1, 7)
    for camera in FACTORS
]


def smoothed(rgb, depth):
    views = (view(*frame) for frame in zip(rgb, depth, strict=True))
    edges, score = segment_edges(views, 0, flow=SmoothConfig().flow)
    return solve(edges, score, np.ones(len(rgb), bool), leak=SmoothConfig().leak)


def applied(solution, depth):
    return solution.scale[:, None, None] * depth + solution.shift[:, None, None]


def absrel(depth, clip):
    """With one scale and shift for the clip."""
    valid = clip.valid & np.isfinite(depth)
    found, truth = depth[valid].astype(np.float64), clip.depth_m[valid].astype(np.float64)
    scale, shift = Moments.of(found, truth).affine
    return float(np.mean(np.abs(np.maximum(scale * found + shift, 1e-3) - truth) / truth))


def test_disturbed_depth_is_the_depth_scaled_and_shifted():
    clip = render_clip(3, "forward", 4, 48, 64)
    depth = worlds.normalised(clip.depth_m, clip.valid, beyond=2)
    assert np.nanmin(depth) >= 0
    assert np.nanmax(depth) <= 1
    got, scales, shifts = worlds.disturbed(depth, 0, noise=0)
    inside = np.isfinite(got) & (got > 0) & (got < 1)
    expected = depth * scales[:, None, None] + shifts[:, None, None]
    np.testing.assert_allclose(got[inside], expected[inside], atol=1.01e-4)


@pytest.mark.parametrize(("seed", "camera"), _CLIPS)
def test_flicker_goes_and_what_does_not_flicker_stays(seed, camera):
    clip = render_clip(seed, camera, FRAMES, H, W, samples=1)
    depth = worlds.normalised(clip.depth_m, clip.valid, beyond=2)
    raw, scales, _ = worlds.disturbed(depth, seed)
    solution = smoothed(clip.rgb, raw)
    before, after = (np.diff(np.log(one * scales)).std() for one in (np.ones(FRAMES), solution.scale))
    was, now = absrel(raw, clip), absrel(applied(solution, raw), clip)
    stored = worlds.stored(depth)
    calm, kept = absrel(stored, clip), absrel(applied(smoothed(clip.rgb, stored), stored), clip)
    print(
        f"\nscene {seed}, {camera}: flicker {before / after:.0f} times less, AbsRel {was:.4f} -> {now:.4f}, "
        f"undisturbed {calm:.4f} -> {kept:.4f}"
    )
    assert now < was
    assert kept <= calm + 1e-4
    assert before / after >= FACTORS[camera]
