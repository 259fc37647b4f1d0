"""Materials and the things that scenes are furnished with: people, cars, trees, poles, buildings, furniture.

Every function takes the scene's random generator and answers with shapes that stand at `at` = (x, y) on the ground, or
at a height of `base`, turned by `yaw` radians about the vertical. World frame: metres, z up.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.training import textures
from depthmill.pipeline.training.shapes import Floats, Shape, ShapeKind

Rng = np.random.Generator
Point = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True)
class Role:
    """What a surface is made of: patterns, metres a repetition, and ranges of hue, saturation and value (linear)."""

    patterns: tuple[str, ...]
    tile_m: Range
    hue: Range = (0.0, 1.0)
    saturation: Range = (0.0, 0.5)
    value: Range = (0.05, 0.7)
    emission: Range = (0.0, 0.0)


ROLES: dict[str, Role] = {
    "asphalt": Role(("grain", "clouds", "blotches", "gravel"), (2, 12), saturation=(0, 0.1), value=(0.05, 0.4)),
    "paving": Role(
        ("tiles", "bricks", "cells", "grain", "clouds", "gravel"), (1, 5), (0, 0.15), (0, 0.25), (0.15, 0.6)
    ),
    "grass": Role(
        ("grass", "grain", "clouds", "blotches", "lawn", "lawn"), (1, 8), (0.16, 0.32), (0.4, 0.9), (0.04, 0.3)
    ),
    "earth": Role(("grain", "clouds", "blotches", "cells", "gravel"), (1, 8), (0.04, 0.14), (0.2, 0.7), (0.1, 0.5)),
    "paint": Role(("grain", "clouds"), (0.5, 3), (0.1, 0.18), (0, 0.8), (0.5, 0.9)),
    "brick": Role(("bricks", "bricks", "tiles"), (1, 4), (0.0, 0.1), (0.2, 0.75), (0.1, 0.6)),
    "facade": Role(("windows",), (5, 25), (0.0, 1.0), (0, 0.4), (0.2, 0.8)),
    "glass": Role(("windows", "tiles", "clouds"), (3, 15), (0.4, 0.65), (0, 0.6), (0.01, 0.25)),
    "night": Role(("windows", "stripes"), (6, 40), (0.05, 0.6), (0, 0.7), (0.1, 0.6), (0.3, 1.2)),
    "plaster": Role(("clouds", "grain", "clouds", "tiles"), (1, 6), (0.0, 1.0), (0, 0.3), (0.3, 0.9)),
    "wallpaper": Role(("stripes", "dots", "clouds", "clutter", "planks", "text"), (0.4, 3)),
    "floor": Role(("planks", "wood", "tiles", "checker", "grain", "clouds"), (0.7, 4), (0, 0.2), (0, 0.6), (0.08, 0.7)),
    "wood": Role(("wood", "planks"), (0.4, 2), (0.03, 0.12), (0.3, 0.8), (0.06, 0.5)),
    "cloth": Role(("clouds", "stripes", "blotches", "grain", "dots"), (0.4, 2), (0, 1), (0, 0.8), (0.01, 0.4)),
    "dark": Role(("clouds", "grain"), (0.4, 2), (0.5, 0.75), (0, 0.5), (0.004, 0.08)),
    "skin": Role(("clouds",), (0.5, 1), (0.02, 0.09), (0.3, 0.7), (0.05, 0.6)),
    "metal": Role(("clouds", "grain"), (0.5, 3), (0, 1), (0, 0.15), (0.05, 0.7)),
    "enamel": Role(("clouds",), (2, 6), (0, 1), (0, 0.95), (0.02, 0.8)),
    "sign": Role(("text", "stripes", "clutter"), (0.5, 2), (0, 1), (0, 0.9), (0.2, 0.9)),
    "leaves": Role(("grain", "grass", "blotches", "clouds", "lawn"), (0.5, 3), (0.15, 0.4), (0.3, 0.9), (0.02, 0.3)),
    "anything": Role(textures.PATTERNS, (0.3, 6), (0, 1), (0, 0.9), (0.02, 0.9)),
}


def _colour(rng: Rng, role: Role, near: Floats | None = None) -> Floats:
    colour = np.array(
        colorsys.hsv_to_rgb(rng.uniform(*role.hue), rng.uniform(*role.saturation), rng.uniform(*role.value)), np.float32
    )
    return colour if near is None else 0.35 * colour + 0.65 * near


def shape(
    rng: Rng,
    kind: ShapeKind,
    role: str,
    centre: tuple[float, float, float],
    size: tuple[float, float, float],
    *,
    yaw: float = 0.0,
    tilt: npt.NDArray[np.floating] | None = None,
    taper: float = 0.0,
    casts_shadow: bool = True,
) -> Shape:
    """One solid of a role's material; now and then of any material, so that no shape is told by its colours alone."""
    material = ROLES["anything" if rng.random() < 0.08 else role]
    pattern = material.patterns[rng.integers(len(material.patterns))]
    base = _colour(rng, material)
    low = _colour(rng, material, base) * rng.uniform(0.3, 1)
    high = np.minimum(_colour(rng, material, base) * rng.uniform(1, 1.6), 1)
    if rng.random() < 0.15:
        high = _colour(rng, ROLES["anything"])
    second = ("clouds", "grain", "blotches")[rng.integers(3)]
    pick = textures.layers()
    first_tile = float(np.exp(rng.uniform(*np.log(material.tile_m))))
    return Shape(
        kind=kind,
        centre=np.array(centre, np.float32),
        rotation=(turn(yaw) if tilt is None else tilt).astype(np.float32),
        size=np.array(size, np.float32),
        taper=taper,
        patterns=(int(rng.choice(pick[pattern])), int(rng.choice(pick[second]))),
        tile_m=(first_tile, first_tile * float(np.exp(rng.uniform(-1.5, 2)))),
        colours=np.stack([low, base, high]).astype(np.float32),
        relief=float(rng.uniform(0, 0.7)),
        emission=float(rng.uniform(*material.emission)),
        casts_shadow=casts_shadow,
    )


