"""What a labelling run can be told: one typed model, read from YAML (`config_files.py`), unknown keys refused.

Reference of every key, and the defaults: `LabelConfig`. Command-line flags carry the same names and win over the file.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS, Domain, Modality, NormalsDtype

DEMO = "demo"  # the name of the checkpoint inside the package
MAX_RESOLUTION = 16_384  # pixels of the longer side, to which pictures are scaled up

Compile = Literal["auto", "on", "off"]
Noise = Literal["zeros", "gaussian", "pyramid"]
TimestepSpacing = Literal["trailing", "leading"]
Preset = Literal["ultrafast", "fast", "medium"]
Whole = Annotated[int, Strict()]  # what YAML reads as true is no 1
_Place = TypeVar("_Place", str, Path)


def _expanded(place: _Place) -> _Place:
    return type(place)(os.path.expanduser(place))  # noqa: PTH111 - Path's own raises where there is no such home


# In YAML no shell makes `~` a home folder; a URL, a hub id and `demo` stay as they are.
Folder = Annotated[Path, AfterValidator(_expanded)]
FolderOrName = Annotated[str, AfterValidator(_expanded)]


class StrictModel(BaseModel):
    """Options that a file or a command line can hold: unknown ones are refused, and none changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Sampling:
    """How labels are drawn from a checkpoint (`pipeline/model/sampling.py`); the defaults are the paper's one step.

    Attributes:
        steps: UNet calls, by DDIM.
        ensemble: Members drawn of each frame and made one; 1, or 3 and more.
        noise: What the noisy latent starts from.
        timestep_spacing: Which of the schedule's time steps are asked: `trailing` ends them at the last one, `leading`
            starts them at the first, the flaw that the paper found: its only step is asked as if there were no noise.
        seed: Of the noise, together with each frame's own name.

    Raises:
        ConfigError: If an ensemble would have no middle, or be one member over and over.
    """

    steps: int = 1
    ensemble: int = 1
    noise: Noise = "zeros"
    timestep_spacing: TimestepSpacing = "trailing"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ensemble == 2:
            raise ConfigError(
                "ensemble is 2; expected 1, or 3 and more: of two members neither is the middle one, nor nearer to "
                "their mean"
            )
        if self.ensemble > 1 and self.noise == "zeros":
            raise ConfigError(
                f"ensemble is {self.ensemble} with noise zeros, from which every member comes out the same; "
                "set noise to gaussian or pyramid (--noise gaussian of depthmill label), or leave the ensemble at 1"
            )

    @property
    def is_single_step(self) -> bool:
        """Whether this is the deterministic single step of `pipeline/model/single_step.py`."""
        return (self.steps, self.ensemble, self.noise, self.timestep_spacing) == (1, 1, "zeros", "trailing")

    @property
    def identity(self) -> dict[str, Any]:
        """What a store remembers of it: what decides the labels, so no seed where nothing is random."""
        return {key: value for key, value in asdict(self).items() if key != "seed" or self.noise != "zeros"}


