"""Shapes: what they are, how a batch of scenes holds them, and where rays meet them.

A shape is the image under an affine map of a unit solid: the plane z = 0, the cube [-1, 1]^3, the sphere, or a frustum
around z with |z| <= 1. Rays are taken into the shape's own space, where intersection is school geometry, and because
the map is affine the ray's parameter keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ShapeKind = Literal["plane", "box", "sphere", "frustum"]
KINDS: tuple[ShapeKind, ...] = ("plane", "box", "sphere", "frustum")
_TINY = 1e-6
_NEAREST = 1e-4  # hits at or before this parameter of a ray don't count

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
class Slots:
    """Shapes of B scenes in N slots; a slot holds one kind in every scene, and is empty in some.

    Attributes:
        kinds: N indices into `KINDS`.
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


def pack(scenes: Sequence[Scene], aspect: float, device: torch.device) -> Slots:
    """Put the shapes of scenes into slots; `aspect` is the picture's height over its width."""
    by_kind = [[[shape for shape in scene.shapes if shape.kind == kind] for scene in scenes] for kind in KINDS]
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
    return Slots(kinds, *(torch.from_numpy(array).to(device) for array in arrays))


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


def first_hit(kind: int, o: Tensor, d: Tensor, taper: Tensor) -> Tensor:
    """Where a ray first meets a unit solid, from outside or, if it starts inside, from inside.

    Args:
        kind: Index into `KINDS`.
        o: (B, 3, P or 1) origins, in the solid's space.
        d: (B, 3, P or 1) directions, likewise, of any length.
        taper: (B, 1) of a frustum.

    Returns:
        (B, P) parameters t of o + t d; +inf where the ray misses.
    """
    ox, oy, oz = o.unbind(1)
    dx, dy, dz = d.unbind(1)
    if KINDS[kind] == "plane":
        t = -oz / _away_from_zero(dz)
        return torch.where(t > _NEAREST, t, torch.inf)
    if KINDS[kind] == "box":
        inverse = 1 / _away_from_zero(d)
        middle, reach = -o * inverse, inverse.abs()
        enter, leave = (middle - reach).amax(1), (middle + reach).amin(1)
        t = torch.where(enter > _NEAREST, enter, leave)
        return torch.where((leave >= enter) & (t > _NEAREST), t, torch.inf)
    if KINDS[kind] == "sphere":
        a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1
        discriminant = b * b - a * c
        root = discriminant.clamp(min=0).sqrt()
        enter, leave = (-b - root) / a, (-b + root) / a
        t = torch.where(enter > _NEAREST, enter, leave)
        return torch.where((discriminant > 0) & (t > _NEAREST), t, torch.inf)
    # Frustum: x^2 + y^2 = r(z)^2 with r(z) = r0 + r1 z for |z| <= 1, closed by two discs.
    r0, r1 = 1 - taper / 2, -taper / 2
    ro, rd = r0 + r1 * oz, r1 * dz
    a = _away_from_zero(dx * dx + dy * dy - rd * rd)
    b, c = ox * dx + oy * dy - ro * rd, ox * ox + oy * oy - ro * ro
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0).sqrt()
    best = torch.full_like(root, torch.inf)
    for t in ((-b - root) / a, (-b + root) / a):
        on_side = (discriminant > 0) & ((oz + t * dz).abs() <= 1) & (t > _NEAREST)
        best = torch.where(on_side & (t < best), t, best)
    flat = _away_from_zero(dz)
    for z, radius in ((-1.0, r0 - r1), (1.0, r0 + r1)):
        t = (z - oz) / flat
        x, y = ox + t * dx, oy + t * dy
        on_cap = (x * x + y * y <= radius * radius) & (t > _NEAREST)
        best = torch.where(on_cap & (t < best), t, best)
    return best


def own_normals(kinds: Tensor, q: Tensor, taper: Tensor) -> Tensor:
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
