from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.clips import GOOD, noisy


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("clips")

    def clip(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make.write_video(path, pictures=noisy(), **GOOD[name])

    return clip
