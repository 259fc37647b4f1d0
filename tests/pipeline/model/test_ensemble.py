"""Ensembling against diffusers' own, on members that are given to both."""

import diffusers
import pytest
import torch

from depthmill.pipeline.model.ensemble import align, ensemble_depth, ensemble_normals
from depthmill.pipeline.model.single_step import unit


def scene(height=48, width=64, seed=0):
    """A smooth depth map."""
    coarse = torch.rand(1, 1, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0].clip(0, 1)


def depth_members(count, noise, seed=0, **size):
    """One scene seen by `count` estimators: scale, shift and noise are each one's own; (E, H, W) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    truth = scene(**size)
    scales, shifts = 0.3 + 0.4 * torch.rand(2, count, 1, 1, generator=generator)
    wrong = torch.nn.functional.interpolate(
        torch.randn(count, 1, 8, 8, generator=generator), truth.shape, mode="bilinear"
    )[:, 0]
    return (truth * scales + 0.4 * shifts + noise * wrong).clip(0, 1)


def to_unit_range(depth):
    low, high = depth.min(), depth.max()
    return (depth - low) / (high - low), high - low


def disagreement(aligned):
    """Marigold's objective in units of the result's own range, in which no scale is free."""
    distances = torch.pdist(aligned.flatten(1)) / aligned[0].numel() ** 0.5
    median = aligned.median(dim=0).values
    return (distances.sum() / (median.max() - median.min())).item()


def theirs(members, **options):
    depth, uncertainty = diffusers.MarigoldDepthPipeline.ensemble_depth(
        members[:, None], output_uncertainty=True, **options
    )
    return depth[0, 0], uncertainty[0, 0]


def even_members(count, noise):
    """Members that no alignment brings nearer: as far from each other, as wide and as high, one as the other."""
    truth = to_unit_range(scene(24, 32).double().flatten())[0]
    free = ((truth - 0.5).abs() < 0.3).double()  # not at the ends, from which diffusers' solver starts
    wrong = torch.randn(len(truth), count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = torch.stack([free, free * truth], dim=1)
    basis = torch.linalg.qr(torch.cat([given, wrong * free[:, None]], dim=1)).Q[:, 2:]
    return (0.8 * truth + 0.1 + noise * len(truth) ** 0.5 * basis.T).reshape(count, 24, 32).float()


@pytest.mark.parametrize("count", [3, 4, 10])
def test_median_and_spread_equal_diffusers_where_there_is_nothing_to_align(count):
    members = even_members(count, noise=0.01)
    depth, uncertainty = ensemble_depth(members)
    ours, reach = to_unit_range(depth)
    reference, spread = theirs(members)
    error, spread_error = (ours - reference).abs().max(), (uncertainty / reach - spread).abs().max()
    print(f"even ensemble of {count}: depth {error:.1e}, uncertainty {spread_error:.1e}, which is {spread.mean():.1e}")
    assert spread.mean() > 1e-3
    assert error <= 1e-4
    assert spread_error <= 1e-4


@pytest.mark.parametrize("count", [3, 5, 10])
def test_depth_equals_diffusers_where_alignment_can_be_perfect(count):
    members = depth_members(count, 0.0)
    ours, _ = to_unit_range(ensemble_depth(members)[0])
    assert torch.allclose(ours, theirs(members)[0], atol=1e-5)


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_depth_is_nearer_to_diffusers_than_its_members_are_and_they_agree_better(count, noise):
    """Its solver seldom leaves the ranges that it starts from, so that no more than this can be asked."""
    members = depth_members(count, noise)
    depth, uncertainty = ensemble_depth(members)
    ours, reach = to_unit_range(depth)
    reference, spread = theirs(members)
    error, certainty = (ours - reference).abs().mean(), uncertainty.mean() / reach
    print(f"ensemble of {count}, noise {noise}: depth {error:.1e}, uncertainty {certainty:.1e} of {spread.mean():.1e}")
    assert error <= spread.mean()
    assert certainty <= 1.02 * spread.mean()


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.1])
def test_members_are_aligned_better_than_by_their_ranges(noise):
    """Where diffusers' solver starts, and whence it goes but two steps."""
    members = depth_members(7, noise)
    scales, shifts = align(members)
    flat = members.flatten(1)
    low, high = flat.min(dim=1).values[:, None, None], flat.max(dim=1).values[:, None, None]
    ours = disagreement(members * scales[:, None, None] + shifts[:, None, None])
    assert ours < 0.9 * disagreement((members - low) / (high - low))
    for member in range(7):  # and no member's scale alone could be better
        for factor in (0.98, 1.02):
            moved = scales.clone()
            moved[member] *= factor
            moved *= 7 / (moved * members.flatten(1).std(dim=1, correction=0)).sum()
            assert pairs(members, moved) > pairs(members, scales)


