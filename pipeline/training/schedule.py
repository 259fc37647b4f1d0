"""The learning rate, a function of a step's number alone."""

from __future__ import annotations

from typing import Protocol


class Schedule(Protocol):
    """What a run's configuration (`TrainConfig`), or that of a stage of one, says of its learning rate."""

    @property
    def steps(self) -> int:
        """Of the run, or the stage."""

    @property
    def learning_rate(self) -> float:
        """Peak."""

    @property
    def warmup_steps(self) -> int:
        """Steps over which it rises from 0; the last of them is at the peak."""

    @property
    def final_learning_rate(self) -> float:
        """Share of the peak that it decays to."""


def learning_rate(schedule: Schedule, step: int) -> float:
    """Of step `step` from 0: linear warm-up, then exponential decay to a share of the peak at the last step."""
    if step < schedule.warmup_steps:
        return schedule.learning_rate * (step + 1) / schedule.warmup_steps
    past = (step - schedule.warmup_steps) / max(schedule.steps - schedule.warmup_steps - 1, 1)
    return float(schedule.learning_rate * schedule.final_learning_rate**past)
