"""Micro-batches out of the loader's processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.training.loader import MicroBatches, load
from depthmill.tests.pipeline.training.tiny import config


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_cannot_be_read_is_an_error_without_a_traceback(scene_pool: Path, tmp_path: Path, workers: int) -> None:
    (sound,) = scene_pool.rglob("*.npy")
    scenes = np.load(sound)
    scenes["depth"] = np.inf  # nothing but sky
    damaged = tmp_path / sound.relative_to(scene_pool)
    damaged.parent.mkdir()
    np.save(damaged, scenes)
    batches = MicroBatches(config(tmp_path))
    assert isinstance(pickle.loads(pickle.dumps(batches[0])), TrainingError)  # as a process hands it over
    with pytest.raises(TrainingError, match=r"^not one of the 100 pictures can be used, for reasons such as\n"):
        next(load(batches, [0], workers=workers, pin=False))
