"""Hypersim (Roberts et al., ICCV 2021) as Marigold's preprocessing script and Hypersim's own previews leave it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from depthmill.pipeline.config import Folder
from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.sets.normals import Intrinsics, rays
from depthmill.pipeline.training.sets.samples import SetOptions, existing, read_16_bit, read_rgb, sample
from depthmill.pipeline.types import Modality

# What lies beyond has no truth, as in E2E-FT; stored depth ends at 65.535 m.
_FAR_M = 65.0
# Of the nominal camera, as a multiple of the picture's width: 886.81 pixels of 1024.
_FOCAL = 886.81 / 1024

_TABLE = "train/filename_meta_train.csv"
_REMEDY = (
    "make the processed layout with Marigold's script/depth/dataset_preprocess/hypersim/preprocess_hypersim.py, and "
    "for normals unpack every frame.*.normal_cam.png of Hypersim under `normals/`"
)


class HypersimOptions(SetOptions):
    """Hypersim's training split.

    Attributes:
        path: The processed folder: `train/` from Marigold's script, and, for normals, `normals/` beside it with
            `<scene>/images/scene_<camera>_geometry_preview/frame.<number>.normal_cam.png`.
        height: Rows of a training picture; 768 x 1024 is resized to 480 x 640 in the paper.
        width: Columns.
    """

    kind: Literal["hypersim"] = "hypersim"
    path: Folder
    height: int = Field(default=480, gt=0)
    width: int = Field(default=640, gt=0)


class Hypersim:
    """Rooms, rendered: the pictures of `filename_meta_train.csv` whose files are there.

    Depth is stored in millimetres, planar (the script made it so from distances), 0 where there is none; beyond 65 m it
    is not trusted. What the script found beyond 65.535 m wrapped round when it was stored, which nobody can tell any
    more.

    Normals are stored as (n + 1) / 2 in 8 bits: x right, y up, z towards the viewer. Artists left some pointing away
    from the camera, of another length, or zero (github.com/apple/ml-hypersim, issue 26): the first are turned, the
    others normalised or left out. They are trusted where depth is.
    """

    def __init__(self, options: HypersimOptions, modality: Modality) -> None:
        """List the pictures.

        Raises:
            TrainingError: If the table or all pictures are missing.
        """
        self.modality: Modality = modality
        self._root = options.path
        self._size = options.height, options.width
        self._pictures = existing(options.path, _listed(options.path / _TABLE, modality), _REMEDY)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._pictures)

    def read(self, index: int) -> Batch:
        """One picture; see `TrainingSet.read`."""
        rgb_path, depth_path, *normals_path = (self._root / name for name in self._pictures[index])
        rgb = read_rgb(rgb_path)
        depth = read_16_bit(depth_path).astype(np.float32) / np.float32(1000)
        mask = (depth > 0) & (depth < _FAR_M)
        if self.modality == "depth":
            return sample(depth_path, rgb, depth, mask, self._size)
        normals, known = _decode(read_rgb(normals_path[0]))
        if known.shape == mask.shape:  # else `sample` says so
            mask &= known
        return sample(normals_path[0], rgb, normals, mask, self._size)


def _listed(table: Path, modality: Modality) -> list[tuple[str, ...]]:
    """Paths of each picture's files below the set's folder, in the table's order."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval=""))  # its last row may be cut
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TrainingError(f"{table} cannot be read ({error}): {_REMEDY}") from error
    columns = {"scene_name", "camera_name", "frame_id", "rgb_path", "depth_path"}
    if rows and (lacking := columns - rows[0].keys()):
        raise TrainingError(f"{table} has no column {', '.join(sorted(lacking))}: {_REMEDY}")
    pictures: list[tuple[str, ...]] = []
    for row in rows:
        files: tuple[str, ...] = f"train/{row['rgb_path']}", f"train/{row['depth_path']}"
        if modality == "normals":
            folder = f"normals/{row['scene_name']}/images/scene_{row['camera_name']}_geometry_preview"
            files += (f"{folder}/frame.{row['frame_id'].zfill(4)}.normal_cam.png",)
        pictures.append(files)
    return pictures


def _decode(stored: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Normals (H, W, 3), unit and facing the camera, and where there are any (H, W)."""
    H, W = stored.shape[:2]
    normals = stored.astype(np.float32) / 127.5 - 1
    length = np.linalg.norm(normals, axis=-1)
    known = (length > 0.5) & (length < 1.5)
    normals /= np.where(known, length, 1)[..., None]
    camera = Intrinsics(_FOCAL * W, _FOCAL * W, (W - 1) / 2, (H - 1) / 2)
    away = (normals * rays(H, W, camera)).sum(-1) > 0
    return np.where(away[..., None], -normals, normals), known
