"""Checkpoints on disk: found, checked and described; `modules.py` loads them.

A checkpoint is a directory in diffusers layout, `unet/ vae/ scheduler/ tokenizer/ text_encoder/`, in safetensors: a
pickle can run code when it is opened, and is refused. A joint one (GeoWizard) answers depth and normals together, and
has `image_encoder/ feature_extractor/` in place of the last two. What the files do not say of themselves (where the
normals' axes point, how the empty prompt is padded) is the checkpoint's description: `_PUBLISHED` for the known ones,
`depthmill.json` beside `model_index.json` for those trained here, options for the rest. The libraries that load it are
not imported here: to find that a run is finished takes none of them, and seconds less.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import SafetensorError, safe_open

from depthmill.pipeline.config import DEMO, MAX_RESOLUTION, LabelConfig
from depthmill.pipeline.errors import CheckpointError, ConfigError
from depthmill.pipeline.geometry import STORED_AXES, axes_signs
from depthmill.pipeline.model.hashes import hash_files
from depthmill.pipeline.types import Domain, Modality

log = logging.getLogger(__name__)

DEFAULT_RESOLUTION = 768  # Marigold's and E2E-FT's, where a checkpoint does not carry its own
DESCRIPTION_FILE = "depthmill.json"
_PARTS = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")
_JOINT_PARTS = ("unet", "vae", "image_encoder", "scheduler", "feature_extractor")
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Copies beside the weights, sharded or not, which are neither fetched nor used.
_VARIANTS = ("*.fp16.*", "*.fp16-*", "*.non_ema.*", "*.non_ema-*")

PromptPadding = Literal["do_not_pad", "max_length"]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Description:
    """What a checkpoint's modules do not say of themselves; its values are checked, since people write them.

    Attributes:
        modality: What it answers, or None if that is not known.
        normals_axes: Where the x, y and z of its normals point.
        prompt_padding: How its empty prompt is tokenised: 2 tokens, or padded to 77.
        clip_normals: Whether the decoded normals are clipped to [-1, 1] before they are made unit: diffusers does so
            for Marigold; the E2E-FT reference does not, and its loss leaves their length free. Of what its trainer
            saves, an estimator in a `StableDiffusionPipeline`, no is the default.
        full_z_range: False if the decoded z in [-1, 1] stands for [0, 1] (diffusers, `use_full_z_range`).
    """

    modality: Modality | None = None
    normals_axes: str = STORED_AXES
    prompt_padding: PromptPadding = "do_not_pad"
    clip_normals: bool = True
    full_z_range: bool = True


# E2E-FT's ground-truth normals (Hypersim) have x to the left; its inference, like Marigold's, does not pad the prompt.
_E2E_NORMALS = Description("normals", normals_axes="left-up-towards", clip_normals=False)
_PUBLISHED = {
    "GonzaloMG/marigold-e2e-ft-depth": Description("depth"),
    "GonzaloMG/stable-diffusion-e2e-ft-depth": Description("depth"),
    "GonzaloMG/marigold-e2e-ft-normals": _E2E_NORMALS,
    "GonzaloMG/stable-diffusion-e2e-ft-normals": _E2E_NORMALS,
    "GonzaloMG/marigold-normals": _E2E_NORMALS,
    "prs-eth/marigold-depth-v1-0": Description("depth"),
    "prs-eth/marigold-depth-v1-1": Description("depth"),
    "prs-eth/marigold-normals-v0-1": Description("normals"),
    "prs-eth/marigold-normals-v1-1": Description("normals"),
}
# GeoWizard's layout, whatever its name: E2E-FT trains it on its normals times -1, and its pipeline turns them back.
_JOINT = Description(normals_axes="right-down-away", clip_normals=False)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and checked; nothing of it is in memory.

    Attributes:
        name: As the user gave it.
        directory: Where its files are.
        modality: What it is used for.
        sha256: Of every file that is used, names included: its identity in a store.
        processing_resolution: Longer side in pixels that it was trained for.
        description: What its files do not say.
        domain: Of the scenes, if it is joint: told to the network; None for all others.
    """

    name: str
    directory: Path
    modality: Modality
    sha256: str
    processing_resolution: int
    description: Description
    domain: Domain | None = None

    @property
    def identity(self) -> dict[str, str]:
        """What a store remembers of it."""
        identity = {"name": self.name, "sha256": self.sha256, "normals_axes": self.description.normals_axes}
        return identity if self.domain is None else identity | {"domain": self.domain}


