"""Batched ray casting of simple shapes, with exact depth and normals, on any torch device.

A shape is the image under an affine map of a unit solid: the plane z = 0, the cube [-1, 1]^3, the sphere, or a frustum
around z with |z| <= 1. Rays are taken into the shape's own space, where intersection is school geometry, and because
the map is affine the ray's parameter keeps its meaning. Camera rays have a forward component of 1, so their parameter
at a hit *is* the depth. Shapes are looped over (a few dozen) and scenes and pixels vectorised: the working set of one
shape stays in a CPU's cache, and a GPU sees few, large kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthmill.pipeline.training import textures

ShapeKind = Literal["plane", "box", "sphere", "frustum"]
_KINDS: tuple[ShapeKind, ...] = ("plane", "box", "sphere", "frustum")

FAR_M = 200.0  # what lies beyond is sky
_TINY = 1e-6
_GAMMA = 2.2

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Shape:
    """One solid of a scene with its material. World frame: metres, z up.

    Attributes:
        kind: Which unit solid.
        centre: (3,) where its origin goes.
        rotation: (3, 3), columns are its own axes in the world's frame.
        size: (3,) half extents, metres; of a plane, (1, 1, 1).
        taper: Of a frustum: its top's radius is `1 - taper` of its bottom's; 0 is a cylinder, 1 a cone.
        patterns: (2,) layers of the atlas: what runs through the colours, and what modulates their brightness.
        tile_m: (2,) metres that one repetition of either pattern covers.
        colours: (3, 3) linear rgb that the first pattern runs through from 0 to 1.
        relief: In [0, 1], how much the second pattern modulates.
        emission: Light of its own, as a factor of its colour.
        casts_shadow: Whether it stands in the light's way; a room around its lamp must not.
    """

    kind: ShapeKind
    centre: Floats
    rotation: Floats
    size: Floats
    taper: float
    patterns: tuple[int, int]
    tile_m: tuple[float, float]
    colours: Floats
    relief: float
    emission: float
    casts_shadow: bool


@dataclass(frozen=True, eq=False)
class Scene:
    """What one camera sees. World frame: metres, z up.

    Attributes:
        shapes: In any order.
        position: (3,) of the camera.
        rotation: (3, 3), columns are the camera's right, up and backwards in the world's frame.
        focal: Focal length over the picture's width.
        light: (4,) homogeneous: (towards the sun, 0) or (a lamp's position, 1).
        light_colour: (3,) linear rgb.
        ambient: (3,) linear rgb.
        sky: (2, 3) linear rgb at the horizon and above.
        clouds: Layer of the atlas drawn on the sky.
        cloudiness: In [0, 1].
        fog_per_m: Extinction; fog has the horizon's colour.
    """

    shapes: tuple[Shape, ...]
    position: Floats
    rotation: Floats
    focal: float
    light: Floats
    light_colour: Floats
    ambient: Floats
    sky: Floats
    clouds: int
    cloudiness: float
    fog_per_m: float


@dataclass(frozen=True, eq=False)
class Views:
    """Rendered scenes.

    Attributes:
        rgb: (B, 3, H, W) float32 in [0, 1], display-referred (gamma 2.2).
        depth: (B, H, W) float32, metres along the viewing axis (not along the ray); +inf where there is sky.
        normals: (B, 3, H, W) float32, unit, camera frame (x right, y up, z towards the viewer), facing the camera;
            (0, 0, 0) where there is sky.
        mask: (B, H, W) bool, False where there is sky.
    """

    rgb: Tensor
    depth: Tensor
    normals: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Views:
        """Some of the scenes."""
        return Views(*(getattr(self, field.name)[rows] for field in fields(self)))


def concatenate(parts: Sequence[Views]) -> Views:
    """Put batches of one picture size together."""
    return Views(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Views)))


@dataclass(frozen=True, eq=False)
class _Slots:
    """Shapes of B scenes in N slots; a slot holds one kind in every scene, and is empty in some.

    Attributes:
        kinds: N indices into `_KINDS`.
        seen: (B, N) bool: filled, and not outside the picture.
        casts: (B, N) bool.
        centre: (B, N, 3).
        into: (B, N, 3, 3), world vectors to the shape's own space.
        size: (B, N, 3).
        taper: (B, N).
        pattern: (B, N, 2) int64.
        tile_m: (B, N, 2).
        colours: (B, N, 9).
        glow: (B, N, 2), relief and emission.
    """

    kinds: tuple[int, ...]
    seen: Tensor
    casts: Tensor
    centre: Tensor
    into: Tensor
    size: Tensor
    taper: Tensor
    pattern: Tensor
    tile_m: Tensor
    colours: Tensor
    glow: Tensor


def _slots(scenes: Sequence[Scene], aspect: float, device: torch.device) -> _Slots:
    by_kind = [[[shape for shape in scene.shapes if shape.kind == kind] for scene in scenes] for kind in _KINDS]
    counts = [max(len(shapes) for shapes in of_kind) for of_kind in by_kind]
    counts[0] = max(counts[0], 1)  # an empty slot, so that an empty scene has something to look up
    kinds = tuple(kind for kind, count in enumerate(counts) for _ in range(count))
    size = (len(scenes), len(kinds))
    seen, casts = np.zeros(size, bool), np.zeros(size, bool)
    centre, half = np.zeros((*size, 3), np.float32), np.ones((*size, 3), np.float32)
    into, colours = np.zeros((*size, 3, 3), np.float32), np.zeros((*size, 9), np.float32)
    taper, pattern = np.zeros(size, np.float32), np.zeros((*size, 2), np.int64)
    tile_m, glow = np.ones((*size, 2), np.float32), np.zeros((*size, 2), np.float32)
    for kind, of_kind in enumerate(by_kind):
        first = sum(counts[:kind])
        for b, shapes in enumerate(of_kind):
            for n, shape in enumerate(shapes, first):
                seen[b, n], casts[b, n] = _in_view(scenes[b], shape, aspect), shape.casts_shadow
                centre[b, n], half[b, n], taper[b, n] = shape.centre, shape.size, shape.taper
                into[b, n] = shape.rotation.T / shape.size[:, None]
                pattern[b, n], tile_m[b, n] = shape.patterns, shape.tile_m
                colours[b, n], glow[b, n] = shape.colours.ravel(), (shape.relief, shape.emission)
    arrays = (seen, casts, centre, into, half, taper, pattern, tile_m, colours, glow)
    return _Slots(kinds, *(torch.from_numpy(array).to(device) for array in arrays))


def _in_view(scene: Scene, shape: Shape, aspect: float) -> bool:
    """Whether a shape's bounding sphere reaches into the camera's pyramid; `aspect` is height over width."""
    if shape.kind == "plane":
        return True
    right, up, back = (shape.centre - scene.position) @ scene.rotation
    radius = float(np.linalg.norm(shape.size))
    beyond = [
        # Signed distance to a side of the pyramid, whose half width at a distance of 1 is `slope`.
        (abs(offset) + slope * back) / np.hypot(1, slope)
        for offset, slope in ((right, 0.5 / scene.focal), (up, 0.5 * aspect / scene.focal))
    ]
    return bool(back < radius and max(beyond) < radius)


def _away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < _TINY, torch.full_like(x, _TINY), x)


def _first_hit(kind: int, o: Tensor, d: Tensor, taper: Tensor, nearest: float) -> Tensor:
    """Where a ray first meets a unit solid, from outside or, if it starts inside, from inside.

    Args:
        kind: Index into `_KINDS`.
        o: (B, 3, P or 1) origins, in the solid's space.
        d: (B, 3, P or 1) directions, likewise, of any length.
        taper: (B, 1) of a frustum.
        nearest: Hits at or before this parameter don't count.

    Returns:
        (B, P) parameters t of o + t d; +inf where the ray misses.
    """
    ox, oy, oz = o.unbind(1)
    dx, dy, dz = d.unbind(1)
    if _KINDS[kind] == "plane":
        t = -oz / _away_from_zero(dz)
        return torch.where(t > nearest, t, torch.inf)
    if _KINDS[kind] == "box":
        inverse = 1 / _away_from_zero(d)
        middle, reach = -o * inverse, inverse.abs()
        enter, leave = (middle - reach).amax(1), (middle + reach).amin(1)
        t = torch.where(enter > nearest, enter, leave)
        return torch.where((leave >= enter) & (t > nearest), t, torch.inf)
    if _KINDS[kind] == "sphere":
        a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1
        discriminant = b * b - a * c
        root = discriminant.clamp(min=0).sqrt()
        enter, leave = (-b - root) / a, (-b + root) / a
        t = torch.where(enter > nearest, enter, leave)
        return torch.where((discriminant > 0) & (t > nearest), t, torch.inf)
    # Frustum: x^2 + y^2 = r(z)^2 with r(z) = r0 + r1 z for |z| <= 1, closed by two discs.
    r0, r1 = 1 - taper / 2, -taper / 2
    ro, rd = r0 + r1 * oz, r1 * dz
    a = _away_from_zero(dx * dx + dy * dy - rd * rd)
    b, c = ox * dx + oy * dy - ro * rd, ox * ox + oy * oy - ro * ro
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    best = torch.full_like(root, torch.inf)
    for t in ((-b - root) / a, (-b + root) / a):
        on_side = (discriminant > 0) & ((oz + t * dz).abs() <= 1) & (t > nearest)
        best = torch.where(on_side & (t < best), t, best)
    flat = _away_from_zero(dz)
    for z, radius in ((-1.0, r0 - r1), (1.0, r0 + r1)):
        t = (z - oz) / flat
        x, y = ox + t * dx, oy + t * dy
        on_cap = (x * x + y * y <= radius * radius) & (t > nearest)
        best = torch.where(on_cap & (t < best), t, best)
    return best


def _cast(slots: _Slots, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest hits of rays (B, 3, P or 1): their parameters (B, P), +inf for none, and the slots they hit, int64."""
    shape = (origin.shape[0], max(origin.shape[2], direction.shape[2]))
    best = torch.full(shape, torch.inf, device=origin.device)
    winner = torch.zeros(shape, dtype=torch.int64, device=origin.device)
    for n, kind in enumerate(slots.kinds):
        if not bool(slots.seen[:, n].any()):
            continue
        into = slots.into[:, n]
        o = into @ (origin - slots.centre[:, n, :, None])
        t = _first_hit(kind, o, into @ direction, slots.taper[:, n, None], nearest=1e-4)
        closer = (t < best) & slots.seen[:, n, None]
        best = torch.where(closer, t, best)
        winner = torch.where(closer, n, winner)
    return best, winner


def _lit(slots: _Slots, origin: Tensor, towards: Tensor, reach: Tensor) -> Tensor:
    """Whether nothing stands between points and the light: (B, P) bool; `reach` (B, 1) is the light's parameter."""
    shape = (origin.shape[0], max(origin.shape[2], towards.shape[2]))
    lit = torch.ones(shape, dtype=torch.bool, device=origin.device)
    for n, kind in enumerate(slots.kinds):
        if not bool(slots.casts[:, n].any()):
            continue
        into = slots.into[:, n]
        o = into @ (origin - slots.centre[:, n, :, None])
        t = _first_hit(kind, o, into @ towards, slots.taper[:, n, None], nearest=1e-4)
        lit &= (t >= reach) | ~slots.casts[:, n, None]
    return lit


def _own_normals(kinds: Tensor, q: Tensor, taper: Tensor) -> Tensor:
    """Outward normals, in the solids' own spaces, not unit: kinds (B, P) and points q (B, P, 3) -> (B, P, 3)."""
    x, y, z = q.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    plane = torch.stack([zero, zero, one], -1)
    box = torch.nn.functional.one_hot(q.abs().argmax(-1), 3) * q.sign()
    r1 = -taper / 2
    radius = 1 - taper / 2 + r1 * z
    side = torch.stack([x, y, -r1 * radius], -1)
    on_cap = (1 - z.abs()).abs() < ((x * x + y * y).sqrt() - radius).abs()
    frustum = torch.where(on_cap[..., None], torch.stack([zero, zero, z.sign()], -1), side)
    result = plane
    for kind, normal in ((1, box), (2, q), (3, frustum)):
        result = torch.where((kinds == kind)[..., None], normal, result)
    return result


def _albedo(
    source: textures.Atlas, slots: _Slots, row: Tensor, hit: Tensor, metres: Tensor, facing: Tensor, footprint: Tensor
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
    return torch.from_numpy(np.stack([np.asarray(getattr(scene, name)) for scene in scenes])).to(device)


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
    slots = _slots(scenes, height / width, device)
    focal_px = _stacked(scenes, "focal", device).float() * width
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
    linear = torch.stack(colours).mean(0).view(len(scenes), 3, height, width)
    return Views(linear.clamp(0, 1) ** (1 / _GAMMA), depth, normals, torch.isfinite(depth))


def _trace(scenes: Sequence[Scene], slots: _Slots, rays: Tensor, focal_px: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    own_normal = _own_normals(kinds, own, taper)
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
    fog = torch.exp(-_stacked(scenes, "fog_per_m", device).float()[:, None] * t * length)[..., None]
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
    amount = _stacked(scenes, "cloudiness", direction.device).float()[:, None] * (value * (height * 6).clamp(max=1))
    bright = sky.amax(dim=(1, 2))[:, None, None]
    return torch.lerp(colour, bright.expand_as(colour), amount[..., None])
