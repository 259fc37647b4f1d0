"""The places that scenes show, each a function of the scene's random generator: furnished, lit, with a camera in it.

World frame: metres, z up; cameras look along +x, more or less.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from depthmill.pipeline.training import props, textures
from depthmill.pipeline.training.props import Point, Rng
from depthmill.pipeline.training.shapes import Floats, Scene, Shape, ShapeKind


def _camera(
    rng: Rng, shapes: list[Shape], position: tuple[float, float, float], yaw: float, pitch: float, fov_deg: float
) -> tuple[tuple[Shape, ...], Floats, Floats, float]:
    """Put a camera up, and clear away what it would stand in.

    Yaw 0 looks along +x, pitch is positive upwards, radians; the field of view is the picture's width's.
    """
    where = np.array(position, np.float32)
    roll = rng.normal(0, 0.03)
    # A camera looks along its -z; turned by this it looks along +x with z up.
    level = np.array([[0.0, 0.0, -1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    rotation = props.turn(yaw) @ level @ props.turn(0, pitch) @ props.turn(roll)
    clear = [shape for shape in shapes if not shape.casts_shadow or not _contains(shape, where)]
    return tuple(clear), where, rotation.astype(np.float32), float(0.5 / np.tan(np.radians(fov_deg) / 2))


def _contains(shape: Shape, point: Floats) -> bool:
    """Whether a point is in a shape, or within 0.4 m of its box."""
    own = shape.rotation.T @ (point - shape.centre)
    return shape.kind != "plane" and bool(np.all(np.abs(own) < shape.size + 0.4))


def _outdoors(
    rng: Rng, camera: tuple[tuple[Shape, ...], Floats, Floats, float], *, night: bool = False, haze: float = 1.0
) -> Scene:
    """Light a scene by sun or overcast sky, or by the city at night."""
    shapes, position, rotation, focal = camera
    overcast = rng.random() ** 1.5
    height = rng.uniform(0.25, 1.2)
    azimuth = rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(azimuth), np.sin(azimuth), height])
    warm = np.array([1, rng.uniform(0.85, 1), rng.uniform(0.65, 1)])
    blue = np.array([rng.uniform(0.25, 0.8), rng.uniform(0.5, 0.85), 1.0])
    grey = np.full(3, rng.uniform(0.5, 1.0))
    zenith = (1 - overcast) * blue * rng.uniform(0.3, 0.9) + overcast * grey
    horizon = 0.5 * zenith + 0.5 * np.full(3, rng.uniform(0.6, 1.0))
    strength = 0.03 if night else rng.uniform(0.9, 2.0)
    if night:
        zenith, horizon = blue * rng.uniform(0.005, 0.05), np.array([rng.uniform(0.02, 0.3), 0.05, 0.12])
    return Scene(
        shapes=shapes,
        position=position,
        rotation=rotation,
        focal=focal,
        light=np.array([*(sun / np.linalg.norm(sun)), 0], np.float32),
        light_colour=(warm * strength * (1 - 0.85 * overcast) * 1.4).astype(np.float32),
        ambient=(0.5 * strength * (0.4 + overcast) * (0.5 * grey + 0.5 * zenith / zenith.max())).astype(np.float32),
        sky=np.stack([horizon, zenith]).astype(np.float32),
        clouds=int(rng.choice(textures.layers()["clouds"])),
        cloudiness=float(rng.uniform(0, 1) * (rng.random() < 0.7)),
        fog_per_m=float(haze * rng.choice([0.0, 0.002, 0.01]) * rng.uniform(0.5, 1.5)),
    )


def _ground(rng: Rng, role: str) -> Shape:
    return props.shape(rng, "plane", role, (0, 0, 0), (1, 1, 1), yaw=rng.uniform(0, 6.3))


def _any_ground(rng: Rng) -> str:
    return ("asphalt", "paving", "grass", "earth", "grass")[rng.integers(5)]


def _slab(rng: Rng, role: str, at: Point, half: tuple[float, float], yaw: float) -> Shape:
    """A lawn, a road, a pavement: a patch a few centimetres higher than the ground."""
    return props.block(rng, role, at, 0, (*half, rng.uniform(0.004, 0.08)), yaw)


def _near(rng: Rng, centre: Point, radius: float) -> Point:
    angle, distance = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.random())
    return float(centre[0] + distance * np.cos(angle)), float(centre[1] + distance * np.sin(angle))


def _people(rng: Rng, where: Callable[[], Point], count: int) -> list[Shape]:
    heading = rng.uniform(0, 2 * np.pi)
    result = []
    for _ in range(count):
        yaw = heading + (np.pi if rng.random() < 0.4 else 0) + rng.normal(0, 0.5)
        result += props.person(rng, where(), yaw)
    return result


def _room(rng: Rng) -> Scene:
    """A furnished room, or a corridor where it is long and narrow, with a lamp."""
    corridor = rng.random() < 0.3
    long = rng.uniform(8, 25) if corridor else rng.uniform(3, 9)
    wide, high = rng.uniform(1.6, 3.5) if corridor else rng.uniform(3, 7), rng.uniform(2.3, 3.6)
    walls = "plaster" if rng.random() < 0.6 else "wallpaper"
    shapes = [
        props.shape(rng, "box", walls, (0, 0, high / 2), (long / 2, wide / 2, high / 2), casts_shadow=False),
        props.block(rng, "floor", (0, 0), 0, (long / 2, wide / 2, 0.01)),
        props.block(rng, "plaster", (0, 0), high - 0.02, (long / 2, wide / 2, 0.01)),
    ]

    def against_wall(depth: float) -> tuple[Point, float]:
        """A place at a wall and the direction into the room."""
        side = int(rng.integers(4))
        yaw = side * np.pi / 2
        reach, span = (long / 2, wide / 2) if side % 2 == 0 else (wide / 2, long / 2)
        along = rng.uniform(-0.85, 0.85) * span
        c, s = np.cos(yaw), np.sin(yaw)
        inward = reach - depth
        return (float(-c * inward - s * along), float(-s * inward + c * along)), yaw

    for _ in range(int(rng.integers(2, 7))):  # doors, windows, pictures
        at, yaw = against_wall(0.0)
        level = rng.uniform(0, 1.2)
        half = (rng.uniform(0.02, 0.08), rng.uniform(0.25, 0.9), rng.uniform(0.3, 1.0))
        role = ("wood", "sign", "glass", "wallpaper", "anything")[rng.integers(5)]
        shapes.append(props.block(rng, role, at, level, half, yaw))
    for _ in range(int(rng.integers(1, 5))):
        at, yaw = against_wall(0.35)
        shapes += (props.cupboard, props.seat)[rng.integers(2)](rng, at, yaw)
    middle = (0.0, 0.0)
    for _ in range(int(rng.integers(0, 2) if corridor else rng.integers(1, 4))):
        at = _near(rng, middle, wide * 0.4)
        shapes += (props.table, props.seat)[rng.integers(2)](rng, at, rng.uniform(0, 2 * np.pi))
    for _ in range(int(rng.integers(1, 6))):
        shapes += props.clutter(rng, (rng.uniform(-0.45, 0.45) * long, rng.uniform(-0.45, 0.45) * wide), scale=1.2)
    if rng.random() < 0.35:
        at = (rng.uniform(-0.4, 0.4) * long, rng.uniform(-0.4, 0.4) * wide)
        shapes += props.person(rng, at, rng.uniform(0, 6.3))

    # From one end, looking at the other, so that there is something to see.
    back = rng.uniform(0.25, 0.47)
    x, y = -back * long, rng.uniform(-0.35, 0.35) * wide
    camera = _camera(
        rng,
        shapes,
        (x, y, rng.uniform(0.7, min(2.2, high - 0.3))),
        float(np.arctan2(-y, -x) + rng.normal(0, 0.45)),
        rng.normal(-0.12, 0.18),
        rng.uniform(50, 90),
    )
    visible, position, rotation, focal = camera
    tint = np.array([1, rng.uniform(0.75, 1), rng.uniform(0.5, 1)])
    strength = rng.uniform(0.5, 1.6)
    return Scene(
        shapes=visible,
        position=position,
        rotation=rotation,
        focal=focal,
        light=np.array([rng.uniform(-0.3, 0.3) * long, rng.uniform(-0.3, 0.3) * wide, high * 0.93, 1], np.float32),
        light_colour=(tint * strength * 0.8).astype(np.float32),
        ambient=(tint * strength * rng.uniform(0.15, 0.5)).astype(np.float32),
        sky=np.full((2, 3), 0.5, np.float32),
        clouds=0,
        cloudiness=0.0,
        fog_per_m=float(rng.choice([0, 0, 0.01])),
    )


def _street(rng: Rng) -> Scene:
    """A street along x at eye level: road, pavements, facades, cars, poles, trees, people."""
    road, walk = rng.uniform(2.5, 6), rng.uniform(1.5, 4)
    shapes = [_ground(rng, "asphalt")]
    for side in (-1, 1):
        shapes.append(props.block(rng, "paving", (40, side * (road + walk)), 0, (80, walk, rng.uniform(0.03, 0.1))))
        x = -15.0
        while x < 90 and rng.random() < 0.95:
            half = (rng.uniform(4, 12), rng.uniform(3, 6), rng.uniform(2, 9))
            at = (x + half[0], side * (road + 2 * walk + half[1] + rng.uniform(0, 1.5)))
            shapes += props.building(rng, at, half, 0.0)
            x += 2 * half[0] + (rng.uniform(0, 8) if rng.random() < 0.3 else 0)
        for _ in range(int(rng.integers(0, 5))):
            parked = (rng.uniform(3, 40), side * (road - 1.1))
            shapes += props.car(rng, parked, rng.normal(0, 0.05) + (0 if side < 0 else np.pi))
        for _ in range(int(rng.integers(0, 4))):
            at = (rng.uniform(4, 45), side * (road + rng.uniform(0.3, 0.8)))
            shapes += props.tree(rng, at) if rng.random() < 0.5 else props.pole(rng, at, rng.uniform(0, 6.3))
        for _ in range(int(rng.integers(0, 3))):
            shapes += props.clutter(rng, (rng.uniform(2, 20), side * (road + rng.uniform(0, 2 * walk))), 0.08)
    if rng.random() < 0.6:
        shapes.append(props.block(rng, "paint", (40, 0), 0, (80, 0.08, 0.004)))
    if rng.random() < 0.5:
        shapes += props.car(rng, (rng.uniform(8, 40), rng.uniform(-0.5, 0.5) * road), rng.normal(0, 0.1))
    spread = road + 1.6 * walk
    shapes += _people(rng, lambda: (rng.uniform(3, 25), rng.uniform(-spread, spread)), int(rng.integers(0, 6)))
    camera = _camera(
        rng,
        shapes,
        (0.0, rng.uniform(-1, 1) * (road + walk), rng.uniform(1.1, 2.6)),
        rng.normal(0, 0.35),
        rng.normal(-0.03, 0.12),
        rng.uniform(40, 90),
    )
    return _outdoors(rng, camera, night=rng.random() < 0.07)


def _yard(rng: Rng) -> Scene:
    """Lawns, paths, people and cars before buildings, from high up: what a surveillance camera sees."""
    height, fov_deg = rng.uniform(2.8, 10), rng.uniform(35, 75)
    half_view = 0.75 * np.tan(np.radians(fov_deg) / 2)  # of a 4:3 picture's height
    pitch = -float(np.arctan(half_view) + rng.normal(0.12, 0.12))
    near = height / np.tan(min(-pitch + np.arctan(half_view), 1.4))
    far = min(height / np.tan(max(-pitch - np.arctan(half_view), 0.05)), 12 * height)

    def seen(nearest: float = 0.0, farthest: float = 1.0) -> Point:
        """A place on the ground within the picture; 0 is its lower and 1 its upper border."""
        x = float(near * (far / near) ** rng.uniform(nearest, farthest))
        return x, float(x * rng.uniform(-0.95, 0.95) * half_view / 0.75)

    shapes = [_ground(rng, _any_ground(rng))]
    wide = (far - near) * half_view
    for _ in range(int(rng.integers(2, 7))):
        patch = (rng.uniform(0.15, 0.8) * (far - near), rng.uniform(0.1, 0.7) * wide)
        shapes.append(_slab(rng, _any_ground(rng), seen(), patch, rng.uniform(0, np.pi)))
    for _ in range(int(rng.integers(0, 5))):
        line = (rng.uniform(1, 8), rng.uniform(0.04, 0.1), 0.03)
        shapes.append(props.block(rng, "paint", seen(), 0.03, line, rng.uniform(0, np.pi)))
    skew = rng.normal(0, 0.35)
    for _ in range(int(rng.integers(0, 4))):
        half = (rng.uniform(3, 14), rng.uniform(3, 8), rng.uniform(1.5, 6))
        x, y = seen(0.5, 1.0)
        shapes += props.building(rng, (x + half[1] + 1, y), half, skew + np.pi / 2 * rng.integers(1, 3))
    if rng.random() < 0.7:
        shapes += _backdrop(rng, far * rng.uniform(0.6, 1.1))
    for _ in range(int(rng.integers(0, 4))):
        shapes += props.car(rng, seen(0.3), skew + np.pi / 2 * rng.integers(4))
    for _ in range(int(rng.integers(0, 4))):
        shapes += props.pole(rng, seen(), rng.uniform(0, 6.3))
    for _ in range(int(rng.integers(0, 3))):
        shapes += props.tree(rng, seen(0.4))
    for _ in range(int(rng.integers(0, 7))):
        shapes += props.clutter(rng, seen(), 0.02)
    crowd = seen(0.2, 0.7)
    shapes += _people(rng, lambda: _near(rng, crowd, 0.4 * wide), int(rng.integers(1, 7)))
    shapes += _people(rng, seen, int(rng.integers(0, 3)))
    camera = _camera(rng, shapes, (0.0, 0.0, height), rng.normal(0, 0.05), pitch, fov_deg)
    return _outdoors(rng, camera)


def _backdrop(rng: Rng, distance: float) -> list[Shape]:
    """What closes the view across x at a distance: a wall, a hedge, a row of trees or of houses."""
    style, turn = int(rng.integers(4)), rng.normal(0, 0.25)
    if style <= 1:
        half = (0.5, 3 * distance, rng.uniform(0.5, 3) if style else rng.uniform(0.6, 1.6))
        return [props.block(rng, ("leaves", "brick", "wood", "plaster")[rng.integers(4)], (distance, 0), 0, half, turn)]
    shapes: list[Shape] = []
    for place in np.linspace(-1, 1, int(rng.integers(3, 6))):
        at = (float(distance + rng.uniform(0, 4)), float(place * distance * 0.9))
        half = (rng.uniform(3, 6), distance * rng.uniform(0.15, 0.32), rng.uniform(2, 5))
        shapes += props.tree(rng, at) if style == 2 else props.building(rng, at, half, turn)
    return shapes


def _towers(rng: Rng) -> Scene:
    """High buildings seen from the ground, by day or by night."""
    night = rng.random() < 0.5
    shapes = [_ground(rng, "asphalt")]
    for _ in range(int(rng.integers(4, 11))):
        half = (rng.uniform(5, 16), rng.uniform(5, 16), rng.uniform(8, 70))
        at = (rng.uniform(25, 140), rng.uniform(-70, 70))
        role = "night" if night else ("facade", "glass", "facade", "brick")[rng.integers(4)]
        if rng.random() < 0.2:
            shapes.append(props.column(rng, role, at, 0, half[0], 2 * half[2], taper=rng.uniform(0, 0.3)))
        else:
            shapes.append(props.block(rng, role, at, 0, half, rng.uniform(0, np.pi)))
    for _ in range(int(rng.integers(0, 4))):
        shapes += props.tree(rng, (rng.uniform(8, 40), rng.uniform(-20, 20)))
    camera = _camera(
        rng, shapes, (0, 0, rng.uniform(1.5, 15)), rng.normal(0, 0.3), rng.uniform(-0.05, 0.7), rng.uniform(40, 85)
    )
    return _outdoors(rng, camera, night=night)


def _open_ground(rng: Rng) -> Scene:
    """A field to the horizon with trees, hills, stones, huts and a few people."""
    shapes = [_ground(rng, _any_ground(rng))]
    for _ in range(int(rng.integers(0, 4))):
        half = (rng.uniform(20, 120), rng.uniform(20, 80), rng.uniform(2, 14))
        at = (rng.uniform(60, 300), rng.uniform(-150, 150))
        shapes.append(props.shape(rng, "sphere", _any_ground(rng), (*at, 0), half, yaw=rng.uniform(0, 3)))
    for _ in range(int(rng.integers(0, 4))):
        at = (rng.uniform(0, 30), rng.uniform(-12, 12))
        shapes.append(_slab(rng, _any_ground(rng), at, (rng.uniform(2, 25), rng.uniform(1, 6)), rng.uniform(0, 3.2)))

    def ahead(nearest: float, farthest: float) -> Point:
        x = float(np.exp(rng.uniform(np.log(nearest), np.log(farthest))))
        return x, float(x * rng.uniform(-0.8, 0.8))

    for _ in range(int(rng.integers(0, 6))):
        shapes += props.tree(rng, ahead(4, 60))
    for _ in range(int(rng.integers(1, 8))):
        shapes += props.clutter(rng, ahead(2, 15), scale=rng.uniform(1, 4))
    for _ in range(int(rng.integers(0, 3))):
        half = (rng.uniform(2, 6), rng.uniform(2, 5), rng.uniform(1, 3))
        shapes += props.building(rng, ahead(12, 60), half, rng.uniform(0, np.pi))
    if rng.random() < 0.6:
        shapes += _backdrop(rng, rng.uniform(12, 60))
    if rng.random() < 0.3:
        shapes += props.car(rng, ahead(5, 30), rng.uniform(0, 6.3))
    shapes += _people(rng, lambda: ahead(3, 30), int(rng.integers(0, 4)))
    camera = _camera(
        rng, shapes, (0, 0, rng.uniform(0.8, 3.5)), rng.normal(0, 0.2), rng.normal(-0.08, 0.12), rng.uniform(35, 85)
    )
    return _outdoors(rng, camera, haze=0.5)


def _still_life(rng: Rng) -> Scene:
    """Things at arm's length on a table or a floor, before a wall or nothing."""
    shapes = [_ground(rng, ("floor", "wood", "plaster", "grass", "anything")[rng.integers(5)])]
    if rng.random() < 0.6:
        wall = (rng.uniform(1.5, 5), 0.0)
        shapes.append(props.block(rng, "wallpaper", wall, 0, (0.1, 8, 4), rng.normal(0, 0.4)))
    for _ in range(int(rng.integers(3, 16))):
        x = rng.uniform(0.6, 3.0)
        at = (x, x * rng.uniform(-0.6, 0.6))
        if rng.random() < 0.3:
            wide, deep, high = rng.uniform(0.05, 0.4, 3)
            tilt = props.turn(*rng.uniform(0, 6.3, 3))
            kinds: tuple[ShapeKind, ...] = ("box", "sphere", "frustum")
            kind = kinds[rng.integers(3)]
            where = (*at, rng.uniform(0.1, 0.9))
            half = (float(wide), float(deep), float(high))
            shapes.append(props.shape(rng, kind, "anything", where, half, tilt=tilt, taper=rng.uniform(0, 1)))
        else:
            shapes += props.clutter(rng, at, scale=0.6)
    camera = _camera(
        rng, shapes, (0, 0, rng.uniform(0.3, 1.5)), rng.normal(0, 0.2), rng.uniform(-0.6, 0.0), rng.uniform(40, 75)
    )
    return _outdoors(rng, camera)


