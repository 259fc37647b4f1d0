"""The ray caster against geometry worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depthmill.pipeline.training import props, scenes
from depthmill.pipeline.training.raycast import Views, render
from depthmill.pipeline.training.shapes import Scene, Shape

H, W, FOCAL = 24, 32, 0.9

# A camera at the origin that looks along +y, z up: its right is +x, its back is -y.
LEVEL = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)


def solid(kind: str, centre: tuple[float, ...], size: tuple[float, ...] = (1, 1, 1), **more: object) -> Shape:
    return props.shape(np.random.default_rng(0), kind, "plaster", centre, size, **more)  # type: ignore[arg-type]


def scene(*shapes: Shape, rotation: np.ndarray = LEVEL, position: tuple[float, ...] = (0, 0, 0)) -> Scene:
    return Scene(
        shapes=shapes,
        position=np.array(position, np.float32),
        rotation=rotation.astype(np.float32),
        focal=FOCAL,
        light=np.array([0.3, -0.5, 0.8, 0], np.float32),
        light_colour=np.ones(3, np.float32),
        ambient=np.full(3, 0.3, np.float32),
        sky=np.full((2, 3), 0.5, np.float32),
        clouds=0,
        cloudiness=0.0,
        fog_per_m=0.0,
    )


@pytest.mark.gpu
def test_a_gpu_renders_the_same() -> None:
    ours, theirs = (scenes.view(range(8), H, W, device=torch.device(device)) for device in ("cuda", "cpu"))
    same = ours.mask.cpu() == theirs.mask
    assert same.float().mean() > 0.995
    near = (ours.rgb.cpu() - theirs.rgb).abs().amax(1) < 0.05
    assert near.float().mean() > 0.97, "a ray along an edge may fall to either side"
    both = ours.mask.cpu() & theirs.mask
    assert ((ours.depth.cpu() / theirs.depth)[both] - 1).abs().median() < 1e-4


def rays(height: int = H, width: int = W) -> Tensor:
    """(H, W, 3) camera rays through the pixels' centres with a forward component of 1."""
    x = (torch.arange(width) + 0.5 - width / 2) / (FOCAL * width)
    y = -(torch.arange(height) + 0.5 - height / 2) / (FOCAL * width)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), -torch.ones(height, width)], -1)


def one(*shapes: Shape, **more: object) -> Views:
    return render([scene(*shapes, **more)], H, W)  # type: ignore[arg-type]


def test_wall_seen_head_on_has_one_depth_and_faces_the_viewer() -> None:
    views = one(solid("box", (0, 5.5, 0), (50, 0.5, 50)))
    torch.testing.assert_close(views.depth, torch.full((1, H, W), 5.0))
    torch.testing.assert_close(views.normals, torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1).expand(1, 3, H, W))


@pytest.mark.parametrize("kind", ["plane", "box"])
def test_floor_under_a_level_camera(kind: str) -> None:
    floor = solid("plane", (0, 0, -1.5)) if kind == "plane" else solid("box", (0, 0, -2.5), (400, 400, 1))
    views = one(floor)
    down = -rays()[..., 1]
    expected = 1.5 / down
    seen = (down > 0) & (expected < 75)
    assert seen.any()
    torch.testing.assert_close(views.depth[0][seen], expected[seen], rtol=1e-4, atol=0)
    assert (views.normals[0][:, seen] - torch.tensor([0.0, 1, 0])[:, None]).abs().max() < 1e-5
    assert not views.mask[0][down < 0].any()


def test_floor_under_a_pitched_and_rolled_camera() -> None:
    rotation = LEVEL @ props.turn(0, -0.4) @ props.turn(0.1)
    views = one(solid("plane", (0, 0, -3)), rotation=rotation)
    up = torch.from_numpy(rotation[2].astype(np.float32))  # the world's z in the camera's frame
    expected = -3 / (rays() @ up)
    seen = views.mask[0]
    assert seen.float().mean() > 0.5
    torch.testing.assert_close(views.depth[0][seen], expected[seen], rtol=2e-4, atol=0)
    assert (views.normals[0][:, seen] - up[:, None]).abs().max() < 1e-5


def test_sphere() -> None:
    views = one(solid("sphere", (0.5, 6, 0.2), (2, 2, 2)))
    d, centre = rays(), torch.tensor([0.5, 0.2, -6])
    a, b, c = (d * d).sum(-1), -(d * centre).sum(-1), centre @ centre - 4
    root = (b * b - a * c).clamp(min=0).sqrt()
    expected = (-b - root) / a
    seen = (b * b - a * c) > 0
    assert torch.equal(seen, views.mask[0])
    torch.testing.assert_close(views.depth[0][seen], expected[seen], rtol=1e-4, atol=0)
    outward = (d * expected[..., None] - centre)[seen] / 2
    torch.testing.assert_close(views.normals[0][:, seen].T, outward, rtol=0, atol=2e-3)


