"""Clips with true depth, in the layout that Video-Depth-Anything's benchmark prepares (`benchmark/dataset_extract/`).

An index, `<set>_video.json`, lists sequences: {set: [{sequence: [{image, gt_depth, factor, K?, pose?}]}]}, its paths
relative to its own folder. Truth is cut to what the pictures show, as in `benchmark/eval/`. In every picture red and
blue are exchanged: the benchmark decodes with Pillow and writes with OpenCV, and its own models see them so.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import EvaluationError, UnscorableError, check_memory
from depthmill.pipeline.evaluation.datasets import Colours
from depthmill.pipeline.evaluation.decode import Floats, depth_png
from depthmill.pipeline.evaluation.samples import Sample, some

Doubles = npt.NDArray[np.float64]

_BENCHMARK = "Video-Depth-Anything's benchmark/dataset_extract"


def red_for_blue(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Colours (H, W, 3) with red and blue exchanged."""
    return pixels[..., ::-1]


@dataclass(frozen=True)
class ClipSet:
    """How a set of clips is scored.

    Attributes:
        name: On the command line, and in the index.
        title: For people.
        cap_m: Depth is valid between 1 mm and this, both excluded; aligned predictions are clipped to it.
        rows: Of the truth that the pictures show, and that is scored.
        columns: Likewise.
        uncut: Folder whose pictures show all of the truth; no more of it is scored. "" if the set has none.
        colours: What the model is shown of the pictures' colours, (H, W, 3) uint8; None for the pictures' own.
    """

    name: str
    title: str
    cap_m: float
    rows: slice = field(default_factory=partial(slice, None))
    columns: slice = field(default_factory=partial(slice, None))
    uncut: str = ""
    colours: Colours | None = red_for_blue


CLIP_SETS = {
    one.name: one
    for one in (
        ClipSet("sintel", "Sintel", 70, slice(0, 436), slice(0, 1024)),
        ClipSet("scannet", "ScanNet", 10, slice(8, -8), slice(11, -11), "color_origin"),
        ClipSet("kitti", "KITTI", 80, slice(0, 374), slice(0, 1242)),
        ClipSet("bonn", "Bonn RGB-D Dynamic", 10, slice(0, 480), slice(0, 640)),
        ClipSet("nyuv2", "NYUv2 video", 10, slice(45, 471), slice(41, 601)),
        ClipSet("rendered", "rendered scenes", 1000, colours=None),
    )
}


@dataclass(frozen=True, eq=False)
class ClipFrame:
    """One frame.

    Attributes:
        sample: What predictions call it: the picture's path in the index, without its suffix.
        picture: Its file.
        truth: File of its depth, a 16-bit PNG.
        factor: What the PNG has for a metre.
        intrinsics: (3, 3) pixels of the cut truth; None if the index has none.
        pose: (4, 4) camera to world, metres; None if the index has none, or it is not finite: tracking was lost there.
        uncut: Whether the picture shows all of the truth.
    """

    sample: Sample
    picture: Path
    truth: Path
    factor: float
    intrinsics: Doubles | None
    pose: Doubles | None
    uncut: bool


@dataclass(frozen=True, eq=False)
class TrueClip:
    """A sequence: its name, and its frames in order."""

    name: str
    frames: tuple[ClipFrame, ...]


def find_index(wanted: ClipSet, data: Path) -> Path:
    """The index of a set: `data` itself, or in it, or in its folder of the set's name.

    Raises:
        EvaluationError: If there is none.
    """
    file = f"{wanted.name}_video.json"
    for path in (data, data / file, data / wanted.name / file):
        if os.path.isfile(path):  # noqa: PTH113 (a refused Path raises)
            return path
    raise EvaluationError(
        f"{data} has no {file}; expected the index that {_BENCHMARK} writes of {wanted.name}: give that file (also "
        "one of another length, such as *_video_500.json), or its folder"
    )


