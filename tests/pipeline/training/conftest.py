from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.training import pool
from depthmill.pipeline.training.scenes import VERSION


@pytest.fixture(scope="session")
def scene_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full shard of ten scenes, ten times over, at 24 x 32."""
    return fill(tmp_path_factory.mktemp("pool"), 24, 32, scenes=10)


@pytest.fixture(scope="session")
def odd_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of one scene, at 25 x 34."""
    return fill(tmp_path_factory.mktemp("odd"), 25, 34, scenes=1)


def fill(directory: Path, height: int, width: int, scenes: int) -> Path:
    """Write a pool's first shard, with few scenes, each as often as there is room."""
    folder = directory / f"v{VERSION}-{height}x{width}"
    folder.mkdir()
    few = pool.render(range(scenes), height, width)
    np.save(folder / "0000000.npy", np.tile(few, (pool.SHARD // scenes, 1, 1)))
    return directory