def pairs(members, scales):
    centred = members - members.mean(dim=(1, 2), keepdim=True)
    return torch.pdist((centred * scales[:, None, None]).flatten(1)).sum()


def test_equal_members_come_back_unchanged_and_certain():
    depth, uncertainty = ensemble_depth(scene().expand(5, -1, -1) * 0.5 + 0.2)
    assert torch.allclose(depth, scene() * 0.5 + 0.2, atol=1e-6)
    assert uncertainty.max() < 1e-6


def test_members_that_differ_by_scale_and_shift_alone_meet_at_their_mean():
    truth = scene()
    depth, uncertainty = ensemble_depth(torch.stack([truth * 0.4 + 0.1, truth * 0.6 + 0.2, truth * 0.5 + 0.4]))
    assert torch.allclose(depth, truth * 0.5 + 0.7 / 3, atol=1e-5)
    assert uncertainty.max() < 1e-5


def test_the_spread_grows_with_the_noise():
    spreads = [ensemble_depth(depth_members(5, noise))[1].mean().item() for noise in (0.0, 0.01, 0.03)]
    assert spreads[0] < 1e-6 < spreads[1] < 0.5 * spreads[2]


def test_a_wrong_member_is_outvoted():
    """One that is flat, or noise, or upside down, leaves no trace of itself."""
    truth, shape = scene() * 0.5 + 0.2, (48, 64)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for wrong in (torch.full(shape, 0.3), noise, 0.9 - truth):
        depth, uncertainty = ensemble_depth(torch.stack([truth, wrong, truth, truth, truth]))
        assert torch.corrcoef(torch.stack([depth.flatten(), truth.flatten()]))[0, 1] > 0.9999
        assert uncertainty.max() < 1e-3
        assert torch.isfinite(depth).all()


def test_nothing_is_turned_upside_down_by_a_wrong_member_of_more_contrast():
    truth = scene()
    depth, uncertainty = ensemble_depth(torch.stack([0.1 * truth, 0.1 * truth, 1 - truth]))
    assert depth.std() < 1e-6
    assert uncertainty.abs().max() < 1e-6


def test_flat_members_give_their_mean():
    members = torch.tensor([0.2, 0.3, 0.7])[:, None, None].expand(3, 4, 5)
    depth, uncertainty = ensemble_depth(members)
    assert torch.allclose(depth, torch.tensor(0.4), atol=1e-6)
    assert uncertainty.max() < 1e-6


@pytest.mark.parametrize("count", [3, 10])
def test_normals_equal_diffusers(count):
    generator = torch.Generator().manual_seed(0)
    facing = torch.tensor([0.1, 0.2, 0.9])[:, None, None]
    members = unit(facing + 0.4 * torch.randn(count, 3, 24, 32, generator=generator))
    reference, _ = diffusers.MarigoldNormalsPipeline.ensemble_normals(members, output_uncertainty=False)
    ours = ensemble_normals(members)
    assert torch.equal(ours, reference[0])
    assert len({int(i) for i in (members == ours).all(dim=1).float().argmax(dim=0).unique()}) == count