def open_clips(wanted: ClipSet, data: Path) -> tuple[TrueClip, ...]:
    """Read the index of a set, where `find_index` finds it, and see that its files are there.

    Raises:
        EvaluationError: If the index or files are missing, or it says something else than expected.
    """
    index = find_index(wanted, data)
    try:
        sequences = json.loads(index.read_text(encoding="utf-8"))[wanted.name]
        clips = tuple(
            TrueClip(name, tuple(_frame(wanted, index.parent, entry) for entry in frames))
            for sequence in sequences
            for name, frames in sequence.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{index} cannot be read ({type(error).__name__}: {error}); expected {{{wanted.name!r}: [{{sequence: "
            f"[{{image, gt_depth, factor, ...}}, ...]}}, ...]}}, as {_BENCHMARK} writes it"
        ) from error
    names = [clip.name for clip in clips]
    if bad := sorted({name for name in names if names.count(name) > 1 or not re.fullmatch(r"(?!\.)[^/\\\0]+", name)}):
        raise EvaluationError(
            f"{index} calls sequences {some(bad)}: expected names that differ, without / or \\, and not from a dot on; "
            "name them anew in it"
        )
    frames = [frame for clip in clips for frame in clip.frames]
    missing = [str(path) for frame in frames for path in (frame.picture, frame.truth) if not path.is_file()]
    if missing or not frames:
        what = f"{some(missing)} that are not there" if missing else "no frame"
        raise EvaluationError(f"{index} lists {what}: prepare the set anew")
    return clips


def read_true_depth(wanted: ClipSet, frame: ClipFrame) -> Floats:
    """(H, W) metres of what the picture shows; NaN where it is not valid, or not scored.

    Raises:
        UnscorableError: If it cannot be decoded.
        EvaluationError: If its file cannot be read.
    """
    data = read_file(frame.truth)
    try:
        whole = depth_png(data, steps_per_m=frame.factor)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        check_memory(error)
        raise UnscorableError(f"{frame.truth} cannot be read: {str(error) or type(error).__name__}") from error
    valid = (whole > 1e-3) & (whole < wanted.cap_m)
    scored = wanted.rows, wanted.columns
    depth = np.full_like(whole, np.nan)
    depth[scored] = np.where(valid, whole, np.nan)[scored]
    return depth if frame.uncut else depth[scored]


def read_file(path: Path) -> bytes:
    """A file of the set.

    Raises:
        EvaluationError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be read ({error.strerror}); expected it whole: get the data anew"
        ) from error


def _frame(wanted: ClipSet, folder: Path, entry: dict[str, Any]) -> ClipFrame:
    intrinsics, pose = (None if name not in entry else np.array(entry[name], np.float64) for name in ("K", "pose"))
    if intrinsics is not None:
        if intrinsics.shape not in ((3, 3), (4, 4)):
            raise ValueError(f"K of shape {intrinsics.shape}; expected 3x3 or 4x4")
        intrinsics = intrinsics[:3, :3].copy()
        if not np.linalg.det(intrinsics):
            raise ValueError(f"K is {intrinsics.tolist()}, which has no inverse; expected a camera matrix")
        # A negative start would need the truth's size; no set has one.
        intrinsics[:2, 2] -= (wanted.columns.start or 0, wanted.rows.start or 0)
    if pose is not None and pose.shape != (4, 4):
        raise ValueError(f"a pose of shape {pose.shape}; expected 4x4")
    if not float(entry["factor"]) > 0:
        raise ValueError(f"a factor of {entry['factor']}; expected more than 0")
    name = PurePosixPath(entry["image"])
    return ClipFrame(
        sample=Sample(name.with_suffix("").as_posix(), name.as_posix(), entry["gt_depth"], None),
        picture=folder / entry["image"],
        truth=folder / entry["gt_depth"],
        factor=float(entry["factor"]),
        intrinsics=intrinsics,
        pose=pose if pose is not None and np.isfinite(pose).all() and np.linalg.det(pose) else None,
        uncut=wanted.uncut in name.parts,
    )
