"""Several answers of a diffusion estimator for one frame, made one."""

from __future__ import annotations

import torch

from depthmill.pipeline.model.single_step import unit

_ROUNDS = 100
_CONSTANT = 1e-6  # a depth map that deviates less is flat: its scale cannot be told


def ensemble_depth(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Align depth maps to one another by a scale and a shift each, and take the median of each pixel.

    The median lies in the frame of the alignment, whose own scale and shift mean nothing. diffusers' `ensemble_depth`
    then stretches each picture to [0, 1], and so would make videos flicker; here the median is brought back to where
    the members were: by the scale and shift, not negative, with which it is nearest, in least squares, to their mean.
    Equal members come back unchanged. Up to that affine map the result is diffusers', but that `align` finds another
    minimum.

    Args:
        members: (E, H, W) float32 in [0, 1], E of 3 or more.

    Returns:
        Depth, (H, W) float32 in [0, 1], and the median absolute deviation of the aligned members from it, (H, W), in
        units of that depth. Of an even number of values the lower middle one is the median, as with diffusers.
    """
    scales, shifts = align(members)
    aligned = members * scales[:, None, None] + shifts[:, None, None]
    median = aligned.median(dim=0).values
    spread = (aligned - median).abs().median(dim=0).values
    mean = members.mean(dim=0)
    centred = median - median.mean()
    scale = ((centred * (mean - mean.mean())).mean() / centred.square().mean().clamp(min=_CONSTANT**2)).clamp(min=0)
    return (centred * scale + mean.mean()).clip(0, 1), spread * scale


def align(members: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and shifts that bring depth maps nearest to one another.

    Marigold's objective (Ke et al. 2024, §3.3; diffusers, `ensemble_depth`): the least sum, over all pairs, of the root
    mean square difference. There a weak pull towards [0, 1] keeps scales from shrinking to nothing, and a general
    solver is stopped after two steps; here the aligned members' standard deviations must have the mean 1, and the
    minimum is found, where members that run against each other count as unrelated: so no scale is negative. The best
    shifts are known: they give all the same mean. What is left is convex in the deviations u, and depends on the
    members through E² numbers, the mean square differences of the standardised ones:
    ‖u_i z_i - u_j z_j‖² = (u_i - u_j)² + u_i u_j ‖z_i - z_j‖². It is solved by iteratively reweighted least squares:
    each pair's square is weighed by the inverse of its distance before.

    Args:
        members: (E, H, W) float32.

    Returns:
        Scales and shifts, (E,) float32 each, scales not negative, such that `members * scale + shift` agree. All have
        the mean 0 then. A flat member is no exception; its scale is 0.
    """
    count = len(members)
    flat = members.flatten(1)
    means = flat.mean(dim=1)
    centred = flat - means[:, None]
    deviations = centred.square().mean(dim=1).sqrt()
    known = deviations > _CONSTANT
    z = torch.where(known[:, None], centred / deviations.clamp(min=_CONSTANT)[:, None], 0.0)
    apart = torch.stack([(z - one).square().mean(dim=1) for one in z]).cpu().double()  # (E, E): 2 - 2 correlation
    apart = torch.where((known[:, None] & known).cpu(), apart.clamp(max=2.0), 2.0).fill_diagonal_(0.0)
    u = torch.ones(count, dtype=torch.float64, device="cpu")
    # The least of uᵀ A u with Σ u = E, by its Lagrangian: [A 1; 1ᵀ 0] [u; λ] = [0; E].
    system = torch.ones(count + 1, count + 1, dtype=torch.float64, device="cpu")
    system[-1, -1] = 0.0
    right = torch.zeros(count + 1, dtype=torch.float64, device="cpu")
    right[-1] = count
    for _ in range(_ROUNDS):
        distance = ((u[:, None] - u).square() + u[:, None] * u * apart).sqrt()
        weight = (1 / distance.clamp(min=1e-6)).fill_diagonal_(0.0)
        weight /= weight.mean()
        system[:-1, :-1] = weight.sum(dim=1).diag() - weight * (1 - apart / 2)
        before, u = u, torch.linalg.solve(system, right)[:-1]
        if (u - before).abs().max() < 1e-6:
            break
    scales = torch.where(known, u.to(deviations) / deviations.clamp(min=_CONSTANT), 0.0)
    return scales, -scales * means


def ensemble_normals(members: torch.Tensor) -> torch.Tensor:
    """For each pixel, the member nearest in angle to the members' mean direction (diffusers, `ensemble_normals`).

    E2E-FT's evaluation of Marigold's normals takes one whole member instead, that with the least angle to the mean.

    Args:
        members: (E, 3, H, W) float32 unit vectors, E of 3 or more.

    Returns:
        (3, H, W) float32, a member's own vector everywhere.
    """
    cosines = (members * unit(members.mean(dim=0))).sum(dim=1)  # (E, H, W)
    nearest = cosines.argmax(dim=0)  # (H, W)
    return members.gather(0, nearest[None, None].expand(1, *members.shape[1:]))[0]
