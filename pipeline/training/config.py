"""What `depthmill train` is told: one YAML file, checked before anything is read or trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from depthmill.pipeline.config import MAX_RESOLUTION, FolderOrName, Noise, StrictModel
from depthmill.pipeline.model.scratch import Architecture
from depthmill.pipeline.training.sets import SetConfig
from depthmill.pipeline.types import Modality

Objective = Literal["autoencoder", "generative", "diffusion", "end_to_end"]


class Augment(StrictModel):
    """How a picture is changed before it is trained on.

    Attributes:
        flip: Mirror every other picture left to right; a normal's x changes its sign with it.
        height: Rows of the piece that is cut out and resized; left out, pictures stay whole and at their own size.
        width: Its columns.
        smallest_cut: Least share of a picture's width that is cut out.
        degrade: Blur, noise, compression and colour casts of cheap cameras (`degrade.py`), for clean renderings.
    """

    flip: bool = True
    height: int | None = Field(default=None, gt=0)
    width: int | None = Field(default=None, gt=0)
    smallest_cut: float = Field(default=1.0, gt=0, le=1)
    degrade: bool = False


class TrainConfig(StrictModel):
    """A training run; the defaults are those of the paper's fine-tuning (Martin Garcia et al., WACV 2025, section 5).

    Attributes:
        objective: What is learnt. `end_to_end`: the decoded answer of one step at the last time step, by the task's own
            loss (the paper, section 4). `diffusion`: the denoising of depth or normals latents given the picture's
            (Ke et al., CVPR 2024, section 3.2). `generative`: the denoising of pictures' latents, given nothing.
            `autoencoder`: the VAE, from pictures, depth and normals.
        modality: What the estimator answers.
        start: Checkpoint to start from: a directory in diffusers layout or a hub id. Its UNet takes 4 channels (Stable
            Diffusion) or 8 (an estimator); the former is widened where the objective needs both latents.
        architecture: Of a network to make from nothing, in place of `start`.
        sets: Training sets, and the share of steps that each has.
        held_out: Where the pictures come from that are drawn and scored every `picture_steps`, which must not be
            trained on; left out, none are.
        held_out_pictures: How many of them.
        noise: What stands in the noisy latent's place in the single step: of `end_to_end`, and when held-out pictures
            are scored. The checkpoint does not say it: labelling has to be told the same (`--noise`).
        steps: Optimizer steps.
        batch_size: Pictures in a micro-batch, on each process.
        accumulation: Micro-batches to an optimizer step, on each process.
        learning_rate: Peak; AdamW.
        warmup_steps: Steps over which the learning rate rises to it.
        final_learning_rate: Share of the peak that it decays to, exponentially.
        weight_decay: AdamW's.
        gradient_clip: Largest norm of a step's gradient.
        gradient_checkpointing: Trade a third more time for a fraction of the memory.
        mixed_precision: Of the networks; weights, losses and the optimizer stay in float32. fp16 takes a GPU.
        ema: Largest decay of an exponential moving average of the weights, which is then what is saved; left out, none.
            At optimizer step n, from the second on, it is n / (n + 9), if that is less; at the first 0.
        augment: How pictures are changed before they are trained on.
        processing_resolution: What the checkpoint will say that it wants a picture's longer side to be.
        save_dtype: Of the saved weights.
        save_steps: A state to resume from is written every so many steps, and the one before it removed.
        picture_steps: Held-out pictures are drawn and scored every so many steps, and at the end.
        loader_workers: Processes that read pictures ahead; 0 reads between the steps.
        seed: Of everything that is drawn.
    """

    objective: Objective = "end_to_end"
    modality: Modality = "depth"
    start: FolderOrName | None = None
    architecture: Architecture | None = None
    sets: tuple[SetConfig, ...] = Field(min_length=1)
    held_out: SetConfig | None = None
    held_out_pictures: int = Field(default=16, gt=0)
    noise: Noise = "zeros"
    steps: int = Field(default=20_000, gt=0)
    batch_size: int = Field(default=2, gt=0)
    accumulation: int = Field(default=16, gt=0)
    learning_rate: float = Field(default=3e-5, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    final_learning_rate: float = Field(default=0.01, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema: float | None = Field(default=None, gt=0, lt=1)
    augment: Augment = Field(default_factory=Augment)
    processing_resolution: int = Field(default=768, ge=16, le=MAX_RESOLUTION)
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    save_steps: int = Field(default=1000, gt=0)
    picture_steps: int = Field(default=1000, gt=0)
    loader_workers: int = Field(default=4, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.start is None) == (self.architecture is None):
            raise ValueError("give either start (a checkpoint to go on from) or architecture (to begin from nothing)")
        if (self.augment.height is None) != (self.augment.width is None):
            raise ValueError("augment: give both height and width of the piece to cut out, or neither")
        if self.objective == "autoencoder" and self.batch_size < 2:
            raise ValueError(
                f"batch_size is {self.batch_size}; an autoencoder needs 2 at least: every other picture of a "
                "micro-batch is shown to it as depth or normals"
            )
        if self.augment.smallest_cut < 1 and self.augment.height is None:
            raise ValueError("augment: smallest_cut is of pieces, and none are cut out; give height and width, too")
        if self.noise != "zeros" and self.objective not in ("diffusion", "end_to_end"):
            raise ValueError(
                f"noise is {self.noise}, which changes nothing for objective {self.objective}: leave it out"
            )
        return self
