"""Fixtures that many tests share."""

import os
import sys

import pytest

# Before anything imports them: no test asks a hub, and none waits for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The networks here are tiny: on busy cores, threads that wait for each other cost ten times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _one_thread():
    """Undo what a run inside this process sets: the threads of all that comes after it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a `depth` and a `normals` checkpoint of random weights, which share a VAE; 48 pixels wide."""
    from depthmill.pipeline.model import scratch

    root = tmp_path_factory.mktemp("checkpoints")
    architecture = scratch.Architecture(vae_channels=(8, 16), unet_channels=(16, 32), head_channels=8)
    for modality in ("depth", "normals"):
        scratch.create(root / modality, architecture, modality, seed=3, processing_resolution=48)
    return root


def pytest_collection_modifyitems(items):
    """Skip, visibly, what needs a GPU where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
