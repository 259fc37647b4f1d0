"""What a run starts from, and what it leaves: checkpoints in diffusers layout, before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.checkpoint import Description, open_checkpoint
from depthmill.pipeline.model.modules import check_fit, empty_prompt, load_scheduler, load_text, load_unet, load_vae
from depthmill.pipeline.model.scratch import Parts
from depthmill.pipeline.training.config import TrainConfig


@dataclass(frozen=True, eq=False)
class Start:
    """An estimator that is to be trained.

    Attributes:
        parts: Its modules, float32, on the CPU.
        prompt: (1, tokens, width) the empty prompt's embedding.
        description: Whose axes ground-truth normals are turned to, and how the prompt was tokenised: both stay its own.
    """

    parts: Parts
    prompt: Tensor
    description: Description


def load(config: TrainConfig) -> Start:
    """Open what the run starts from, with a `conv_in` as wide as the objective needs.

    Raises:
        CheckpointError: If the checkpoint cannot be loaded.
        TrainingError: If it takes something that the objective does not give.
    """
    if config.start is None:
        assert config.architecture is not None
        latent = config.architecture.latent_channels
        pictures_alone = config.objective in ("autoencoder", "generative")
        parts = scratch.build(
            config.architecture, seed=config.seed, in_channels=latent if pictures_alone else 2 * latent
        )
        with torch.no_grad():
            prompt = parts.text_encoder(torch.tensor([parts.tokenizer("").input_ids])).last_hidden_state
        return Start(parts, prompt, Description())
    checkpoint = open_checkpoint(config.start, config.modality)
    if checkpoint.domain is not None:
        raise TrainingError(
            f"{config.start} answers depth and normals together, from more than a picture (GeoWizard), which is not "
            "trained here: start from Stable Diffusion, or from an estimator of either"
        )
    tokenizer, text_encoder = load_text(checkpoint)
    parts = Parts(load_unet(checkpoint), load_vae(checkpoint), load_scheduler(checkpoint), text_encoder, tokenizer)
    prompt = empty_prompt(checkpoint)
    check_fit(checkpoint, parts.unet, parts.vae, prompt)
    wide = parts.unet.config.in_channels == 2 * parts.unet.config.out_channels
    if config.objective in ("diffusion", "end_to_end") and not wide:
        widen(parts.unet)
    elif config.objective == "generative" and wide:
        raise TrainingError(
            f"{config.start} takes {parts.unet.config.in_channels} channels, the picture's latent and another; "
            f"a generative checkpoint takes {parts.unet.config.out_channels}: start from Stable Diffusion, or from an "
            "architecture"
        )
    return Start(parts, prompt, checkpoint.description)


def widen(unet: UNet2DConditionModel) -> None:
    """Let a UNet that takes one latent take two, in place.

    Its `conv_in` weights are repeated for the second latent, and weights and bias halved, so that two equal latents are
    answered as one was, up to the bias: as E2E-FT's training code does (`training/util/unet_prep.py`; Marigold's halves
    the weights alone).
    """
    old = unet.conv_in
    new = torch.nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    new.weight = torch.nn.Parameter(old.weight.detach().repeat(1, 2, 1, 1) / 2)
    new.bias = torch.nn.Parameter(old.bias.detach() / 2)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)


def save(start: Start, directory: Path, config: TrainConfig) -> None:
    """Write the checkpoint: what `depthmill label` and diffusers load, with `trailing` time steps."""
    estimator = config.objective in ("diffusion", "end_to_end")
    changes: dict[str, Any] = {"timestep_spacing": "trailing"}
    if config.objective == "end_to_end":
        changes["clip_sample"] = False  # as it was trained
    scheduler = DDIMScheduler.from_config(start.parts.scheduler.config, **changes)
    scratch.save(
        replace(start.parts, scheduler=scheduler),
        directory,
        config.modality if estimator else None,
        processing_resolution=config.processing_resolution,
        dtype=getattr(torch, config.save_dtype),
        # The mean angle says nothing of the length of normals.
        description=replace(start.description, clip_normals=config.objective != "end_to_end"),
    )