def _portrait(rng: Rng) -> Scene:
    """One to three people within a few steps of the camera, before a wall, trees, houses or nothing."""
    shapes = [_ground(rng, _any_ground(rng) if rng.random() < 0.7 else "floor")]
    fov_deg = rng.uniform(35, 70)
    for _ in range(int(rng.integers(1, 4))):
        x = rng.uniform(1.1, 5)
        y = x * rng.uniform(-0.7, 0.7) * np.tan(np.radians(fov_deg) / 2)
        shapes += props.person(rng, (float(x), float(y)), rng.uniform(0, 2 * np.pi))
    shapes += _backdrop(rng, float(np.exp(rng.uniform(np.log(4), np.log(50)))))
    for _ in range(int(rng.integers(0, 5))):
        x, yaw = rng.uniform(3, 20), rng.uniform(0, 2 * np.pi)
        at = (x, float(x * rng.uniform(-0.7, 0.7)))
        if rng.random() < 0.5:
            shapes += (props.clutter, props.tree)[rng.integers(2)](rng, at)
        else:
            shapes += (props.seat, props.car)[rng.integers(2)](rng, at, yaw)
    height, pitch = rng.uniform(1.0, 1.9), rng.normal(-0.05, 0.12)
    camera = _camera(rng, shapes, (0, 0, height), rng.normal(0, 0.1), pitch, fov_deg)
    return _outdoors(rng, camera)


# How often each kind of place is made. Yards lead, because seen from above is how most fixed cameras see.
PLACES: dict[Callable[[Rng], Scene], float] = {
    _room: 0.2,
    _street: 0.2,
    _yard: 0.26,
    _towers: 0.06,
    _open_ground: 0.1,
    _still_life: 0.1,
    _portrait: 0.08,
}
