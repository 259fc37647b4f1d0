"""The project's own scenes, out of a pool that is rendered where it lacks some."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from depthmill.pipeline.errors import SampleError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.pool import Pool, open_pool
from depthmill.pipeline.types import Modality

if TYPE_CHECKING:
    from depthmill.pipeline.training.sets import SetConfig


class Rendered:
    """Scenes of the seeds [first, first + count); pixels of the sky and beyond 80 m have no truth."""

    def __init__(self, config: SetConfig, modality: Modality):
        """Render what the pool lacks, which takes a second for ten scenes on one core."""
        self.modality, self._config = modality, config
        _ = self._pool

    @cached_property
    def _pool(self) -> Pool:
        c = self._config
        return open_pool(c.path, c.count, c.height, c.width, first=c.first, processes=c.processes)

    def __getstate__(self) -> dict[str, Any]:
        # Without the pool, whose files are mapped: a pickle would hold every pixel of them.
        return {key: value for key, value in self.__dict__.items() if key != "_pool"}

    def __len__(self) -> int:
        """Number of scenes."""
        return self._config.count

    def read(self, index: int) -> Batch:
        """One scene; see `TrainingSet`."""
        views = self._pool.read(np.array([index]))
        if not views.mask.any():
            raise SampleError(f"scene {self._config.first + index} shows nothing but sky")
        depth = views.depth.where(views.mask, 0)[:, None]
        return Batch(views.rgb, depth if self.modality == "depth" else views.normals, views.mask)
