"""What a labelling run can be told: one typed model, read from YAML, unknown keys refused.

Reference of every key, and the defaults: `LabelConfig`. Command-line flags carry the same names and win over the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.types import Domain, Modality

DEMO = "demo"  # the name of the checkpoint inside the package


class LabelConfig(BaseModel):
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
        batch_size: Frames a forward pass.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, `xpu`, `mps`.
        dtype: Of the network; `auto` is bfloat16 on CUDA (float16 where it has none) and float32 on the CPU.
        normals_dtype: Of the stored normals; int8 is good to 0.4°.
        shard_frames: Frames in one shard file.
        segment_frames: Frames in one unit of work and commit, a multiple of `shard_frames`.
        workers: Ray workers; 0 labels in this process; left out, one for each GPU, or one on a machine without.
        threads: CPU threads of each worker's network; left out, the cores of this machine, at most 8. It does not
            depend on the number of workers, since rounding depends on it: that way any number writes the same bytes.
        address: An existing Ray cluster (`auto`, `ray://host:10001`); left out, one is started for the run.
        attempts: How often a segment is tried before its frames are marked as failed.
        max_pixels: Pictures larger than this are marked as failed instead of read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str = DEMO
    normals_checkpoint: str | None = None
    labels: tuple[Modality, ...] = ("depth", "normals")
    normals_axes: str | None = None
    domain: Domain | None = None
    processing_resolution: int | None = Field(default=None, ge=16)
    batch_size: int = Field(default=8, ge=1)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|(cuda|xpu|mps)(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    normals_dtype: Literal["int8", "int16", "float16"] = "int8"
    shard_frames: int = Field(default=16, ge=1)
    segment_frames: int = Field(default=64, ge=1)
    workers: int | None = Field(default=None, ge=0)
    threads: int | None = Field(default=None, ge=1)
    address: str | None = None
    attempts: int = Field(default=3, ge=1)
    max_pixels: int = Field(default=1 << 27, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels is {list(self.labels)}; expected depth, normals or both, each once")
        if self.segment_frames % self.shard_frames:
            raise ValueError(
                f"segment_frames is {self.segment_frames}, no multiple of shard_frames ({self.shard_frames}): "
                "two segments would share a file"
            )
        return self

    @property
    def checkpoints(self) -> dict[Modality, str]:
        """The checkpoint's name for each label that is asked for."""
        names: dict[Modality, str] = {"depth": self.checkpoint, "normals": self.normals_checkpoint or self.checkpoint}
        return {modality: names[modality] for modality in self.labels}


Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], path: str | Path | None, overrides: Mapping[str, Any]) -> Model:
    """Read a YAML file into `model`, with `overrides` that are not None on top.

    Args:
        model: The pydantic model that says what is allowed.
        path: A YAML file; or the bare name of one that ships with depthmill (`video`); or None for the defaults.
        overrides: Values that win over the file: the command line's.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is not allowed; names each of them.
    """
    values: dict[str, Any] = {}
    if path is not None:
        text = _read(Path(path))
        try:
            loaded = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is no YAML: {error}") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path} holds a {type(loaded).__name__}; expected `key: value` lines")
        values = loaded
    values |= {key: value for key, value in overrides.items() if value is not None}
    return validated(model, values, where="the options" if path is None else f"{path} with the command line's options")


def validated(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Make a `model` of `values`.

    Raises:
        ConfigError: If a key or value is not allowed; names each of them. `where` says where they came from.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"  {key}: {message} (got {item['input']!r})" if key else f"  {message}")
        raise ConfigError(f"{where} cannot be used:\n" + "\n".join(problems)) from error


def _read(path: Path) -> str:
    shipped = resources.files("depthmill.configs")
    if not path.is_file() and path.name == str(path):
        packaged = shipped / (path.name if path.suffix else f"{path.name}.yaml")
        if packaged.is_file():
            return packaged.read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        names = sorted(entry.name.removesuffix(".yaml") for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        raise ConfigError(
            f"the configuration {path} cannot be read ({error.strerror}); "
            f"give the path of a YAML file, or one of the names that ship: {', '.join(names)}"
        ) from error