def test_cylinder_and_cone_at_the_middle_row() -> None:
    upright = one(solid("frustum", (0, 5, 0), (1, 1, 2)))
    middle = upright.depth[0, H // 2 - 1 : H // 2 + 1, W // 2 - 1 : W // 2 + 1]
    torch.testing.assert_close(middle, torch.full((2, 2), 4.0), rtol=2e-3, atol=0)
    cone = one(solid("frustum", (0, 5, 0), (1, 1, 2), taper=1.0))
    # Halfway up, its radius is half the foot's; its side leans back by atan(1 / 4).
    middle = cone.depth[0, H // 2 - 1 : H // 2 + 1, W // 2 - 1 : W // 2 + 1]
    torch.testing.assert_close(middle, torch.full((2, 2), 4.5), rtol=1e-2, atol=0)
    normal = cone.normals[0, :, H // 2, W // 2]
    torch.testing.assert_close(normal[1:], torch.tensor([1.0, 4]) / 17**0.5, rtol=0, atol=2e-2)


def test_cylinder_seen_from_above_shows_its_cap() -> None:
    looking_down = np.eye(3)
    views = one(solid("frustum", (0, 0, -4), (1, 1, 1)), rotation=looking_down)
    torch.testing.assert_close(views.depth[0, H // 2, W // 2], torch.tensor(3.0))
    torch.testing.assert_close(views.normals[0, :, H // 2, W // 2], torch.tensor([0.0, 0, 1]))


def test_room_is_seen_from_inside() -> None:
    views = one(solid("box", (0, 0, 0), (3, 4, 2), casts_shadow=False))
    assert views.mask.all()
    torch.testing.assert_close(views.depth[0, H // 2, W // 2], torch.tensor(4.0))


def test_the_nearer_shape_hides_the_farther() -> None:
    near, far = solid("box", (0, 3.5, 0), (0.4, 0.5, 0.4)), solid("box", (0, 9, 0), (50, 1, 50))
    for shapes in ((near, far), (far, near)):
        depth = one(*shapes).depth[0]
        torch.testing.assert_close(depth[H // 2, W // 2], torch.tensor(3.0))
        torch.testing.assert_close(depth[0, 0], torch.tensor(8.0))


def test_empty_sky_is_masked() -> None:
    views = one()
    assert not views.mask.any()
    assert torch.isinf(views.depth).all()
    assert (views.normals == 0).all()
    torch.testing.assert_close(views.rgb, torch.full((1, 3, H, W), 0.5 ** (1 / 2.2)))


def test_what_is_farther_than_80_m_has_no_truth() -> None:
    for distance, seen in ((79.9, True), (80.1, False)):
        views = one(solid("box", (0, distance + 0.5, 0), (500, 0.5, 500)))
        assert (views.mask == seen).all()
        assert (views.normals.norm(dim=1) == seen).all()


def test_shadow_falls_away_from_the_sun() -> None:
    # The sun shines from the camera's right; a post stands in the middle of a floor seen from above.
    floor, post = solid("plane", (0, 0, -8)), solid("frustum", (0, 0, -7), (0.4, 0.4, 1))
    base = scene(floor, rotation=np.eye(3))
    sun = np.array([0.8, 0, 0.6, 0], np.float32)
    lit, shaded = (
        render([Scene(**{**vars(base), "shapes": shapes, "light": sun})], 60, 80).rgb[0].mean(0)
        for shapes in ((floor,), (floor, post))
    )
    darker = (lit - shaded) > 0.02
    pixels_per_m = FOCAL * 80 / 8
    left = darker[30, : 40 - round(0.6 * pixels_per_m)]
    right = darker[30, 40 + round(0.6 * pixels_per_m) :]
    assert left.any()
    assert not right.any()


def test_more_samples_smooth_colours_and_leave_labels_alone() -> None:
    stripes = solid("sphere", (0, 5, 0))
    rough, smooth = (render([scene(stripes)], H, W, samples=samples) for samples in (1, 4))
    assert torch.equal(rough.depth, smooth.depth)
    assert torch.equal(rough.normals, smooth.normals)
    assert not torch.equal(rough.rgb, smooth.rgb)


def test_frames_are_the_colours_to_half_a_step() -> None:
    views = scenes.view([1, 2], 24, 32)
    frames = views.frames()
    assert (frames.shape, frames.dtype, frames.flags.c_contiguous) == ((2, 24, 32, 3), np.uint8, True)
    np.testing.assert_allclose(frames.transpose(0, 3, 1, 2) / 255, views.rgb, atol=0.501 / 255)
