"""The learning rate of both trainers, each by its own configuration."""

import numpy as np
import pytest

from depthmill.pipeline.training.config import TrainConfig
from depthmill.pipeline.training.from_scratch.config import Stage
from depthmill.pipeline.training.schedule import learning_rate

SCHEDULE = {"steps": 100, "warmup_steps": 10, "learning_rate": 2.0, "final_learning_rate": 0.01}
RUN = {"start": "demo", "sets": [{"kind": "scenes", "path": "unused", "scenes": 100}]}
STAGE = {"name": "s", "objective": "end_to_end", "scenes": 100, "batch_size": 4, "height": 12, "width": 16}


@pytest.mark.parametrize("schedule", [TrainConfig(**RUN, **SCHEDULE), Stage(**STAGE, **SCHEDULE)], ids=["run", "stage"])
def test_learning_rate_rises_to_its_peak_and_decays(schedule):
    rates = [learning_rate(schedule, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.02)
    ratios = np.array(rates[11:]) / rates[10:-1]
    assert np.ptp(ratios) < 1e-9  # exponential
    assert learning_rate(schedule.model_copy(update={"steps": 11}), 10) == 2.0
