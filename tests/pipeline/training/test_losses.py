from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from depthmill.pipeline.training import losses
from depthmill.pipeline.training.record import mean_angle_deg


def grid(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def everywhere(depth: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(depth, dtype=torch.bool)


def test_fit_equals_numpys_least_squares() -> None:
    prediction, target = grid(3, 8, 9), 40 + 5 * grid(3, 8, 9, seed=1)
    mask = grid(3, 8, 9, seed=2) > 0.3
    scale, shift = losses.fit_affine(prediction, target, mask)
    for b in range(3):
        p, t = prediction[b][mask[b]].double().numpy(), target[b][mask[b]].double().numpy()
        expected = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
        np.testing.assert_allclose([scale[b], shift[b]], expected, rtol=1e-4)


def test_what_hardly_varies_against_its_mean_gets_no_scale() -> None:
    target = grid(1, 16, 16)
    scale, _ = losses.fit_affine(1000 + 0.01 * target, target, everywhere(target))
    assert 0 < scale < 0.01  # by least squares alone, 100


def test_depth_loss_ignores_scale_shift_and_whatever_is_masked() -> None:
    depth = 2 + 30 * grid(2, 16, 16)
    mask = grid(2, 16, 16, seed=1) > 0.2
    clipped, usable = losses.clip_depth(depth, mask)
    assert usable.all()
    prediction = torch.where(mask, 0.03 * clipped - 0.7, 99.0)
    holes = torch.where(mask, depth, torch.inf)
    assert losses.depth_loss(prediction, holes, mask) < 1e-3 * float(clipped.mean())
    # A least-squares fit may also turn the sign: only the anchor tells which way depth runs.
    assert losses.depth_loss(-prediction, holes, mask) < 1e-3 * float(clipped.mean())


def test_depth_loss_of_a_known_misfit() -> None:
    # Prediction 0, 1, 0, 1 against 0, 0, 1, 1 is uncorrelated: the best fit is the mean, which is off by a half.
    depth = torch.tensor([[[1.0, 1.0], [2.0, 2.0]]])
    prediction = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    torch.testing.assert_close(losses.depth_loss(prediction, depth, everywhere(depth)), torch.tensor(0.5))


def test_relative_depth_loss_divides_by_depth_and_has_no_unit() -> None:
    depth = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    prediction = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]])  # fits best as 2, 3, 2, 3: off by 1 everywhere
    expected = torch.tensor((1 / 1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    for unit in (1, 10):
        loss = losses.depth_loss(prediction, unit * depth, everywhere(depth), relative=True)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_pooled_depth_loss_is_the_mean_over_pixels_and_not_over_pictures() -> None:
    depth, prediction = 1 + grid(3, 8, 8), grid(3, 8, 8, seed=1)
    depth[2] = 5  # flat: it does not count
    mask = torch.ones_like(depth, dtype=torch.bool)
    mask[1, :6] = False
    for relative in (False, True):
        one, other = (
            losses.depth_loss(prediction[i : i + 1], depth[i : i + 1], mask[i : i + 1], relative=relative)
            for i in (0, 1)
        )
        torch.testing.assert_close(losses.depth_loss(prediction, depth, mask, relative=relative), (one + other) / 2)
        pooled = losses.depth_loss(prediction, depth, mask, relative=relative, pooled=True)
        torch.testing.assert_close(pooled, (64 * one + 16 * other) / 80)
    assert losses.depth_loss(prediction, depth, mask & False, pooled=True) == 0


def test_depth_loss_is_in_metres() -> None:
    depth, prediction = 1 + grid(2, 8, 8), grid(2, 8, 8, seed=3)
    mask = everywhere(depth)
    once, tenfold = losses.depth_loss(prediction, depth, mask), losses.depth_loss(prediction, 10 * depth, mask)
    torch.testing.assert_close(tenfold, 10 * once)


def test_what_is_flat_does_not_depend_on_the_unit() -> None:
    depth = torch.stack([torch.linspace(2, top, 64).view(8, 8) for top in (2.0005, 3)])
    for unit in (1e-4, 1, 1e4):
        assert losses.clip_depth(unit * depth, everywhere(depth))[1].tolist() == [False, True]


def test_percentiles_clip_outliers() -> None:
    depth = torch.linspace(1, 2, 400).view(1, 20, 20).clone()
    depth[0, 0, 0], depth[0, -1, -1] = 1e-3, 1e4
    clipped, _ = losses.clip_depth(depth, everywhere(depth))
    assert clipped.min() == pytest.approx(1.02, abs=5e-3)
    assert clipped.max() == pytest.approx(1.98, abs=5e-3)


@pytest.mark.parametrize("case", ["nothing valid", "flat depth", "constant prediction", "one pixel"])
def test_degenerate_pictures_give_finite_losses_and_gradients(case: str) -> None:
    depth, mask = 1 + grid(2, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    prediction = grid(2, 8, 8, seed=1)
    if case == "nothing valid":
        mask[0], depth[0] = False, torch.nan
    elif case == "flat depth":
        depth[0] = torch.linspace(2, 2.0005, 64).view(8, 8)  # but for the rounding of a file
    elif case == "constant prediction":
        prediction[0] = 0.5
    else:
        mask[0] = False
        mask[0, 3, 4] = True
    prediction.requires_grad_()
    loss = losses.depth_loss(prediction, depth, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()
    assert prediction.grad[1].abs().max() > 0
    if case in ("nothing valid", "flat depth"):  # the other picture weighs as much as if it were alone
        torch.testing.assert_close(loss, losses.depth_loss(prediction[1:], depth[1:], mask[1:]))


def test_depth_gradient_against_differences() -> None:
    depth, mask = 1 + grid(1, 4, 5), grid(1, 4, 5, seed=2) > 0.2
    prediction = grid(1, 4, 5, seed=1).requires_grad_()
    losses.depth_loss(prediction, depth, mask).backward()
    assert prediction.grad is not None
    step = 1e-2
    for index in [(0, 0, 1), (0, 2, 2), (0, 3, 4)]:
        moved = []
        for sign in (1, -1):
            shifted = prediction.detach().clone()
            shifted[index] += sign * step
            moved.append(float(losses.depth_loss(shifted, depth, mask)))
        assert float(prediction.grad[index]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=2e-3)


def test_slope_loss_of_a_ramp_and_of_a_shift() -> None:
    target = grid(2, 16, 16)
    assert losses.slope_loss(target + 0.7, target) < 1e-5
    ramp = 0.01 * torch.arange(16)
    # A slope of 0.01 a pixel is 0.01, 0.02 and 0.04 a step at the three scales, along one axis.
    for one in (ramp, -ramp, ramp[:, None], -ramp[:, None]):
        torch.testing.assert_close(losses.slope_loss(target + one, target), torch.tensor(0.07), rtol=1e-4, atol=1e-5)


def unit(degrees: float) -> torch.Tensor:
    angle = math.radians(degrees)
    return torch.tensor([math.sin(angle), 0, math.cos(angle)]).view(1, 3, 1, 1).expand(1, 3, 2, 2)


@pytest.mark.parametrize("degrees", [1.0, 10.0, 45.0, 90.0, 135.0, 179.0])
def test_normals_loss_is_the_angle_whatever_the_length(degrees: float) -> None:
    mask = torch.tensor([[[True, False], [True, True]]])
    loss = losses.normals_loss(3.7 * unit(degrees), unit(0), mask)
    assert math.degrees(float(loss)) == pytest.approx(degrees, abs=0.1)


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 0.5, 90.0, 179.5, 179.9999])
def test_normals_gradient_is_finite_and_points_home(degrees: float) -> None:
    prediction = (0.8 * unit(degrees)).clone().requires_grad_()
    loss = losses.normals_loss(prediction, unit(0), torch.ones(1, 2, 2, dtype=torch.bool))
    loss.backward()
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()
    assert prediction.grad.abs().max() < 100
    if 0.1 < degrees < 179.8:
        after = prediction.detach() - 0.02 * prediction.grad
        assert mean_angle_deg(after, unit(0), torch.ones(1, 2, 2, dtype=torch.bool)) < degrees


def test_normals_gradient_against_differences() -> None:
    normals = torch.nn.functional.normalize(grid(1, 3, 2, 2) - 0.5, dim=1)
    prediction = (grid(1, 3, 2, 2, seed=1) - 0.5).requires_grad_()
    mask = torch.tensor([[[True, False], [True, True]]])
    losses.normals_loss(prediction, normals, mask).backward()
    assert prediction.grad is not None
    assert (prediction.grad[:, :, 0, 1] == 0).all()
    step = 1e-3
    for index in [(0, 0, 0, 0), (0, 1, 1, 0), (0, 2, 1, 1)]:
        moved = []
        for sign in (1, -1):
            shifted = prediction.detach().clone()
            shifted[index] += sign * step
            moved.append(float(losses.normals_loss(shifted, normals, mask)))
        assert float(prediction.grad[index]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.02, abs=1e-3)


def test_zero_vectors_and_no_valid_pixel_are_no_trouble() -> None:
    prediction = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for valid in (True, False):
        loss = losses.normals_loss(prediction, unit(30), torch.full((1, 2, 2), valid))
        loss.backward()
        assert torch.isfinite(loss)
    assert prediction.grad is not None
    assert torch.isfinite(prediction.grad).all()


def test_normalised_depth_is_near_at_minus_one_and_sky_at_one() -> None:
    depth = torch.linspace(2, 10, 100).view(1, 10, 10).clone()
    mask = torch.ones(1, 10, 10, dtype=torch.bool)
    depth[0, 0], mask[0, 0] = torch.inf, False
    unit = losses.normalised_depth(depth, mask)
    assert (unit[0, 0] == 1).all()
    assert unit[0, 1, 0] == -1
    assert unit[0, -1, -1] == 1
    assert (unit[0, 1:].flatten().diff() >= 0).all()
    assert (losses.normalised_depth(depth, torch.zeros_like(mask)) == 1).all()
