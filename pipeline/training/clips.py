"""Clips of the project's scenes, with exact depth, normals and camera: what smoothing is held against.

A scene stands still; its camera does too, or turns, or goes forward.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from depthmill.pipeline.errors import EvaluationError
from depthmill.pipeline.store import write_atomically
from depthmill.pipeline.store.files import json_bytes
from depthmill.pipeline.training import props, scenes
from depthmill.pipeline.training.raycast import concatenate, render
from depthmill.pipeline.training.shapes import Scene

Floats = npt.NDArray[np.float32]
Camera = Literal["static", "pan", "forward"]
CAMERAS: tuple[Camera, ...] = get_args(Camera)
# Of the set `rendered`: nothing is trained on these, nor are other benchmarks about them (`HELD_OUT_SEED`, and on).
SEEDS = tuple(range(1_000_030_001, 1_000_030_005))
_INDEX = "rendered_video.json"

_PAN_DEG = 0.25  # a frame
_TRAVEL = 0.25  # of the median depth, in the whole clip; less where something is in the way
_RENDERED_AT_ONCE = 4
_DEEPEST = 65535  # steps of a 16-bit PNG


@dataclass(frozen=True, eq=False)
class Clip:
    """N rendered frames of one scene.

    Attributes:
        rgb: (N, H, W, 3) uint8, sRGB.
        depth_m: (N, H, W) float32, metres along the optical axis; +inf where there is none (sky).
        normals: (N, H, W, 3) float32 unit, x right, y up, z towards the viewer; (0, 0, 0) where there is no depth.
        valid: (N, H, W) bool, where there is depth.
        intrinsics: (3, 3) float64, pixels, with the centre of the first pixel at (0, 0).
        poses: (N, 4, 4) float64, camera to world, metres; the camera's axes are OpenCV's: x right, y down, z forward.
    """

    rgb: npt.NDArray[np.uint8]
    depth_m: Floats
    normals: Floats
    valid: npt.NDArray[np.bool_]
    intrinsics: npt.NDArray[np.float64]
    poses: npt.NDArray[np.float64]


def render_clip(seed: int, camera: Camera, frames: int, height: int, width: int, *, samples: int = 2) -> Clip:
    """Render a clip of the scene of a seed.

    Args:
        seed: Of the scene.
        camera: `static`; `pan`, a quarter of a degree a frame; or `forward`, by a quarter of the median depth in all,
            and never more than half the way to what is in front.
        frames: Number of frames.
        height: Rows.
        width: Columns.
        samples: Rays that a pixel's colour is averaged over.

    Raises:
        ValueError: If the camera is unknown, or sees nothing but sky.
    """
    if camera not in CAMERAS:
        raise ValueError(f"camera is {camera!r}; expected one of {', '.join(CAMERAS)}")
    still = scenes.sample(seed)
    path = _path(still, camera, frames)
    seen = path[:1] if camera == "static" else path  # one view, again and again
    parts = [
        render(seen[start : start + _RENDERED_AT_ONCE], height, width, samples=samples)
        for start in range(0, len(seen), _RENDERED_AT_ONCE)
    ]
    views = concatenate(parts * (frames // len(seen)))
    focal_px = still.focal * width
    poses = np.tile(np.eye(4), (frames, 1, 1))
    for pose, scene in zip(poses, path, strict=True):
        pose[:3, :3] = scene.rotation * np.array([1, -1, -1])  # up and backwards to down and forward
        pose[:3, 3] = scene.position
    return Clip(
        rgb=views.frames(),
        depth_m=views.depth.numpy().astype(np.float32),
        normals=views.normals.permute(0, 2, 3, 1).numpy().astype(np.float32),
        valid=views.mask.numpy(),
        intrinsics=np.array([[focal_px, 0, width / 2 - 0.5], [0, focal_px, height / 2 - 0.5], [0, 0, 1]]),
        poses=poses,
    )


def export_clips(
    folder: Path, seeds: Sequence[int] = SEEDS, frames: int = 40, height: int = 240, width: int = 320
) -> Iterator[str]:
    """Render clips to files, in the layout of `evaluation.clips`, with intrinsics and poses: set `rendered`.

    Clips that are there already are kept if they are of these scenes, in this version, and of these sizes; those of
    other scenes are no longer taken for clips. The index is written last.

    Args:
        folder: Where to.
        seeds: Of the scenes; each is seen by a camera that stands still, one that turns, and one that goes forward.
        frames: Of a clip.
        height: Rows.
        width: Columns.

    Yields:
        The name of each clip that is written.
    """
    index = folder / _INDEX
    wanted = {f"{camera}_{seed}": (seed, camera) for seed, camera in product(seeds, CAMERAS)}
    for about in folder.glob("*/clip.json"):
        if about.parent.name not in wanted:
            about.unlink()
    sequences = []
    for name, (seed, camera) in wanted.items():
        made = {"version": scenes.VERSION, "seed": seed, "frames": frames, "height": height, "width": width}
        about = folder / name / "clip.json"
        there = json.loads(about.read_text()) if about.is_file() else {}
        if there.get("made") != made:
            for stale in (index, about):  # frames are replaced one by one
                stale.unlink(missing_ok=True)
            clip = render_clip(seed, camera, frames, height, width)
            factor = _DEEPEST / float(clip.depth_m[clip.valid].max())
            entries = []
            for i in range(frames):
                entry = {"image": f"{name}/rgb/{i:06d}.png", "gt_depth": f"{name}/depth/{i:06d}.png"}
                depth = np.rint(np.where(clip.valid[i], clip.depth_m[i], 0) * factor).astype(np.uint16)
                for path, pixels in zip(entry.values(), (clip.rgb[i], depth), strict=True):
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    write_atomically(folder / path, buffer.getvalue())
                entries.append(
                    {**entry, "factor": factor, "K": clip.intrinsics.tolist(), "pose": clip.poses[i].tolist()}
                )
            there = {"made": made, "frames": entries}
            write_atomically(about, json_bytes(there))
        sequences.append({name: there["frames"]})
        yield name
    write_atomically(index, json_bytes({"rendered": sequences}))


def check_version(folder: Path) -> None:
    """See that exported clips are of this version of the scenes, and of those that nothing is trained on.

    Raises:
        EvaluationError: If some are of others.
    """
    for about in folder.glob("*/clip.json"):
        made = json.loads(about.read_text()).get("made", {})
        found = f"version {made.get('version')} of the scenes; expected {scenes.VERSION}"
        if made.get("version") == scenes.VERSION:
            if "seed" in made:  # which was not written down while the set's scenes were among those to train on
                continue
            found = "scenes that models are trained on; expected others"
        raise EvaluationError(f"{about.parent} is of {found}: remove {folder / _INDEX} for it to be rendered anew")


def _path(scene: Scene, camera: Camera, frames: int) -> list[Scene]:
    steps = np.arange(frames)
    if camera == "static":
        return [scene] * frames
    if camera == "pan":
        angles = np.radians(_PAN_DEG) * (steps - (frames - 1) / 2)
        return [replace(scene, rotation=(props.turn(angle) @ scene.rotation).astype(np.float32)) for angle in angles]
    seen = render([scene], 48, 64)
    depth, ahead = seen.depth[seen.mask], seen.depth[0, 12:36, 16:48].min()
    if not len(depth):
        raise ValueError("nothing but sky is in sight of this scene's camera; expected another seed")
    travel_m = min(_TRAVEL * float(depth.median()), float(ahead) / 2)
    forward = -scene.rotation[:, 2]
    places = scene.position + np.outer(steps / max(frames - 1, 1) * travel_m, forward)
    return [replace(scene, position=place.astype(np.float32)) for place in places]
