import pytest
import torch


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        yield
