from __future__ import annotations

import numpy as np
import pytest
import torch

from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.sets.normals import Intrinsics, normals_from_depth, rays

H, W = 60, 80
CAMERA = Intrinsics(70.0, 72.0, 38.0, 31.5)
ALL = np.ones((H, W), bool)
# Scenes of streets and yards, as Virtual KITTI's are: a centimetre of rounding is little at their distances.
STREETS = (103, 105, 107, 109, 121, 129)


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(float), np.broadcast_to(b, a.shape).astype(float)
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)))


def plane(normal: np.ndarray, distance: float) -> np.ndarray:
    """Depth of the plane of all points P with normal·P = -distance."""
    return -distance / (rays(H, W, CAMERA) @ normal)


def test_rays_point_right_up_and_away_from_the_viewer() -> None:
    view = rays(H, W, CAMERA)
    assert view[0, 0] == pytest.approx([-38 / 70, 31.5 / 72, -1])
    assert view[-1, -1] == pytest.approx([(79 - 38) / 70, -(59 - 31.5) / 72, -1])


@pytest.mark.parametrize("normal", [(0, 0, 1), (0.6, 0, 0.8), (0, 0.99, 0.2), (-0.5, -0.4, 0.7), (0.7, 0.1, 0.25)])
def test_planes_are_exact_at_any_slant(normal: tuple[float, ...]) -> None:
    unit = np.array(normal) / np.linalg.norm(normal)
    depth = plane(unit, 3.0)
    mask = (depth > 0) & (depth < 1e3)
    found, known = normals_from_depth(np.where(mask, depth, np.nan), mask, CAMERA)
    assert known.sum() > 0.98 * mask.sum()
    assert angle_deg(found[known], unit).max() < 1e-3
    assert (found[~known] == 0).all()


def test_sphere() -> None:
    height, width, camera = 120, 160, Intrinsics(280.0, 280.0, 79.5, 59.5)
    view, centre, radius = rays(height, width, camera), np.array([0.3, -0.2, -5.0]), 2.0
    a, b, c = (view**2).sum(-1), view @ centre, centre @ centre - radius**2
    seen = b**2 - a * c > 0
    assert 0.5 < seen.mean() < 1
    depth = (b - np.sqrt(np.where(seen, b**2 - a * c, 0))) / a
    expected = (view * depth[..., None] - centre) / radius
    found, known = normals_from_depth(depth, seen, camera)
    inner = seen & (expected[..., 2] > 0.5)
    assert known[inner].all()
    error = angle_deg(found[inner], expected[inner])
    assert error.mean() < 0.15
    assert error.max() < 5
    assert not known[~seen].any()


def test_normals_right_up_to_a_depth_edge_and_to_the_sky() -> None:
    wall, side = np.array([0, 0, 1.0]), np.array([0.6, 0, 0.8])
    near, far = plane(wall, 2.0), plane(side, 6.0)
    depth = np.where(np.arange(W) < 33, near, far)
    mask = np.broadcast_to(np.arange(H)[:, None] > 20, (H, W))
    found, known = normals_from_depth(np.where(mask, depth, 0), mask, CAMERA)
    assert np.array_equal(known, mask)
    assert angle_deg(found[21:, :33], wall).max() < 1e-3
    assert angle_deg(found[21:, 33:], side).max() < 1e-3


def test_what_is_too_thin_to_tell_has_no_normal() -> None:
    depth = np.full((H, W), 9.0)
    depth[:, 40:42] = 4.0
    found, known = normals_from_depth(depth, ALL, CAMERA)
    assert not known[:, 40:42].any()
    assert known[:, :40].all()
    assert known[:, 42:].all()
    assert angle_deg(found[known], np.array([0, 0, 1.0])).max() < 1e-3


@pytest.mark.parametrize(("rounding_m", "everywhere_deg", "inside_deg"), [(0, 3, 0.2), (0.01, 3.5, 0.6)])
def test_against_the_renderers_own_normals(rounding_m: float, everywhere_deg: float, inside_deg: float) -> None:
    height, width = 96, 128
    errors, inner, lost = [], [], 0
    for seed in STREETS:
        views, focal = scenes.view([seed], height, width), scenes.sample(seed).focal * width
        mask, expected = views.mask[0].numpy(), views.normals[0].permute(1, 2, 0).numpy()
        depth = np.where(mask, views.depth[0].numpy(), 0)
        if rounding_m:
            depth = np.round(depth / rounding_m) * rounding_m
        camera = Intrinsics(focal, focal, (width - 1) / 2, (height - 1) / 2)
        found, known = normals_from_depth(depth, mask, camera)
        lost += int((mask & ~known).sum())
        assert ((found * rays(height, width, camera)).sum(-1)[known] < 0).all()
        # Away from edges: where all normals of the 5 x 5 pixels around are alike.
        alike = torch.nn.functional.avg_pool2d(views.normals, 5, 1, 2)[0].norm(dim=0).numpy() > 0.9999
        errors.append(angle_deg(found[known], expected[known]))
        inner.append(angle_deg(found[known & alike], expected[known & alike]))
    assert np.concatenate(inner).size > 20_000
    assert lost < 0.1 * np.concatenate(errors).size
    assert np.concatenate(errors).mean() < everywhere_deg
    assert np.concatenate(inner).mean() < inside_deg