class LabelConfig(StrictModel):
    """Options of `depthmill label`.

    Attributes:
        checkpoint: Depth checkpoint: `demo`, a local directory in diffusers layout, or a hub id.
        normals_checkpoint: The same for normals; left out, it is `checkpoint` if that is `demo` or answers both
            (GeoWizard).
        labels: What to predict.
        normals_axes: Where the normals checkpoint's x, y and z point, as in `left-up-towards`; left out, as the
            checkpoint describes itself (`pipeline/model/checkpoint.py`).
        domain: The scene that a GeoWizard checkpoint is told of; left out, `indoor`. Other checkpoints have none.
        processing_resolution: Longer side in pixels at which the model sees a frame; left out, the checkpoint's own.
        batch_size: Frames a forward pass; `auto` is 8 on a CPU, fewer of large frames (in Stable Diffusion 1 at 768
            pixels), and on CUDA as many as fit, by the memory that passes of one and of two frames take.
        compile: Whether full batches run compiled: `auto` on CUDA, where that can be done, once a worker has labelled
            5000 frames of a shape, since it takes minutes. What was compiled is kept in the user's cache, and of such
            shapes `auto` runs the first full batch compiled.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `xpu`, `mps`; with `workers` 0 also `cuda:1`.
        dtype: Of the network; `auto` is bfloat16 on CUDA (float16 where it has none), bfloat16 on a CPU that
            multiplies it (AVX512-BF16, AMX), and float32 on any other. It is part of what a store was made with: a run
            resumed on a machine that would choose otherwise must be told.
        normals_dtype: Of the stored normals; int8 is good to 0.4°.
        shard_frames: Frames in one shard file.
        segment_frames: Frames in one unit of work and commit, a multiple of `shard_frames`; left out, as many as the
            store was begun with: about 64, and of a corpus on a GPU about 2048, which fill its batches (as many as take
            2048 UNet calls, if a frame takes several, but not less than 64). A corpus is tars, Parquet files, and
            folders of 1024 pictures.
        round_aspect: Whether pictures (never videos) are resized for the model to aspect ratios rounded to few, from
            which their labels come back at their own: only frames of one processed shape share a batch. The shorter
            side becomes a twelfth of the longer, or several (thinner than 1:2, 24ths, and so on): no picture is
            stretched by more than 1 in 12 and the rounding to the VAE's factor, most of a camera's (1:1, 4:3, 3:2, 2:1)
            not at all. Left out, it holds for corpora. Without it, pictures are seen as Marigold sees them. What either
            does to labels and batches: `benchmarks/batches.md`.
        workers: Ray workers; 0 labels in this process; left out, one for each GPU; on machines without, as many on
            each as its cores have room for with their threads, and its memory with three times the weights and 2 GiB
            each, but one at least.
        threads: CPU threads of each worker's network; left out, the cores of a machine that labels, at most 8. It does
            not depend on the number of workers, since rounding depends on it: that way any number writes the same bytes
            on CPUs of one kind. On CUDA, workers that compile by `auto`, or whose batches differ, round differently.
        address: An existing Ray cluster (`auto`, `ray://host:10001`); left out, that of the environment's RAY_ADDRESS,
            or else one is started for the run.
        attempts: How often a segment is tried before the frames that make it fail are searched for, and how often one
            of those is tried before it is marked as failed.
        frame_limit_s: Most seconds that a frame may take, for each of its steps in each member of its ensemble; left
            out, 60, of a network of more than 100 million weights on a CPU 600. A segment that takes longer than all
            its frames may is ended with its worker; less is granted, but a second a frame at least (30 on CUDA, unless
            `compile` is off), once the run has measured its own pace, unless no frame of the segment was found to be at
            fault. With `workers` 0 there is no limit: nothing could be ended.
        max_pixels: Pictures larger than this are marked as failed instead of read; such videos are left out.
        max_frames: An input with more frames is refused.
        steps: UNet calls for a label; this and the next four are `Sampling`'s, where each is explained.
        ensemble: Members drawn of each frame and made one.
        noise: `zeros`, `gaussian` or `pyramid`: what the labels are drawn from.
        timestep_spacing: `trailing`, or `leading`, the flaw that the paper repairs.
        seed: Of the noise.
    """

    checkpoint: FolderOrName = DEMO
    normals_checkpoint: FolderOrName | None = None
    labels: tuple[Modality, ...] = ("depth", "normals")
    normals_axes: str | None = None
    domain: Domain | None = None
    processing_resolution: Whole | None = Field(default=None, ge=16, le=MAX_RESOLUTION)
    batch_size: int | Literal["auto"] = "auto"
    compile: Compile = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    normals_dtype: NormalsDtype = "int8"
    shard_frames: Whole = Field(default=16, ge=1)
    segment_frames: Whole | None = Field(default=None, ge=1)
    round_aspect: bool | None = None
    workers: Whole | None = Field(default=None, ge=0)
    threads: Whole | None = Field(default=None, ge=1)
    address: str | None = Field(default_factory=lambda: os.environ.get("RAY_ADDRESS"))
    attempts: Whole = Field(default=3, ge=1)
    frame_limit_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_pixels: Whole = Field(default=MAX_PIXELS, ge=1)
    max_frames: Whole = Field(default=MAX_FRAMES, ge=1)
    steps: Whole = Field(default=1, ge=1)
    ensemble: Whole = Field(default=1, ge=1)
    noise: Noise = "zeros"
    timestep_spacing: TimestepSpacing = "trailing"
    seed: Whole = 0

    @field_validator("compile", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """YAML 1.1 reads on and off without quotes as booleans."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _frames_or_auto(cls, value: Any) -> Any:
        """On the command line, numbers are text."""
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError("expected auto, or a number of frames, 1 or more")

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if re.fullmatch(r"auto|cpu|(cuda|xpu|mps)(:\d+)?", device):
            return device
        raise ValueError("expected auto, cpu, cuda, xpu or mps, or with workers 0 also one of several, as cuda:1")

    @field_validator("labels", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """In one string, as on the command line, they are separated by commas."""
        return [word.strip() for word in value.split(",")] if isinstance(value, str) else value

    @field_validator("labels")
    @classmethod
    def _in_one_order(cls, value: tuple[Modality, ...]) -> tuple[Modality, ...]:
        """Depth first: they are the same labels, whatever their order."""
        return tuple(sorted(value))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels is {list(self.labels)}; expected depth, normals or both, each once")
        if self.segment_frames is not None and self.segment_frames % self.shard_frames:
            raise ValueError(
                f"segment_frames is {self.segment_frames}, no multiple of shard_frames ({self.shard_frames}): "
                "two segments would share a file"
            )
        try:
            _ = self.sampling
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def sampling(self) -> Sampling:
        """How labels are drawn."""
        return Sampling(self.steps, self.ensemble, self.noise, self.timestep_spacing, self.seed)

    @property
    def segment_lengths(self) -> tuple[int, int | None]:
        """Frames in a segment, and in a corpus's, if that differs; the device decides, once it is settled."""
        if self.segment_frames is not None:
            return self.segment_frames, None
        corpus = 1 if self.device == "cpu" else 2048 // (self.steps * self.ensemble)
        usual, corpus = (-(-frames // self.shard_frames) * self.shard_frames for frames in (64, max(64, corpus)))
        return usual, corpus if corpus != usual else None

    @property
    def checkpoints(self) -> dict[Modality, str]:
        """The checkpoint's name for each label that is asked for."""
        names: dict[Modality, str] = {"depth": self.checkpoint, "normals": self.normals_checkpoint or self.checkpoint}
        return {modality: names[modality] for modality in self.labels}

    @property
    def labels_by_default(self) -> bool:
        """Whether a label comes from the embedded model only because no checkpoint was named for it."""
        asked = "depth" in self.labels or self.normals_checkpoint is None
        return asked and "checkpoint" not in self.model_fields_set


class SmoothConfig(StrictModel):
    """Options of `depthmill smooth`.

    Attributes:
        max_edge: Frames between the two of an edge, at most; edges are 1, 2, 4, 8, 16 and 32 frames long.
        flow: Preset of the optical flow.
        leak: Radians a frame: changes of scale and shift that are slower stay, faster ones go; 0, or 0.001 or more, for
            float64 has no digits for slower ones; 3.14 at most, for none is faster.
        filter: Whether labels are also filtered over five frames, into arrays of their own.
        workers: Ray workers, one core each; 0 smooths in this process; left out, one for each core of the cluster.
        address: As in `LabelConfig`.
        attempts: How often a segment is tried before it goes without edges.
        frame_limit_s: Most seconds that a frame may take.
        max_pixels: As in `LabelConfig`.
        max_frames: As in `LabelConfig`.
    """

    max_edge: Whole = Field(default=32, ge=1, le=32)
    flow: Preset = "fast"
    leak: float = Field(default=0.1, ge=0, le=3.14, allow_inf_nan=False)
    filter: bool = False
    workers: Whole | None = Field(default=None, ge=0)
    address: str | None = Field(default_factory=lambda: os.environ.get("RAY_ADDRESS"))
    attempts: Whole = Field(default=3, ge=1)
    frame_limit_s: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    max_pixels: Whole = Field(default=MAX_PIXELS, ge=1)
    max_frames: Whole = Field(default=MAX_FRAMES, ge=1)

    @field_validator("leak")
    @classmethod
    def _leak_has_digits(cls, leak: float) -> float:
        if 0 < leak < 1e-3:
            raise ValueError("0, or at least 0.001, below which float64 has too few digits")
        return leak

    @classmethod
    def beside(cls, config: LabelConfig) -> Self:
        """What the options of labelling say of smoothing, too; a limit that the device settles says nothing of it."""
        shared = config.model_dump(include=set(cls.model_fields))
        if config.frame_limit_s is None:
            del shared["frame_limit_s"]
        return cls(**shared)


def make_folder(folder: Path, option: str = "--out") -> None:
    """Make a folder for what a command is going to write, before it does any work.

    Raises:
        ConfigError: If nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise ConfigError(f"{folder} cannot be written ({why}): give a folder that can, {option} FOLDER") from error
