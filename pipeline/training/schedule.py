"""The learning rate, a function of a step's number alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from depthmill.pipeline.training.config import TrainConfig
    from depthmill.pipeline.training.from_scratch.config import Stage


def learning_rate(schedule: TrainConfig | Stage, step: int) -> float:
    """Of step `step` from 0: linear warm-up, then exponential decay to a share of the peak at the last step.

    One step alone after the warm-up has the peak.
    E2E-FT's (`util/lr_scheduler.py`, `IterExponential`), a step earlier: its first has a rate of 0, and moves nothing.
    """
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    past = (step - schedule.warmup_steps) / max(schedule.steps - schedule.warmup_steps - 1, 1)
    return float(schedule.learning_rate * schedule.final_learning_rate**past)
