from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.training import pool, scenes


@pytest.fixture(scope="session")
def scene_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full shard of ten scenes, ten times over, at 24 x 32; and one of a single scene at 25 x 34."""
    directory = tmp_path_factory.mktemp("pool")
    for height, width, number in ((24, 32, 10), (25, 34, 1)):
        folder = directory / f"v{scenes.VERSION}-{height}x{width}"
        folder.mkdir()
        few = pool.render(range(number), height, width)
        np.save(folder / "0000000.npy", np.tile(few, (pool.SHARD // number, 1, 1)))
    return directory
