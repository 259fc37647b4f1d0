"""What a run with `stages`, which makes the embedded checkpoint, is told; checked before anything is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from depthmill.pipeline.config import MAX_RESOLUTION, Folder, FolderOrName, StrictModel
from depthmill.pipeline.model.scratch import Architecture
from depthmill.pipeline.training.pool import SHARD


class Data(StrictModel):
    """Where training scenes come from.

    Attributes:
        pool: Folder that rendered scenes are kept in and reused from.
        height: Rows of a rendered scene.
        width: Columns of a rendered scene.
        render_processes: How many processes render what the pool lacks, each on one core.
    """

    pool: Folder = Path(".cache/scenes")
    height: int = Field(default=144, gt=0)
    width: int = Field(default=192, gt=0)
    render_processes: int = Field(default=2, ge=1)


class Stage(StrictModel):
    """One part of a run, with its own objective, picture size and learning-rate schedule.

    Attributes:
        name: For log lines and the loss table.
        objective: `autoencoder`: the VAE alone learns to give back pictures, depth and normals. `end_to_end`: VAE and
            both UNets learn from the decoded answer of one step at the last time step with zero noise.
        scenes: How many scenes of the pool, from the first.
        steps: Optimizer steps.
        batch_size: Pictures a step.
        height: Rows of a training picture, which is cut from a scene at a random scale and place.
        width: Columns of a training picture.
        smallest_cut: Least share of a scene's width that is cut out; 1 always shows the whole.
        learning_rate: Peak; of Muon and AdamW (see `optimizer.py`).
        warmup_steps: Steps over which the learning rate rises to it.
        final_learning_rate: Share of the peak that it decays to, exponentially, over the stage.
        anchor: Weight, beside the paper's affine-invariant loss, of the plain difference to depth normalised as
            Marigold does it (near -1, far +1): a network from scratch has to be told which way depth runs.
        slopes: Weight of the difference of slopes to that same target: for edges, sooner.
        relative: Weight of the paper's affine-invariant loss once more, each pixel's part divided by its metric depth:
            what is near counts as much as what is far.
    """

    name: str
    objective: Literal["autoencoder", "end_to_end"]
    scenes: int = Field(gt=0, multiple_of=SHARD)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    smallest_cut: float = Field(default=1.0, gt=0, le=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=100, ge=1)
    final_learning_rate: float = Field(default=0.01, gt=0, le=1)
    anchor: float = Field(default=1.0, ge=0)
    slopes: float = Field(default=0.0, ge=0)
    relative: float = Field(default=0.0, ge=0)


class StagedConfig(StrictModel):
    """A training run with `stages`.

    Attributes:
        seed: Of the initial weights and of everything drawn in training.
        architecture: Of the network to make from nothing.
        start: Weights to go on from instead of random ones: `demo`, or what an earlier run left in its `checkpoint`.
        processing_resolution: What the checkpoint will say that it wants its pictures' longer side to be.
        data: Where scenes come from.
        stages: One after the other.
        save_steps: A resumable state and a checkpoint are written every so many steps.
        picture_steps: Held-out scenes are drawn every so many steps.
        gradient_clip: Largest norm of a step's gradient.
        mixed_precision: Of the network; weights, losses and the optimizer stay in float32.
        cpu_threads: On a CPU, into how many equal parts a batch is split, each on one core.
    """

    seed: int = Field(default=0, ge=0)
    architecture: Architecture
    start: FolderOrName | None = None
    processing_resolution: int = Field(ge=16, le=MAX_RESOLUTION)
    data: Data = Field(default_factory=Data)
    stages: tuple[Stage, ...] = Field(min_length=1)
    save_steps: int = Field(default=500, gt=0)
    picture_steps: int = Field(default=500, gt=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    cpu_threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _stages_fit(self) -> StagedConfig:
        if len({stage.name for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same name: the loss table tells stages apart by their names")
        factor = self.architecture.vae_factor
        for stage in self.stages:
            if stage.batch_size % self.cpu_threads:
                raise ValueError(
                    f"stage {stage.name!r}: batch_size {stage.batch_size} is not divisible by cpu_threads "
                    f"{self.cpu_threads}, the number of equal parts that a batch is split into"
                )
            if stage.objective == "autoencoder" and stage.batch_size < 3 * self.cpu_threads:
                raise ValueError(
                    f"stage {stage.name!r}: batch_size is {stage.batch_size}; an autoencoder needs 3 at least for each "
                    f"of cpu_threads, {self.cpu_threads}: it is shown a picture, depth and normals in turn"
                )
            if stage.height % factor or stage.width % factor:
                raise ValueError(
                    f"stage {stage.name!r}: {stage.height} x {stage.width} is not divisible by {factor}, "
                    "which is how many times smaller than a picture this architecture's latents are"
                )
            if stage.height * self.data.width != stage.width * self.data.height:
                raise ValueError(
                    f"stage {stage.name!r}: {stage.height} x {stage.width} has another aspect ratio than the scenes, "
                    f"{self.data.height} x {self.data.width}"
                )
        return self
