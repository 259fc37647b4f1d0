"""Virtual KITTI 2 (Cabon et al., 2020) as its archives unpack."""

from __future__ import annotations

import logging
import re
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from depthmill.pipeline.config import Folder
from depthmill.pipeline.errors import SampleError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.sets.normals import Intrinsics, normals_from_depth
from depthmill.pipeline.training.sets.samples import SetOptions, existing, read_16_bit, read_rgb, sample
from depthmill.pipeline.types import Modality

logger = logging.getLogger(__name__)

# What lies beyond has no truth, as in E2E-FT.
_FAR_M = 80.0
_SKY_CM = 65535
_SIZE = 375, 1242
# The same in every intrinsic.txt of the set.
_CAMERA = Intrinsics(725.0087, 725.0087, 620.5, 187.0)
# KITTI's benchmark crop, 352 x 1216: the lowest rows, the middle columns.
_CROP = slice(375 - 352, 375), slice((1242 - 1216) // 2, (1242 + 1216) // 2)

_SCENES = ("Scene01", "Scene02", "Scene06", "Scene18", "Scene20")
_ARCHIVES = {"rgb": "vkitti_2.0.3_rgb", "depth": "vkitti_2.0.3_depth"}
_REMEDY = (
    "unpack vkitti_2.0.3_rgb.tar and vkitti_2.0.3_depth.tar there, either into folders of those names or both into one"
)

Condition = Literal[
    "15-deg-left",
    "15-deg-right",
    "30-deg-left",
    "30-deg-right",
    "clone",
    "fog",
    "morning",
    "overcast",
    "rain",
    "sunset",
]


class VKitti2Options(SetOptions):
    """Virtual KITTI 2, both cameras.

    Attributes:
        path: Where its archives are unpacked: `vkitti_2.0.3_rgb/Scene01/…` and `vkitti_2.0.3_depth/Scene01/…`, or
            `Scene01/…` with both.
        conditions: Which variants of each scene; the paper's five by default.
    """

    kind: Literal["vkitti2"] = "vkitti2"
    path: Folder
    conditions: tuple[Condition, ...] = Field(default=("morning", "fog", "rain", "sunset", "overcast"), min_length=1)


class VKitti2:
    """Drives through five streets: 352 x 1216 pictures, KITTI's crop.

    Depth is stored in centimetres along the viewing axis, 65535 in the sky; beyond 80 m it is not trusted. The set has
    no normals: they are made from depth.
    """

    def __init__(self, options: VKitti2Options, modality: Modality) -> None:
        """List the pictures.

        Raises:
            TrainingError: If there are none.
        """
        self.modality: Modality = modality
        self._root = options.path
        self._pictures = existing(options.path, _listed(options), _REMEDY)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._pictures)

    def read(self, index: int) -> Batch:
        """One picture; see `TrainingSet.read`."""
        rgb_path, depth_path = (self._root / name for name in self._pictures[index])
        rgb, stored = read_rgb(rgb_path), read_16_bit(depth_path)
        for path, values in ((rgb_path, rgb), (depth_path, stored)):
            if values.shape[:2] != _SIZE:
                raise SampleError(f"{path}: {values.shape[:2]} pixels; expected {_SIZE}, the set's size: replace it")
        depth = stored.astype(np.float32) / np.float32(100)
        measured = (stored > 0) & (stored < _SKY_CM)
        mask = measured & (depth < _FAR_M)
        if self.modality == "depth":
            return sample(depth_path, rgb[_CROP], depth[_CROP], mask[_CROP])
        normals, found = normals_from_depth(depth, measured, _CAMERA)
        return sample(depth_path, rgb[_CROP], normals[_CROP], (mask & found)[_CROP])


def _listed(options: VKitti2Options) -> list[tuple[str, ...]]:
    """Paths of each picture's files below the set's folder, in the order of their names."""
    prefix = {part: f"{name}/" if (options.path / name).is_dir() else "" for part, name in _ARCHIVES.items()}
    pictures: list[tuple[str, ...]] = []
    empty = []
    for scene, condition, camera in product(_SCENES, options.conditions, ("Camera_0", "Camera_1")):
        rgb, depth = (f"{prefix[part]}{scene}/{condition}/frames/{part}/{camera}" for part in ("rgb", "depth"))
        numbers = _numbers(options.path / rgb)
        pictures += [(f"{rgb}/rgb_{number}.jpg", f"{depth}/depth_{number}.png") for number in numbers]
        if not numbers:
            empty.append(rgb)
    if empty:
        logger.warning("%s: %d folders without a picture, first %s", options.path, len(empty), empty[0])
    return pictures


def _numbers(folder: Path) -> list[str]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(match[1] for name in names if (match := re.fullmatch(r"rgb_(\d+)\.jpg", name)))
