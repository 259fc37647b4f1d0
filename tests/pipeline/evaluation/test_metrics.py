"""The figures against their definitions, written out in loops, and against the reference's own alignment grid."""

import math

import numpy as np
import pytest
import torch

from depthmill.pipeline.evaluation.metrics import (
    DEPTH_METRICS,
    NORMALS_METRICS,
    AnglePool,
    Moments,
    angles_deg,
    depth_metrics,
    normals_metrics,
    thin_columns,
)


def test_the_fit_is_least_squares():
    rng = np.random.default_rng(0)
    prediction, truth = rng.random(500).astype(np.float32), rng.uniform(1, 80, 500)
    expected = np.linalg.lstsq(np.stack([prediction, np.ones(500)], 1).astype(np.float64), truth, rcond=None)[0]
    assert Moments.of(prediction, truth).affine == pytest.approx(expected)
    assert Moments.of(np.full(500, 0.25, np.float32), truth).affine == pytest.approx((0, truth.mean()))
    rounded = Moments.of(np.full(7, 0.1), np.linspace(1, 5, 7))  # its mean is off by rounding
    assert rounded.affine == pytest.approx((0, 3))
    assert Moments.of(np.array([0.5]), np.array([3.0])).affine == (0, 3)


def test_the_fit_keeps_its_digits_far_from_zero():
    prediction = 1e6 + np.arange(100.0)
    assert Moments.of(prediction, 2 * prediction + 5).affine == pytest.approx((2, 5), rel=1e-6)


def test_pooled_moments_are_the_whole_ones():
    rng = np.random.default_rng(0)
    p, t = rng.normal(5, 1, 900), rng.uniform(1, 3, 900)
    whole = Moments.pooled([Moments.of(p[i:j], t[i:j]) for i, j in ((0, 10), (10, 500), (500, 900))])
    assert whole.affine == pytest.approx(np.polyfit(p, t, 1))
    assert whole.count == 900


@pytest.mark.parametrize(("width", "wanted"), [(6048, 1024), (2063, 1024), (1025, 1024)])
def test_columns_are_those_of_the_reference(width, wanted):
    grid = torch.arange(width, dtype=torch.float64).repeat(1, 3, 1)
    columns = torch.nn.Upsample(scale_factor=float(np.min(wanted / np.array([3, width]))), mode="nearest")(grid)
    assert columns.shape == (1, 3, wanted)
    assert (columns[0, 0].numpy() == thin_columns(width, wanted)).all()


def test_a_narrow_picture_keeps_its_columns():
    assert (thin_columns(1000, 1024) == np.arange(1000)).all()


def test_depth_figures_by_their_definitions():
    rng = np.random.default_rng(1)
    prediction, truth = rng.random(400), rng.uniform(0.5, 9.9, 400)
    scale, shift, low, high = 12.0, -2.0, 1e-3, 10.0  # some fall below 1e-3, some above 10
    found = depth_metrics(prediction, truth, scale, shift, (low, high))
    aligned = [max(min(max(scale * p + shift, low), high), 1e-6) for p in prediction]
    pairs = list(zip(aligned, truth, strict=True))
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    n = len(pairs)
    expected = {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "delta1": sum(max(p / t, t / p) < 1.25 for p, t in pairs) / n,
        "delta2": sum(max(p / t, t / p) < 1.25**2 for p, t in pairs) / n,
        "delta3": sum(max(p / t, t / p) < 1.25**3 for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "silog": 100 * math.sqrt(sum(d * d for d in logs) / n - (sum(logs) / n) ** 2),
    }
    assert found == pytest.approx(expected)
    assert tuple(found) == DEPTH_METRICS


def test_an_aligned_depth_without_a_lower_bound_still_has_a_logarithm():
    found = depth_metrics(np.array([0.0, 1.0]), np.array([1.0, 2.0]), 2.0, -1.0, (0.0, np.inf))
    assert found["log10"] == pytest.approx((6 + math.log10(2)) / 2)


def test_angles_by_the_cosine():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(300, 3)), rng.normal(size=(300, 3))
    cosine = [np.dot(p, q) / math.sqrt(np.dot(p, p) * np.dot(q, q)) for p, q in zip(a, b, strict=True)]
    assert angles_deg(a, b) == pytest.approx([math.degrees(math.acos(c)) for c in cosine])


def test_angles_at_their_ends():
    up = np.array([[0.0, 0.0, 1.0]])
    assert angles_deg(up, up)[0] == 0
    assert angles_deg(up, -up)[0] == 180
    assert angles_deg(0 * up, up)[0] == 90  # no direction is no perfect score
    assert angles_deg(up, np.array([[1e-7, 0, 1.0]]))[0] == pytest.approx(math.degrees(1e-7))


@pytest.mark.parametrize("sizes", [[1], [2], [700, 301]])
def test_a_pool_is_all_its_pixels_at_once(sizes):
    rng = np.random.default_rng(3)
    parts = [rng.uniform(0, 60, size) for size in sizes]
    pool = AnglePool()
    for part in parts:
        pool.add(part)
    every = np.concatenate(parts)
    expected = {
        "mean": np.average(every),
        "median": np.median(every),
        "rmse": math.sqrt(sum(a * a for a in every) / len(every)),
        "under_5": 100 * sum(a < 5 for a in every) / len(every),
        "under_7.5": 100 * sum(a < 7.5 for a in every) / len(every),
        "under_11.25": 100 * sum(a < 11.25 for a in every) / len(every),
        "under_22.5": 100 * sum(a < 22.5 for a in every) / len(every),
        "under_30": 100 * sum(a < 30 for a in every) / len(every),
    }
    assert pool.metrics() == pytest.approx(expected, abs=5.1e-4)
    assert normals_metrics(every) == pytest.approx(expected)
    assert tuple(pool.metrics()) == tuple(normals_metrics(every)) == NORMALS_METRICS


def test_a_bound_itself_is_not_below_it_and_180_has_a_bin():
    pool = AnglePool()
    pool.add(np.array([5.0, 30.0, 180.0]))
    figures = pool.metrics()
    assert figures["under_5"] == 0
    assert figures["under_30"] == pytest.approx(100 / 3)
    assert figures["median"] == pytest.approx(30, abs=1e-3)
