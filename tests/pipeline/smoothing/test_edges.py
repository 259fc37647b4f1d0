import numpy as np
import pytest

from depthmill.pipeline.smoothing.edges import FIELDS, GAPS, _difference, _fit, segment_edges, view
from depthmill.tests.pipeline.smoothing import worlds


@pytest.fixture(scope="module")
def clip():
    images, depth = worlds.room(12, "pan")
    return images, worlds.stored(worlds.normalised(depth))


def views(images, depth):
    return [view(image, frame) for image, frame in zip(images, depth, strict=True)]


def test_any_split_gives_the_same_bytes(clip):
    seen = views(*clip)
    seen[5] = None
    whole = segment_edges(seen, 0, max_edge=8)
    for length in (1, 5):
        parts = [
            segment_edges(seen[max(start - 8, 0) : start + length], min(start, 8), max_edge=8)
            for start in range(0, len(seen), length)
        ]
        for got, expected in zip((np.concatenate(p) for p in zip(*parts, strict=True)), whole, strict=True):
            assert got.tobytes() == expected.tobytes()
    edges, score = whole
    assert np.isnan(edges[5]).all()
    assert np.isnan(edges[6, GAPS.index(1)]).all()
    assert np.flatnonzero(np.isnan(score)).tolist() == [0, 5, 6]


def test_an_edge_is_the_affine_map_between_two_frames(clip):
    images, depth = clip
    other = (0.8 * depth[0] + 0.1).astype(np.float32)
    log_scale, later, earlier, *_ = segment_edges(views(images[[0, 0]], [other, depth[0]]), 0)[0][1, 0]
    assert log_scale == pytest.approx(np.log(0.8), abs=1e-4)
    assert earlier == pytest.approx(0.8 * later + 0.1, abs=1e-4)


def test_noise_does_not_shrink_scales_and_exchange_is_exact(clip):
    images, depth = clip
    noisy = depth[:2] + np.random.default_rng(0).normal(0, 0.03, (2, *depth.shape[1:])).astype(np.float32)
    there = segment_edges(views(images[:2], noisy), 0)[0][1, 0]
    back = segment_edges(views(images[1::-1], noisy[::-1]), 0)[0][1, 0]
    assert abs(there[0]) < 0.02  # least squares of one on the other loses 0.05 and more
    np.testing.assert_allclose(back[:3], [-there[0], there[2], there[1]], atol=1e-5)


def test_flat_depth_tells_a_shift_and_no_scale(clip):
    images, _ = clip
    noise = np.random.default_rng(0).normal(0, 0.002, (2, worlds.H, worlds.W))
    flat = (np.array([0.4, 0.5])[:, None, None] + noise).astype(np.float32)
    edge = dict(zip(FIELDS, segment_edges(views(images[:2], flat), 0)[0][1, 0], strict=True))
    assert edge["scale_weight"] < 100 < edge["shift_weight"]
    assert edge["earlier"] - edge["later"] == pytest.approx(-0.1, abs=1e-3)


def test_depths_that_run_opposite_ways_tell_no_scale():
    depth = np.linspace(0.2, 0.8, 200)
    log_scale, _, _, scale_weight, shift_weight = _fit(depth, 1 - depth, 0.002)
    assert log_scale == scale_weight == 0 < shift_weight


def test_a_few_pixels_tell_nothing(clip):
    images, depth = (part[:2] for part in clip)
    few = np.full_like(depth, np.nan)
    few[:, 30:40, 30:40] = depth[:, 30:40, 30:40]
    edge = dict(zip(FIELDS, segment_edges(views(images, few), 0)[0][1, 0], strict=True))
    assert np.isnan(edge["log_scale"])
    assert edge["scale_weight"] == edge["shift_weight"] == 0 < edge["coverage"]


def test_scenes_of_the_same_brightness_differ():
    one, other = (np.tile(np.array([low, 255 - low], np.uint8), (8, 4)) for low in (40, 100))
    assert _difference(one, other) == 1


def test_a_view_of_a_large_picture_is_small():
    seen = view(np.zeros((400, 1600, 3), np.uint8), np.full((400, 1600), 0.5, np.float32))
    assert seen.grey.shape == seen.depth.shape == (128, 512)


def test_the_further_apart_two_frames_are_the_less_their_edge_is_believed(clip):
    images, depth = clip
    edges, _ = segment_edges(views(images[[0] * 5], depth[[0] * 5]), 0, max_edge=4)
    errors = edges[4, :, FIELDS.index("scale_weight")] ** -0.5
    np.testing.assert_allclose(errors, 0.002 * np.array([1, 2, 4]), rtol=0.01)


def test_clipped_depth_and_depth_edges_are_left_out(clip):
    images, depth = clip
    step = depth[0].copy()
    step[:, 64:] += 0.2
    step[:20], step[-20:], step[40, 20] = 0, 1, np.nan
    seen = view(images[0], step).depth
    assert np.isnan(seen[:10]).all()
    assert np.isnan(seen[-10:]).all()
    assert np.isnan(seen[20, 10])
    assert np.isnan(seen[:, 31:33]).all()
    assert np.isfinite(seen[12:36]).mean() > 0.5


def test_a_picture_of_another_scene_pairs_little(clip):
    images, depth = clip
    others, _ = worlds.room(1, "static", seed=5)
    edges, score = segment_edges(views([images[0], others[0]], depth[:2]), 0)
    assert edges[1, 0, FIELDS.index("coverage")] < 0.3  # 0.26 with OpenCV 4
    same = segment_edges(views(images[:2], depth[:2]), 0)
    assert same[0][1, 0, FIELDS.index("coverage")] > 0.8
    assert same[1][1] < 0.1
    assert score[1] > 0


def test_pictures_pair_whatever_their_exposure_and_shape(clip):
    images, depth = clip
    brighter = images[:2] // 2 + np.array([0, 40], np.uint8)[:, None, None, None]
    tall = [view(images[0].transpose(1, 0, 2), depth[0].T)] * 2
    for seen in (views(brighter, depth[:2]), tall):
        assert segment_edges(seen, 0)[0][1, 0, FIELDS.index("coverage")] > 0.8
