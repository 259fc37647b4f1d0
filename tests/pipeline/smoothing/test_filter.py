import weakref
from itertools import pairwise

import cv2
import numpy as np
import pytest

from depthmill.pipeline.smoothing.filter import (
    REACH,
    Filtered,
    FilterFrame,
    _correspondence,
    _half_grey,
    _Held,
    filter_frames,
)

H, W = 96, 128
TOWARDS = np.broadcast_to(np.float32([0, 0, 1]), (H, W, 3))


def texture(seed: int, height: int = H, width: int = W, sigma: float = 2.0) -> np.ndarray:
    """(height, width, 3) uint8 of smooth random colours, over their whole range."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), sigma), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def angles_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((a * b).sum(-1), -1, 1)))


def wall(frames: int, px: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Images, depths and normals of a wavy wall that a camera pans along, `px` pixels a frame."""
    width = W + px * frames
    colours = texture(1, width=width)
    y, x = np.mgrid[:H, :width].astype(np.float32)
    depth = (0.5 + 0.15 * np.sin(x / 19) + 0.1 * np.cos(y / 13)).astype(np.float32)
    normals = unit(np.stack([0.8 * np.cos(x / 17), 0.6 * np.sin(y / 23), np.ones_like(x)], -1))
    cuts = [slice(px * i, px * i + W) for i in range(frames)]
    return [colours[:, c] for c in cuts], np.stack([depth[:, c] for c in cuts]), np.stack([normals[:, c] for c in cuts])


def noisy(frames: int = 9, px: int = 3, seed: int = 0) -> list[FilterFrame]:
    rng = np.random.default_rng(seed)
    images, depths, normals = wall(frames, px)
    depths = depths + rng.normal(0, 0.01, depths.shape).astype(np.float32)
    normals = unit(normals + rng.normal(0, 0.1, normals.shape))
    return [FilterFrame(*one, shot=0) for one in zip(images, depths, normals, strict=True)]


def run(frames: list[FilterFrame | None], start: int = 0, stop: int | None = None) -> list[Filtered | None]:
    stop = len(frames) if stop is None else stop
    before, after = min(REACH, start), min(REACH, len(frames) - stop)
    filtered = list(filter_frames(iter(frames[start - before : stop + after]), before, after))
    assert len(filtered) == stop - start
    return filtered


def same(a: Filtered, b: Filtered) -> bool:
    return np.array_equal(a.depth, b.depth, equal_nan=True) and np.array_equal(a.normals, b.normals)


def test_constant_input_gives_itself():
    image, depth = texture(0), np.random.default_rng(0).random((H, W), np.float32)
    normals = unit(np.random.default_rng(1).normal(size=(H, W, 3)))
    for got in run([FilterFrame(image, depth, normals, 0)] * 6):
        np.testing.assert_array_equal(got.depth, depth)
        np.testing.assert_allclose(got.normals, normals, atol=2e-7)


def test_noise_falls_on_a_panning_clip_and_normals_stay_unit():
    frames = noisy()
    _, depths, normals = wall(9, 3)
    raw_depth, depth, raw_angle, angle = (np.empty(9) for _ in range(4))
    for i, got in enumerate(run(frames)):
        np.testing.assert_allclose(np.linalg.norm(got.normals, axis=-1), 1, atol=1e-6)
        raw_depth[i], depth[i] = (np.abs(d - depths[i]).mean() for d in (frames[i].depth, got.depth))
        raw_angle[i], angle[i] = (angles_deg(n, normals[i]).mean() for n in (frames[i].normals, got.normals))
    # Five frames can at best halve it (1 / sqrt(5)); the first and last have two neighbours.
    assert (depth[2:-2] < 0.62 * raw_depth[2:-2]).all(), depth / raw_depth
    assert (angle[2:-2] < 0.62 * raw_angle[2:-2]).all(), angle / raw_angle
    assert (depth < 0.8 * raw_depth).all()
    assert (angle < 0.8 * raw_angle).all()


@pytest.mark.parametrize("px", [2, 5])
def test_a_moving_depth_edge_stays_sharp(px):
    """A near square moves over a far wall: no pixel comes to lie between, however much noise there is to average."""
    rng = np.random.default_rng(0)
    back, front = texture(1) // 2, texture(2, 48, 48) // 2 + 128
    truths, frames = [], []
    for i in range(7):
        image, truth = back.copy(), np.full((H, W), 0.8, np.float32)
        patch = slice(24, 72), slice(20 + px * i, 68 + px * i)
        image[patch], truth[patch] = front, 0.3
        truths.append(truth)
        frames.append(FilterFrame(image, truth + rng.normal(0, 0.01, (H, W)).astype(np.float32), None, 0))
    for got, truth in zip(run(frames), truths, strict=True):
        assert np.abs(got.depth - truth).max() < 0.06  # four sigmas of the noise are 0.04
        assert np.abs(got.depth - truth).mean() < 0.0062  # 0.008 before
        assert got.normals is None


def test_nearer_frames_count_for_more():
    image = texture(0)
    depths = [0.5, 0.5, 0.5, 0.501, 0.502]  # so near to each other that they agree
    got = run([FilterFrame(image, np.full((H, W), depth, np.float32), None, 0) for depth in depths])
    assert got[2].depth == pytest.approx(0.5 + (0.9 * 0.001 + 0.6 * 0.002) / (1 + 2 * 0.9 + 2 * 0.6), abs=5e-6)