def is_joint(name: str) -> bool:
    """Whether a checkpoint answers depth and normals together (GeoWizard); downloads it unless it is cached.

    Raises:
        CheckpointError: If it is not there.
    """
    return _parts(_locate(name, "depth")) == _JOINT_PARTS


def open_checkpoint(
    name: str, modality: Modality, *, normals_axes: str | None = None, domain: Domain | None = None
) -> Checkpoint:
    """Find a checkpoint and check that it can be used, without loading it.

    Args:
        name: `demo`, a local directory, or a hub id (`owner/name` or `owner/name@revision`), which is downloaded
            unless it is cached.
        modality: What it is to answer.
        normals_axes: Overrides the description's axes.
        domain: Of the scenes, for a joint checkpoint; left out, `indoor`, as its reference has it.

    Raises:
        CheckpointError: If it is not there, is incomplete, holds no safetensors, or answers something else.
        ConfigError: If `normals_axes` names no axes, or `domain` is given for a checkpoint that is not joint.
    """
    directory = _locate(name, modality)
    files = _files(name, directory)
    index = read_json(directory / "model_index.json")
    description = _describe(name, directory, index)
    if description.modality not in (None, modality):
        raise CheckpointError(
            f"checkpoint {name} answers {description.modality}, and was given for {modality}; "
            f"expected a {modality} checkpoint: give one, or swap checkpoint (depth's) and normals_checkpoint "
            "(--normals-checkpoint of depthmill label)"
        )
    if description.modality is None and (declared := index.get("prediction_type")) not in (None, "depth", "normals"):
        raise CheckpointError(
            f"checkpoint {name} answers {declared!r} (prediction_type in its model_index.json), and was given for "
            f"{modality}; expected depth or normals (disparity is not depth): use another checkpoint; if it answers "
            f'{modality} after all, say so in {DESCRIPTION_FILE} beside model_index.json: {{"modality": "{modality}"}}'
        )
    if normals_axes is not None:
        description = replace(description, normals_axes=normals_axes)
    elif modality == "normals" and _may_be_e2e(directory, index) and not _is_described(name, directory):
        _warn(
            f"checkpoint {name} does not say where its normals point, taken to be {description.normals_axes}; E2E-FT's "
            f"trainer saves such ones, and theirs are left-up-towards: --normals-axes or a {DESCRIPTION_FILE} in it "
            "says so"
        )
    axes_signs(description.normals_axes)
    joint = _parts(directory) == _JOINT_PARTS
    if domain is not None and not joint:
        raise ConfigError(
            f"domain is {domain!r}, and checkpoint {name} cannot be told of one; expected a GeoWizard checkpoint "
            "(image_encoder/ in place of text_encoder/): leave domain (--domain) out"
        )
    resolution = index.get("default_processing_resolution") or DEFAULT_RESOLUTION
    if not isinstance(resolution, int) or not 16 <= resolution <= MAX_RESOLUTION:
        raise CheckpointError(
            f"checkpoint {name}: default_processing_resolution is {resolution!r}; expected pixels, 16 to "
            f"{MAX_RESOLUTION}: correct its model_index.json"
        )
    return Checkpoint(
        name,
        directory,
        modality,
        sha256=hash_files(directory, files),
        processing_resolution=resolution,
        description=description,
        domain=(domain or "indoor") if joint else None,
    )


def open_named(config: LabelConfig) -> list[Checkpoint]:
    """The checkpoints that a run names, depth first, each by itself: whether the run's options suit them is not asked.

    Raises:
        CheckpointError: As `open_checkpoint`.
        ConfigError: As `open_checkpoint`.
    """
    axes = {"normals": config.normals_axes}
    return [
        open_checkpoint(name, modality, normals_axes=axes.get(modality), domain=config.domain)
        for modality, name in config.checkpoints.items()
    ]


