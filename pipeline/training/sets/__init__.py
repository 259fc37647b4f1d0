"""Training sets: pictures with the truth of one modality. Adding a kind is one file and one line in `_KINDS`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from depthmill.pipeline.training.batch import TrainingSet
from depthmill.pipeline.training.pool import SHARD
from depthmill.pipeline.training.sets.rendered import Rendered
from depthmill.pipeline.types import Modality


class SetConfig(BaseModel):
    """One training set of a run.

    Attributes:
        kind: What reads it.
        path: Its folder; of `scenes`, the pool that rendered scenes are kept in.
        ratio: Its share of the micro-batches, relative to the others'.
        first: Of `scenes`: the first one's seed.
        count: Of `scenes`: how many, rendered where the pool lacks them; whole shards of 100.
        height: Of `scenes`: rows.
        width: Of `scenes`: columns.
        processes: Of `scenes`: how many render, each on one core.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["scenes"]
    path: Path
    ratio: float = Field(default=1.0, gt=0)
    first: int = Field(default=0, ge=0, multiple_of=SHARD)
    count: int = Field(default=2000, gt=0, multiple_of=SHARD)
    height: int = Field(default=144, gt=0)
    width: int = Field(default=192, gt=0)
    processes: int = Field(default=2, ge=1)


_KINDS = {"scenes": Rendered}


def open_set(config: SetConfig, modality: Modality) -> TrainingSet:
    """Open a training set for one modality.

    Raises:
        TrainingError: If it lacks files.
    """
    return _KINDS[config.kind](config, modality)