def test_labels_that_say_another_thing_have_no_say():
    """What stands still and looks the same, and yet one frame in the middle says that it faces elsewhere."""
    image, aside = texture(0), np.broadcast_to(unit(np.float32([1, 0, 0.5])), (H, W, 3))
    frames = [FilterFrame(image, None, aside if i == 2 else TOWARDS, 0) for i in range(5)]
    for i, got in enumerate(run(frames)):
        assert angles_deg(got.normals, frames[i].normals).max() < 5  # of 63


def test_what_looks_another_has_no_say():
    image, aside = texture(0) // 2, np.broadcast_to(unit(np.float32([0.2, 0, 1])), (H, W, 3))
    frames = [FilterFrame(image, np.full((H, W), 0.5, np.float32), TOWARDS, 0) for _ in range(5)]
    frames[2] = FilterFrame(image + np.uint8(100), np.full((H, W), 0.51, np.float32), aside, 0)
    got = run(frames)[2]
    np.testing.assert_allclose(got.depth, 0.51, atol=1e-4)
    np.testing.assert_allclose(got.normals, aside, atol=1e-3)


@pytest.mark.parametrize(
    ("there", "back", "grey", "sure"),
    [
        (2.0, -2.0, 100, 1.0),
        (2.0, 1.0, 100, 0.0),  # there and back is not where it began
        (2.0, -2.0, 150, 0.0),  # it looks another
        (200.0, -200.0, 100, 0.0),  # it has left the picture
    ],
)
def test_how_sure_a_correspondence_is(there, back, grey, sure):
    own, other = (
        _Held(frame, _half_grey(frame.image))
        for frame in (FilterFrame(np.full((H, W, 3), level, np.uint8), None, None, 0) for level in (100, grey))
    )
    flows = {
        pair: np.broadcast_to(np.float32([shift, 0]), (H // 2, W // 2, 2)).copy()
        for pair, shift in (((own, other), there), ((other, own), back))
    }
    flows[other, own][:, : W // 8 + 1] = 7  # not from where it came
    at, weight = _correspondence(own, other, flows, "fast")
    assert at[10, 20].tolist() == [20 + 2 * there, 10]
    assert weight[H // 2, W // 4] == pytest.approx(sure, abs=1e-3)


def test_an_edge_of_normals_stays_sharp():
    """Two walls that meet in a corner: 90 degrees apart, no normal in between."""
    left, right = unit(np.float32([1, 0, 1])), unit(np.float32([-1, 0, 1]))
    images, _, _ = wall(7, 3)
    for i, got in enumerate(
        run([FilterFrame(image, None, corner(i, left, right), 0) for i, image in enumerate(images)])
    ):
        assert angles_deg(got.normals, corner(i, left, right)).max() < 5


def corner(i: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(np.arange(W)[None, :, None] < 70 - 3 * i, left, right) * np.ones((H, 1, 1), np.float32)


def test_nothing_crosses_a_cut():
    a, b = noisy(6, 3, seed=0), noisy(6, 2, seed=1)
    joined = run(a + [FilterFrame(f.image, f.depth, f.normals, 1) for f in b])
    assert all(same(*pair) for pair in zip(joined, run(a) + run(b), strict=True))


def test_segments_give_what_the_whole_gives():
    frames = noisy(9)
    frames[4] = None
    whole = run(frames)
    assert whole[4] is None
    parts = [one for start, stop in pairwise((0, 1, 4, 6, 9)) for one in run(frames, start, stop)]
    assert [one is None for one in parts] == [one is None for one in whole]
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True) if a is not None)


def test_a_failed_frame_counts_for_nothing():
    frames = noisy(5)
    frames[1] = None
    got = run(frames)
    frames[1] = FilterFrame(texture(9), TOWARDS[..., 0], TOWARDS, 7)
    assert same(got[2], run(frames)[2])


def test_time_has_no_direction():
    frames = noisy(5)
    for a, b in zip(run(frames), reversed(run(frames[::-1])), strict=True):
        np.testing.assert_allclose(a.depth, b.depth, atol=1e-6)
        np.testing.assert_allclose(a.normals, b.normals, atol=1e-6)


def test_invalid_pixels_stay_invalid_and_spread_nowhere():
    frames = noisy(5)
    hole = slice(30, 50), slice(40, 60)
    frames[2].depth[hole], frames[2].normals[hole] = np.nan, 0
    got = run(frames)
    assert np.isnan(got[2].depth[hole]).all()
    assert not got[2].normals[hole].any()
    assert np.isnan(got[2].depth).sum() == 400
    for i in (0, 1, 3, 4):
        assert np.isfinite(got[i].depth).all()
        np.testing.assert_allclose(np.linalg.norm(got[i].normals, axis=-1), 1, atol=1e-6)


def test_at_most_five_frames_are_held():
    frames, given = noisy(9), []

    def coming():
        while frames:
            given.append(weakref.ref(frames[0]))
            yield frames.pop(0)

    for done, _ in enumerate(filter_frames(coming(), 0, 0)):
        assert len(given) <= done + REACH + 1
        assert sum(one() is not None for one in given) <= 2 * REACH + 1


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (20, 400), (33, 47)])
def test_pictures_of_any_size(size):
    """OpenCV's flow dies on small and thin ones; odd sides have halves, too."""
    frame = FilterFrame(texture(0, *size), np.full(size, 0.5, np.float32), None, 0)
    other = FilterFrame(texture(0, 50, 50), np.full((50, 50), 0.5, np.float32), None, 0)
    got = run([frame, frame, other, frame])  # one of another size, as in folders of pictures, is no neighbour
    assert [one.depth.shape for one in got] == [size, size, (50, 50), size]
    assert all((one.depth == 0.5).all() for one in got)