def _parts(directory: Path) -> tuple[str, ...]:
    joint = (directory / "image_encoder").is_dir() and not (directory / "text_encoder").exists()
    return _JOINT_PARTS if joint else _PARTS


def _locate(name: str, modality: Modality) -> Path:
    if name == DEMO:
        return Path(str(resources.files("depthmill.pipeline.model"))) / "demo" / modality
    if os.path.isdir(name):  # noqa: PTH112 (a refused Path raises)
        directory = Path(name).resolve()
        for folder in (directory, *(directory / part for part in {*_PARTS, *_JOINT_PARTS})):
            for path in (folder, *folder.glob("*.json"), *folder.glob("*.txt")):
                if os.path.exists(path) and not os.access(path, os.R_OK):  # noqa: PTH110 (a refused Path raises)
                    raise CheckpointError(
                        f"checkpoint {name}: {path} may not be read; expected files of this user's, or for all to "
                        "read: change its permissions, or copy it"
                    )
        return directory
    if os.path.exists(name):  # noqa: PTH110 (likewise)
        raise CheckpointError(
            f"checkpoint {name} is a file; expected a directory with {', '.join(_PARTS)} in it (diffusers layout)"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise CheckpointError(
            f"checkpoint {name!r} is no directory that this user can see, nor a hub id (owner/name, "
            f"owner/name@revision), nor {DEMO!r}: check the path, and its permissions"
        )
    from huggingface_hub import snapshot_download

    try:
        # Safetensors alone: neither pickles nor the half-precision copies beside them are fetched.
        wanted = ["model_index.json", DESCRIPTION_FILE, "*/*.json", "*/*.txt", "*/*.safetensors"]
        hub_id, _, revision = name.partition("@")
        got = snapshot_download(hub_id, revision=revision or None, allow_patterns=wanted, ignore_patterns=[*_VARIANTS])
        return Path(got)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {name} is no directory here, and could not be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); "
            "check the name and the network, or download it elsewhere and give its directory"
        ) from error


def _files(name: str, directory: Path) -> list[Path]:
    """The files of a checkpoint that are used, sorted; checked to be complete and safe."""
    parts = _parts(directory)
    missing = [part for part in parts if not (directory / part).is_dir()]
    if missing or not (directory / "model_index.json").is_file():
        what = ", ".join([*missing, *([] if (directory / "model_index.json").is_file() else ["model_index.json"])])
        raise CheckpointError(
            f"checkpoint {name} lacks {what}; expected a directory in diffusers layout with {', '.join(parts)} and "
            f"model_index.json: {directory} holds something else, or was not copied whole"
        )
    used = {part: [path for path in (directory / part).iterdir() if not _is_variant(path)] for part in parts}
    for part in parts:
        if part not in _WITHOUT_WEIGHTS and not any(path.suffix == ".safetensors" for path in used[part]):
            raise CheckpointError(f"checkpoint {name}: {part}/ holds {_instead_of_weights(directory / part)}")
        for path in used[part]:
            if path.exists() and not (path.is_file() or path.is_dir()):  # to read it might never end
                raise CheckpointError(
                    f"checkpoint {name}: {part}/{path.name} is a pipe or a device; expected a file: copy it here"
                )
            if path.suffix == ".safetensors":
                _check_whole(name, path)
    wanted = [directory / "model_index.json", directory / DESCRIPTION_FILE, *chain.from_iterable(used.values())]
    return sorted(path for path in wanted if path.suffix in (".json", ".txt", ".safetensors") and path.is_file())


def _check_whole(name: str, path: Path) -> None:
    """Refuse weights that are not as long as their header says; nothing of them is read."""
    try:
        with path.open("rb"), safe_open(path, "numpy"):  # which says of any that it cannot open that it is not there
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {name}: {path.parent.name}/{path.name} cannot be read ({error}); expected safetensors, "
            "copied whole: copy, or download, it again"
        ) from error


def _is_variant(path: Path) -> bool:
    return any(map(path.match, _VARIANTS))


