"""Batched ray casting of simple shapes, with exact depth and normals, on any torch device.

Camera rays have a forward component of 1, so their parameter at a hit *is* the depth. Shapes are looped over (a few
dozen) and scenes and pixels vectorised: the working set of one shape stays in a CPU's cache, and a GPU sees few, large
kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthmill.pipeline.training import textures
from depthmill.pipeline.training.shapes import Scene, Slots, first_hit, own_normals, pack

FAR_M = 200.0  # what lies beyond is not drawn
# What lies beyond has no labels, like the sky: as Virtual KITTI 2 is used, lest a horizon take up all of depth's range.
MEASURED_M = 80.0
# What depths a scene's pixels may have, metres: what predictions are held to where they are scored.
DEPTH_RANGE_M = (1e-3, MEASURED_M)
_GAMMA = 2.2


@dataclass(frozen=True, eq=False)
class Views:
    """Rendered scenes.

    Attributes:
        rgb: (B, 3, H, W) float32 in [0, 1], display-referred (gamma 2.2).
        depth: (B, H, W) float32, metres along the viewing axis (not along the ray); +inf where there
            is sky, or nothing nearer than `MEASURED_M`.
        normals: (B, 3, H, W) float32, unit, camera frame (x right, y up, z towards the viewer), facing the camera;
            (0, 0, 0) where there is no depth.
        mask: (B, H, W) bool, False where there is no depth.
    """

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Views:
        """Some of the scenes."""
        return Views(*(getattr(self, field.name)[rows] for field in fields(self)))

    def frames(self) -> npt.NDArray[np.uint8]:
        """The colours as files and the labeler have them, (B, H, W, 3) uint8."""
        return (self.rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def concatenate(parts: Sequence[Views]) -> Views:
    """Put batches of one picture size together."""
    return Views(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Views)))


def _cast(slots: Slots, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest hits of rays (B, 3, P or 1): their parameters (B, P), +inf for none, and the slots they hit, int64."""
    shape = (origin.shape[0], max(origin.shape[2], direction.shape[2]))
    best = torch.full(shape, torch.inf, device=origin.device)
    winner = torch.zeros(shape, dtype=torch.int64, device=origin.device)
    for n, kind in enumerate(slots.kinds):
        if not bool(slots.seen[:, n].any()):
            continue
        into = slots.into[:, n]
        o = into @ (origin - slots.centre[:, n, :, None])
        t = first_hit(kind, o, into @ direction, slots.taper[:, n, None])
        closer = (t < best) & slots.seen[:, n, None]
        best = torch.where(closer, t, best)
        winner = torch.where(closer, n, winner)
    return best, winner


def _lit(slots: Slots, origin: Tensor, towards: Tensor, reach: Tensor) -> Tensor:
    """Whether nothing stands between points and the light: (B, P) bool; `reach` (B, 1) is the light's parameter."""
    shape = (origin.shape[0], max(origin.shape[2], towards.shape[2]))
    lit = torch.ones(shape, dtype=torch.bool, device=origin.device)
    for n, kind in enumerate(slots.kinds):
        if not bool(slots.casts[:, n].any()):
            continue
        into = slots.into[:, n]
        o = into @ (origin - slots.centre[:, n, :, None])
        t = first_hit(kind, o, into @ towards, slots.taper[:, n, None])
        lit &= (t >= reach) | ~slots.casts[:, n, None]
    return lit


def _albedo(
    source: textures.Atlas, slots: Slots, row: Tensor, hit: Tensor, metres: Tensor, facing: Tensor, footprint: Tensor
) -> Tensor:
    """Colour of the hit points: (B, P, 3) linear rgb.

    Patterns are laid on the coordinate plane, in the shape's own axes and in metres, that the surface faces most.
    """
    axis = facing.abs().argmax(-1)
    x, y, z = metres.unbind(-1)
    u = torch.where(axis == 0, y, x)
    v = -torch.where(axis == 2, y, z)  # rows of a pattern run downwards
    pattern, tile_m = slots.pattern[row, hit], slots.tile_m[row, hit]
    value, relief = (
        textures.sample(source, pattern[..., i], u / tile_m[..., i], v / tile_m[..., i], footprint / tile_m[..., i])
        for i in range(2)
    )
    low, middle, high = slots.colours[row, hit].reshape(*hit.shape, 3, 3).unbind(-2)
    first, second = (2 * value).clamp(0, 1)[..., None], (2 * value - 1).clamp(0, 1)[..., None]
    colour = torch.lerp(torch.lerp(low, middle, first), high, second)
    amount = slots.glow[row, hit][..., :1]
    return colour * (1 + amount * (relief[..., None] - 0.5) * 1.6)


def _stacked(scenes: Sequence[Scene], name: str, device: torch.device) -> Tensor:
    values = np.stack([np.asarray(getattr(scene, name)) for scene in scenes])
    # Python's numbers are float64, which some GPUs lack.
    return torch.from_numpy(values.astype(np.float32) if values.dtype == np.float64 else values).to(device)


