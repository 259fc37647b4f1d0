"""The project's own procedural scenes, from a pool of rendered ones."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from depthmill.pipeline.config import Folder
from depthmill.pipeline.errors import SampleError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.pool import SHARD, Pool, open_pool
from depthmill.pipeline.training.sets.samples import SetOptions
from depthmill.pipeline.types import Modality


class SceneOptions(SetOptions):
    """Procedural scenes.

    Attributes:
        path: The pool: folder that rendered scenes are kept in and reused from; made if missing.
        scenes: How many.
        first: Seed of the first; other seeds, other scenes.
        height: Rows of a scene.
        width: Columns of a scene.
        render_processes: How many processes render what the pool lacks, each on one core.
    """

    kind: Literal["scenes"] = "scenes"
    path: Folder = Path(".cache/scenes")
    scenes: int = Field(gt=0)
    first: int = Field(default=0, ge=0, multiple_of=SHARD)
    height: int = Field(default=144, gt=0)
    width: int = Field(default=192, gt=0)
    render_processes: int = Field(default=2, ge=1)


class Rendered:
    """Scenes of consecutive seeds, depth and normals exact; sky and what is farther than 80 m have no truth."""

    def __init__(self, options: SceneOptions, modality: Modality) -> None:
        """Render the scenes that the pool lacks."""
        self.modality: Modality = modality
        self._options = options
        _pool(options)

    def __len__(self) -> int:
        """Number of scenes."""
        return self._options.scenes

    def read(self, index: int) -> Batch:
        """One scene; see `TrainingSet.read`."""
        pool = _pool(self._options)
        where = f"scene {self._options.first + index} of {self._options.path}"
        if np.isnan(pool.pixels(index)["depth"]).any():
            raise SampleError(f"{where}: NaN in its depth; remove the pool to render anew")
        views = pool.read(np.array([index]))
        if not views.mask.any():
            raise SampleError(f"{where}: nothing in it is near enough to have truth")
        depth = torch.where(views.mask, views.depth, 0)[:, None]
        target = views.normals if self.modality == "normals" else depth
        return Batch(views.rgb.contiguous(), target.contiguous(), views.mask)


@lru_cache(maxsize=8)
def _pool(options: SceneOptions) -> Pool:
    # Once a process, not in the set: a pool's files are mapped into memory, which pickling would copy.
    o = options
    return open_pool(o.path, o.scenes, o.height, o.width, first=o.first, processes=o.render_processes)
