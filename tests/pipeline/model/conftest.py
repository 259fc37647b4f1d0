import pytest
import torch

from depthmill.pipeline.model.labeler import Labeler


@pytest.fixture(scope="module")
def labeler(checkpoints):
    """Of both modalities, on the CPU, in float32."""
    return Labeler.from_pretrained(checkpoints / "depth", checkpoints / "normals", device="cpu", dtype="float32")


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        yield