def render(
    scenes: Sequence[Scene], height: int, width: int, *, samples: int = 1, device: torch.device | None = None
) -> Views:
    """Render scenes, all at one size.

    Args:
        scenes: What to render.
        height: Rows.
        width: Columns.
        samples: Rays that a pixel's colour is averaged over. Depth and normals are always those at its centre.
        device: Where to compute, and where the result is; the CPU by default.
    """
    device = device or torch.device("cpu")
    slots = pack(scenes, height / width, device)
    focal_px = _stacked(scenes, "focal", device) * width
    exact, colours = None, []
    for sample in range(samples):
        # The pixel's centre, then the points of an additive recurrence (Roberts' R2), which cover it evenly.
        dx, dy = ((0.5 + sample * 0.7548776662) % 1, (0.5 + sample * 0.5698402910) % 1) if sample else (0.5, 0.5)
        x = (torch.arange(width, device=device) + dx - width / 2).expand(height, width).flatten()
        y = -(torch.arange(height, device=device) + dy - height / 2)[:, None].expand(height, width).flatten()
        rays = torch.stack(
            [
                x / focal_px[:, None],
                y / focal_px[:, None],
                torch.full_like(focal_px[:, None], -1).expand(-1, x.numel()),
            ],
            dim=1,
        )
        colour, depth, normals = _trace(scenes, slots, rays, focal_px)
        colours.append(colour)
        exact = exact or (depth, normals)
    assert exact is not None
    shape = (len(scenes), height, width)
    depth, normals = exact[0].view(shape), exact[1].view(len(scenes), 3, height, width)
    measured = depth <= MEASURED_M
    depth, normals = torch.where(measured, depth, torch.inf), normals * measured[:, None]
    linear = torch.stack(colours).mean(0).view(len(scenes), 3, height, width)
    return Views(linear.clamp(0, 1) ** (1 / _GAMMA), depth, normals, torch.isfinite(depth))


def _trace(scenes: Sequence[Scene], slots: Slots, rays: Tensor, focal_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Follow camera rays (B, 3, P) with a forward component of 1.

    Returns:
        Linear rgb (B, 3, P), depth in metres (B, P) and camera-frame normals (B, 3, P).
    """
    device = rays.device
    source = textures.atlas(device)
    rotation, position = _stacked(scenes, "rotation", device), _stacked(scenes, "position", device)
    light, sky = _stacked(scenes, "light", device), _stacked(scenes, "sky", device)
    direction = rotation @ rays
    depth, hit = _cast(slots, position[:, :, None], direction)
    solid = depth < FAR_M
    depth = torch.where(solid, depth, torch.inf)
    t = torch.where(solid, depth, 1.0)

    row = torch.arange(len(scenes), device=device)[:, None]
    point = (position[:, :, None] + t[:, None] * direction).mT  # (B, P, 3)
    into, taper = slots.into[row, hit], slots.taper[row, hit]
    own = (into @ (point - slots.centre[row, hit])[..., None])[..., 0]
    kinds = torch.tensor(slots.kinds, device=device)[hit]
    own_normal = own_normals(kinds, own, taper)
    # Normals go by the inverse transpose: into is the inverse of the shape's map.
    normal = torch.nn.functional.normalize((into.mT @ own_normal[..., None])[..., 0], dim=-1)
    cosine = (normal * direction.mT).sum(-1, keepdim=True)
    normal = torch.where(cosine > 0, -normal, normal)

    length = direction.norm(dim=1)
    slant = (cosine[..., 0].abs() / length).clamp(min=0.05)
    # Between the footprint's short and long side; the long one alone would blur floors away.
    footprint = t * length / focal_px[:, None] / slant.sqrt()
    albedo = _albedo(source, slots, row, hit, own * slots.size[row, hit], own_normal / slots.size[row, hit], footprint)

    lifted = (point + normal * (1e-3 + 2e-4 * t[..., None])).mT
    is_lamp = light[:, 3:] > 0
    towards = light[:, :3, None] - is_lamp[..., None] * lifted
    lit = _lit(slots, lifted, towards, torch.where(is_lamp, 1.0, torch.inf))
    toward_unit = torch.nn.functional.normalize(towards, dim=1)
    lambert = (normal.mT * toward_unit).sum(1).clamp(min=0) * lit
    # A lamp's light falls off, softly, since a real room's walls throw it back.
    lambert = lambert * torch.where(is_lamp, 6 / (3 + towards.square().sum(1)).clamp(min=1), 1.0)
    ambient = _stacked(scenes, "ambient", device)[:, None] * (0.75 + 0.25 * normal[..., 2:])
    shade = ambient + _stacked(scenes, "light_colour", device)[:, None] * lambert[..., None]
    colour = albedo * (shade + slots.glow[row, hit][..., 1:])

    background = _sky(scenes, source, direction, sky)
    fog = torch.exp(-_stacked(scenes, "fog_per_m", device)[:, None] * t * length)[..., None]
    colour = torch.where(solid[..., None], torch.lerp(sky[:, :1].expand_as(colour), colour, fog), background)
    camera_normal = rotation.mT @ normal.mT * solid[:, None]
    return colour.mT, depth, camera_normal


def _sky(scenes: Sequence[Scene], source: textures.Atlas, direction: Tensor, sky: Tensor) -> Tensor:
    """Colour of the sky along world directions (B, 3, P): (B, P, 3) linear rgb."""
    x, y, z = torch.nn.functional.normalize(direction, dim=1).unbind(1)
    height = z.clamp(min=0)
    colour = torch.lerp(sky[:, :1], sky[:, 1:], (height**0.5)[..., None])
    layer = _stacked(scenes, "clouds", direction.device)[:, None].expand_as(x)
    # Clouds lie on a plane overhead.
    u, v = (along / (height + 0.12) * 0.25 for along in (x, y))
    value = textures.sample(source, layer, u, v, torch.full_like(x, 1 / 128))
    amount = _stacked(scenes, "cloudiness", direction.device)[:, None] * (value * (height * 6).clamp(max=1))
    bright = sky.amax(dim=(1, 2))[:, None, None]
    return torch.lerp(colour, bright.expand_as(colour), amount[..., None])