def _instead_of_weights(folder: Path) -> str:
    """What a part has that has no weights to use, what was expected, and the remedy."""
    names = sorted(path.name for path in folder.iterdir())
    if copies := [name for name in names if name.endswith(".safetensors")]:
        variant = copies[0].split(".")[1].partition("-")[0]
        return (
            f"only {', '.join(copies)}, copies in half precision or of another kind; expected the weights themselves: "
            f"load it with diffusers, variant={variant!r}, and save_pretrained"
        )
    pickles = [name for name in names if name.endswith(_PICKLES)]
    found = f"only {', '.join(pickles)}, a pickle, which can run code when opened" if pickles else "no weights"
    return (
        f"{found}; expected .safetensors, and not half-precision copies (*.fp16.*) alone: load it with diffusers where "
        "you trust it, and save_pretrained(..., safe_serialization=True)"
    )


def _may_be_e2e(directory: Path, index: dict[str, Any]) -> bool:
    """Whether an estimator lies here as Stable Diffusion, as E2E-FT's trainer saves it."""
    if index.get("_class_name") != "StableDiffusionPipeline":
        return False
    return bool(read_json(directory / "unet" / "config.json").get("in_channels") == 8)


def _is_described(name: str, directory: Path) -> bool:
    """Whether it is known where its normals point."""
    return "normals_axes" in _said(directory) or _published(name, directory) is not None


def _describe(name: str, directory: Path, index: dict[str, Any]) -> Description:
    """What a checkpoint says of itself, over what is known of it or of its kind."""
    declared = index.get("prediction_type")
    kind = replace(
        _JOINT if _parts(directory) == _JOINT_PARTS else Description(clip_normals=not _may_be_e2e(directory, index)),
        modality=declared if declared in ("depth", "normals") else None,
    )
    known = replace(_published(name, directory) or kind, full_z_range=bool(index.get("use_full_z_range", True)))
    try:
        described = replace(known, **_said(directory))
        axes_signs(described.normals_axes)
    except (ValidationError, ConfigError) as error:
        wrong = str(error)
        if isinstance(error, ValidationError):
            wrong = "; ".join(f"{item['loc'][0]}: {item['msg']} (got {item['input']!r})" for item in error.errors())
        raise CheckpointError(
            f"{directory / DESCRIPTION_FILE}: {wrong}; expected keys of {sorted(Description().__dict__)}, each as "
            "README.md has it: correct it"
        ) from error
    return described


def _said(directory: Path) -> dict[str, Any]:
    """The description beside a checkpoint, unchecked; empty where there is none."""
    path = directory / DESCRIPTION_FILE
    return read_json(path) if path.is_file() else {}


def _published(name: str, directory: Path) -> Description | None:
    """Of a known checkpoint: asked for by its hub id, in the hub's cache, or, of E2E-FT's, in a directory of its name.

    Other names say too little: Marigold's own normals as well as E2E-FT's may lie in one called `marigold-normals`.
    """
    names = {name.partition("@")[0].casefold(), *(part.casefold() for part in directory.parts)}  # as the hub has it
    for known, description in _PUBLISHED.items():
        if names & {known.casefold(), f"models--{known.replace('/', '--')}".casefold()}:
            return description
        if "e2e-ft" in known and directory.name.casefold() == known.split("/")[1].casefold():
            if description.modality == "normals" and "normals_axes" not in _said(directory):
                _warn(
                    f"checkpoint {name} is taken for a copy of {known} by its directory's name: normals have axes "
                    f"{description.normals_axes}; --normals-axes or a {DESCRIPTION_FILE} in it says otherwise"
                )
            return description
    return None


@cache  # a run opens its checkpoints several times
def _warn(message: str) -> None:
    log.warning("%s", message)


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of a part's weights; their files' headers are read, no more."""
    shapes = dict[str, list[int]]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def count_weights(checkpoints: Iterable[Checkpoint]) -> int:
    """How many numbers the parts have that see each picture: not the prompt's, which is encoded once."""
    folders = [checkpoint.directory for checkpoint in checkpoints]
    parts = [folder / part for folder in folders for part in _parts(folder) if part != "text_encoder"]
    return sum(prod(shape) for part in parts for shape in weight_shapes(part).values())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a checkpoint's JSON file, or a `CheckpointError` that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content