def turn(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> npt.NDArray[np.float64]:
    """Rotation about z by `yaw`, after x by `pitch`, after y by `roll`, radians: (3, 3)."""
    cy, sy, cp, sp, cr, sr = *_cs(yaw), *_cs(pitch), *_cs(roll)
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_y = np.array([[cr, 0, sr], [0, 1, 0], [-sr, 0, cr]])
    rotation: npt.NDArray[np.float64] = about_z @ about_x @ about_y
    return rotation


def _cs(angle: float) -> tuple[float, float]:
    return float(np.cos(angle)), float(np.sin(angle))


def _place(at: Point, yaw: float, along: float, across: float) -> Point:
    c, s = _cs(yaw)
    return at[0] + c * along - s * across, at[1] + s * along + c * across


def block(rng: Rng, role: str, at: Point, base: float, half: tuple[float, float, float], yaw: float = 0.0) -> Shape:
    """A box of half extents `half` that stands on `base`."""
    return shape(rng, "box", role, (*at, base + half[2]), half, yaw=yaw)


def column(rng: Rng, role: str, at: Point, base: float, radius: float, height: float, taper: float = 0.0) -> Shape:
    """An upright cylinder, or cone."""
    return shape(rng, "frustum", role, (*at, base + height / 2), (radius, radius, height / 2), taper=taper)


def person(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """Legs in mid-stride, body, arms or not, head."""
    height = rng.uniform(1.5, 1.95)
    stride, broad = rng.uniform(0.0, 0.3), height * rng.uniform(0.11, 0.16)
    top, legs = ("dark" if rng.random() < 0.5 else "cloth"), ("dark" if rng.random() < 0.6 else "cloth")
    hip, neck = height * 0.48, height * 0.84
    parts = []
    for side in (-1, 1):
        foot = _place(at, yaw, side * stride, side * broad * 0.45)
        middle = _place(at, yaw, side * stride / 2, side * broad * 0.45)
        lean = turn(yaw, 0, side * float(np.arctan2(-stride / 2, hip / 2)))
        parts.append(shape(rng, "frustum", legs, (*middle, hip / 2), (0.075, 0.075, hip / 2), tilt=lean, taper=-0.3))
        if stride > 0.1:
            parts.append(shape(rng, "sphere", "dark", (*foot, 0.05), (0.14, 0.06, 0.06), yaw=yaw))
    middle_z, half_z = (hip + neck) / 2, (neck - hip) / 2 * 1.08
    flat = broad * rng.uniform(0.55, 0.75)
    kind: ShapeKind = "sphere" if rng.random() < 0.3 else "frustum"
    parts.append(shape(rng, kind, top, (*at, middle_z), (flat, broad, half_z), yaw=yaw, taper=rng.uniform(-0.1, 0.3)))
    for side in (-1, 1) if rng.random() < 0.6 else ():
        arm = _place(at, yaw, rng.uniform(-0.1, 0.1), side * broad * 1.25)
        parts.append(shape(rng, "frustum", top, (*arm, middle_z - 0.03), (0.05, 0.05, half_z)))
    head = 0.5 * (height - neck)
    role = "dark" if rng.random() < 0.5 else "skin"
    parts.append(shape(rng, "sphere", role, (*at, neck + head), (head * 0.8, head * 0.7, head * 1.1)))
    return parts


def car(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """Body, cabin and four wheels; or a van, whose cabin is as long as its body."""
    length, width = rng.uniform(1.8, 2.6), rng.uniform(0.8, 1.0)
    van = rng.random() < 0.3
    low, high = rng.uniform(0.3, 0.45), rng.uniform(0.5, 0.9) if van else rng.uniform(0.2, 0.35)
    cabin = _place(at, yaw, -length * 0.12, 0)
    share = 0.85 if van else rng.uniform(0.45, 0.6)
    parts = [
        block(rng, "enamel", at, 0.25, (length, width, low), yaw),
        block(rng, "enamel" if van else "glass", cabin, 0.25 + 2 * low, (length * share, width * 0.88, high), yaw),
    ]
    for end in (-1, 1):
        # One axle each: a cylinder across the car, its ends being the wheels.
        middle = _place(at, yaw, end * length * 0.62, 0)
        axle = turn(yaw) @ turn(0, np.pi / 2)
        parts.append(shape(rng, "frustum", "dark", (*middle, 0.32), (0.32, 0.32, width * 1.02), tilt=axle))
    return parts


def tree(rng: Rng, at: Point) -> list[Shape]:
    """A trunk under one to three crowns; or a conifer; or, in winter, bare branches."""
    height = rng.uniform(2.5, 9)
    parts = [column(rng, "wood", at, 0, rng.uniform(0.06, 0.25), height * 0.6, taper=0.5)]
    style = rng.random()
    if style < 0.25:
        return [*parts, column(rng, "leaves", at, height * 0.2, height * 0.22, height * 0.8, taper=1.0)]
    if style < 0.4:
        for _ in range(4):
            lean = turn(rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0))
            half = height * rng.uniform(0.12, 0.25)
            foot = np.array([*at, height * rng.uniform(0.3, 0.6)])
            middle = foot + lean @ np.array([0, 0, half])
            where = (float(middle[0]), float(middle[1]), float(middle[2]))
            parts.append(shape(rng, "frustum", "wood", where, (0.05, 0.05, half), tilt=lean, taper=0.8))
        return parts
    for _ in range(int(rng.integers(1, 4))):
        wide = height * rng.uniform(0.15, 0.32)
        x, y = _place(at, rng.uniform(0, 2 * np.pi), wide * 0.5, 0)
        crown = (wide, wide * rng.uniform(0.8, 1.2), wide * rng.uniform(0.7, 1.3))
        parts.append(shape(rng, "sphere", "leaves", (x, y, height * rng.uniform(0.6, 0.85)), crown))
    return parts


def pole(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """A lamp post, a sign post or a mast."""
    height, radius = rng.uniform(2.2, 7), rng.uniform(0.03, 0.1)
    parts = [column(rng, "metal", at, 0, radius, height, taper=rng.uniform(0, 0.4))]
    style = rng.random()
    if style < 0.4:
        arm = _place(at, yaw, 0.5, 0)
        parts.append(block(rng, "metal", arm, height, (0.6, 0.05, 0.04), yaw))
        parts.append(shape(rng, "sphere", "metal", (*_place(at, yaw, 1, 0), height), (0.3, 0.15, 0.1), yaw=yaw))
    elif style < 0.8:
        half = rng.uniform(0.2, 0.6)
        level = height * rng.uniform(0.5, 0.9)
        kind: ShapeKind = "box" if rng.random() < 0.7 else "sphere"
        parts.append(shape(rng, kind, "sign", (*at, level), (half, 0.04 + radius, half * rng.uniform(0.6, 1)), yaw=yaw))
    return parts


def building(rng: Rng, at: Point, half: tuple[float, float, float], yaw: float) -> list[Shape]:
    """A block, perhaps with a roof, a band of windows, a porch or a door."""
    walls = ("facade", "facade", "brick", "brick", "plaster", "glass")[rng.integers(6)]
    parts = [block(rng, walls, at, 0, half, yaw)]
    for side in (-1, 1):
        if walls != "facade" and rng.random() < 0.7:
            level = half[2] * rng.uniform(0.4, 1.6)
            where = _place(at, yaw, rng.uniform(-0.3, 0.3) * half[0], side * half[1])
            band = (half[0] * rng.uniform(0.2, 0.65), 0.06, rng.uniform(0.4, 1.0))
            parts.append(shape(rng, "box", "glass", (*where, level), band, yaw=yaw))
    if rng.random() < 0.4:
        where = _place(at, yaw, rng.uniform(-0.7, 0.7) * half[0], half[1] * (1 if rng.random() < 0.5 else -1))
        parts.append(block(rng, "enamel", where, 0, (rng.uniform(0.5, 1.5), 0.1, rng.uniform(1, 1.5)), yaw))
    if rng.random() < 0.4:
        roof = (half[0] * 1.04, half[1] * 1.04, rng.uniform(0.1, 0.4))
        parts.append(block(rng, "metal", at, 2 * half[2], roof, yaw))
    return parts


def clutter(rng: Rng, at: Point, base: float = 0.0, scale: float = 1.0) -> list[Shape]:
    """One small thing: a cone, a bollard, a crate, a ball, a stone, a bag, something flat on the floor."""
    size, yaw = rng.uniform(0.12, 0.55) * scale, rng.uniform(0, 2 * np.pi)
    style = int(rng.integers(6))
    if style == 0:
        return [column(rng, "sign", at, base, size * 0.5, size * 1.8, taper=rng.uniform(0.6, 1))]
    if style == 1:
        return [column(rng, "metal", at, base, size * 0.4, size * rng.uniform(1, 4), taper=rng.uniform(0, 0.3))]
    if style == 2:
        return [block(rng, "wood", at, base, (size, size * rng.uniform(0.4, 1.2), size * rng.uniform(0.4, 1.2)), yaw)]
    if style == 3:
        return [shape(rng, "sphere", "anything", (*at, base + size), (size, size, size))]
    if style == 4:
        half = (size, size * rng.uniform(0.5, 1), size * rng.uniform(0.4, 0.9))
        return [shape(rng, "sphere", "earth", (*at, base + half[2] * 0.6), half, yaw=yaw)]
    return [block(rng, "enamel", at, base, (size * 1.5, size, 0.03), yaw)]


def table(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """A table or a bench, with things on it."""
    length, width, height = rng.uniform(0.4, 1.1), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.85)
    parts = [block(rng, "wood", at, height, (length, width, 0.03), yaw)]
    for along in (-0.85, 0.85):
        for across in (-0.85, 0.85):
            foot = _place(at, yaw, along * length, across * width)
            parts.append(column(rng, "wood", foot, 0, 0.035, height))
    for _ in range(int(rng.integers(0, 4))):
        where = _place(at, yaw, rng.uniform(-0.7, 0.7) * length, rng.uniform(-0.7, 0.7) * width)
        parts += clutter(rng, where, height + 0.06, scale=0.4)
    return parts


def seat(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """A chair or a sofa: seat, back and, if it is wide, arms."""
    wide, deep, level = rng.uniform(0.22, 1.0), rng.uniform(0.22, 0.45), rng.uniform(0.35, 0.5)
    bottom, thick = (0.0, level) if wide > 0.4 else (level - 0.08, 0.08)
    parts = [
        block(rng, "cloth", at, bottom, (deep, wide, thick / 2), yaw),
        block(rng, "cloth", _place(at, yaw, -deep, 0), 0, (0.06, wide, rng.uniform(0.35, 0.5)), yaw),
    ]
    for side in (-1, 1) if wide > 0.4 else ():
        parts.append(block(rng, "cloth", _place(at, yaw, 0, side * wide), 0, (deep, 0.08, level * 0.65), yaw))
    for along, across in ((1, 1), (1, -1), (-1, 1), (-1, -1)) if wide <= 0.4 else ():
        parts.append(column(rng, "metal", _place(at, yaw, along * deep * 0.9, across * wide * 0.9), 0, 0.02, level))
    return parts


def cupboard(rng: Rng, at: Point, yaw: float) -> list[Shape]:
    """A box with doors, or open shelves full of things."""
    half = (rng.uniform(0.15, 0.35), rng.uniform(0.3, 0.9), rng.uniform(0.35, 1.1))
    parts = [block(rng, "wood" if rng.random() < 0.6 else "plaster", at, 0, half, yaw)]
    if rng.random() < 0.5:
        for level in np.arange(0.25, 2 * half[2] - 0.3, 0.45):
            where = _place(at, yaw, half[0] * 0.7, 0)
            row = (half[0] * 0.4, half[1] * rng.uniform(0.5, 0.9), 0.15)
            parts.append(block(rng, "wallpaper", where, float(level), row, yaw))
    return parts
