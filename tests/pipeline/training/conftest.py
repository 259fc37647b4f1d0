from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.training import pool, scenes


@pytest.fixture(scope="session")
def scene_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full shard of ten scenes, ten times over, at 24 x 32."""
    directory = tmp_path_factory.mktemp("pool")
    folder = directory / f"v{scenes.VERSION}-24x32"
    folder.mkdir()
    few = pool.render(range(10), 24, 32)
    np.save(folder / "0000000.npy", np.tile(few, (pool.SHARD // 10, 1, 1)))
    return directory
