"""Small checkpoints of the Stable-Diffusion architecture, made from nothing, in the published diffusers layout.

The one place that knows how such a checkpoint is put together and written: training starts from `build` and ends in
`save`; tests and benchmarks use `create`. What is written loads in diffusers' own `MarigoldDepthPipeline` and
`MarigoldNormalsPipeline`.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    MarigoldDepthPipeline,
    MarigoldNormalsPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from pydantic import model_validator
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from depthmill.pipeline.config import StrictModel
from depthmill.pipeline.model.checkpoint import DESCRIPTION_FILE, Description
from depthmill.pipeline.types import Modality

PredictionType = Literal["v_prediction", "epsilon", "sample"]

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_VOCABULARY = {_BOS: 0, _EOS: 1}


class Architecture(StrictModel):
    """Sizes of a VAE and a UNet that fit together; the defaults make a network of a few hundred thousand weights.

    Attributes:
        vae_channels: Channels of each VAE level, full resolution first. L levels make latents 2^(L-1) times smaller.
        vae_layers: Residual blocks of a VAE level (the decoder has one more).
        vae_attention: Whether the VAE has self-attention at its lowest level, as Stable Diffusion's does.
        latent_channels: Channels of a latent.
        scaling_factor: Multiplies a latent on its way into the UNet: 1 over the standard deviation of latents.
        unet_channels: Channels of each UNet level, latent resolution first.
        unet_layers: Residual blocks of a UNet level (the way up has one more).
        unet_attention: For each UNet level, whether it attends to itself and to the prompt.
        head_channels: Channels of one attention head.
        cross_attention_dim: Length of a prompt token's embedding.
        norm_groups: Groups of every group norm; must divide every number of channels.
    """

    vae_channels: tuple[int, ...] = (16, 32, 32)
    vae_layers: int = 1
    vae_attention: bool = True
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    unet_channels: tuple[int, ...] = (32, 64)
    unet_layers: int = 1
    unet_attention: tuple[bool, ...] = (False, True)
    head_channels: int = 16
    cross_attention_dim: int = 32
    norm_groups: int = 8

    @model_validator(mode="after")
    def _sizes_fit(self) -> Architecture:
        if len(self.unet_attention) != len(self.unet_channels):
            raise ValueError(
                f"unet_attention has {len(self.unet_attention)} entries for {len(self.unet_channels)} unet_channels: "
                "give one for each level"
            )
        for channels in (*self.vae_channels, *self.unet_channels):
            if channels % self.norm_groups:
                raise ValueError(f"{channels} channels cannot be split into norm_groups={self.norm_groups}")
        for channels in self.unet_channels:
            if channels % self.head_channels:
                raise ValueError(f"{channels} UNet channels cannot be split into heads of {self.head_channels}")
        return self

    @property
    def vae_factor(self) -> int:
        """How many times smaller than the picture a latent is."""
        return int(2 ** (len(self.vae_channels) - 1))


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of one checkpoint.

    Attributes:
        unet: Denoiser; its input is [rgb latent, noisy latent] (`in_channels` 8) or the latent alone (4).
        vae: Autoencoder of pictures and of depth or normals drawn as pictures.
        scheduler: Noise schedule and the meaning of the UNet's output.
        text_encoder: Embeds the prompt, which is always the empty one.
        tokenizer: Makes (begin, end) of the empty prompt.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def build(
    architecture: Architecture,
    *,
    seed: int,
    prediction_type: PredictionType = "v_prediction",
    in_channels: int | None = None,
    out_channels: int | None = None,
) -> Parts:
    """Make a checkpoint's modules with random weights, float32, in eval mode.

    Args:
        architecture: Sizes.
        seed: Of the weights; torch's global generator is left as it was.
        prediction_type: What the UNet's output means to the scheduler.
        in_channels: Of the UNet; by default twice the latent's: [rgb latent, noisy latent], as Marigold has it.
        out_channels: Of the UNet; by default the latent's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = build_unet(architecture, in_channels=in_channels, out_channels=out_channels)
        vae = build_vae(architecture)
        text_encoder = _build_text_encoder(architecture)
    return Parts(
        unet=unet.eval(),
        vae=vae.eval(),
        scheduler=build_scheduler(prediction_type),
        text_encoder=text_encoder.eval(),
        tokenizer=_build_tokenizer(),
    )


def build_unet(
    architecture: Architecture, *, in_channels: int | None = None, out_channels: int | None = None
) -> UNet2DConditionModel:
    """Make a UNet with random weights from torch's global generator."""
    a = architecture
    return UNet2DConditionModel(
        in_channels=in_channels or 2 * a.latent_channels,
        out_channels=out_channels or a.latent_channels,
        block_out_channels=a.unet_channels,
        layers_per_block=a.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in a.unet_attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(a.unet_attention)),
        # diffusers' `attention_head_dim` is, by an old misnomer that SD 2's config relies on, the number of heads.
        attention_head_dim=tuple(channels // a.head_channels for channels in a.unet_channels),
        cross_attention_dim=a.cross_attention_dim,
        norm_num_groups=a.norm_groups,
        use_linear_projection=True,
    )


def build_vae(architecture: Architecture) -> AutoencoderKL:
    """Make an autoencoder with random weights from torch's global generator."""
    a = architecture
    levels = len(a.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=a.latent_channels,
        block_out_channels=a.vae_channels,
        layers_per_block=a.vae_layers,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=a.norm_groups,
        mid_block_add_attention=a.vae_attention,
        scaling_factor=a.scaling_factor,
    )


def build_scheduler(prediction_type: PredictionType = "v_prediction") -> DDIMScheduler:
    """Stable Diffusion 2's noise schedule, with the paper's `trailing` time steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


def _build_text_encoder(architecture: Architecture) -> CLIPTextModel:
    width = architecture.cross_attention_dim
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=2,
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _build_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_VOCABULARY, merges=[], pad_token=_EOS, model_max_length=77)


def save(
    parts: Parts,
    directory: Path,
    modality: Modality | None,
    *,
    processing_resolution: int,
    dtype: torch.dtype = torch.float32,
    description: Description | None = None,
) -> None:
    """Write a checkpoint: `unet/ vae/ scheduler/ tokenizer/ text_encoder/ model_index.json`, safetensors.

    Args:
        parts: Modules; left as they are, whatever `dtype` is.
        directory: Made if it does not exist; files of the same names are replaced.
        modality: What the checkpoint answers; None makes a Stable Diffusion one, which answers nothing yet.
        processing_resolution: Longer side, in pixels, that pictures are resized to unless the user says otherwise.
        dtype: Of the weights on disk.
        description: What the files do not say: `depthmill.json` is written where it is not what would be assumed, and
            beside normals always. Left out, all as it would be assumed.
    """
    modules: dict[str, Any] = {
        "unet": cast(parts.unet, dtype),
        "vae": cast(parts.vae, dtype),
        "text_encoder": cast(parts.text_encoder, dtype),
        "scheduler": parts.scheduler,
        "tokenizer": parts.tokenizer,
    }
    extra = {
        "default_denoising_steps": 1,
        "default_processing_resolution": processing_resolution,
        "prediction_type": modality,
    }
    if modality == "depth":
        pipeline = MarigoldDepthPipeline(**modules, **extra, scale_invariant=True, shift_invariant=True)
    elif modality == "normals":
        pipeline = MarigoldNormalsPipeline(**modules, **extra, use_full_z_range=True)
    else:
        pipeline = StableDiffusionPipeline(
            **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    directory.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(directory, safe_serialization=True)
    # Transformers 5 writes `tokenizer.json` alone; older versions write, and read, the two files that it is made from.
    if (fast := getattr(parts.tokenizer, "backend_tokenizer", None)) is not None:
        fast.model.save(str(directory / "tokenizer"))  # vocab.json, merges.txt
    # Transformers from 5.6 on leaves out the prefix that older versions, and published checkpoints, have.
    text = {
        f"text_model.{key.removeprefix('text_model.')}": weight
        for key, weight in modules["text_encoder"].state_dict().items()
    }
    save_file(text, directory / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    for weights in directory.glob("*/*.safetensors"):  # safetensors' are for their owner alone, whatever the umask
        weights.chmod((weights.parent / "config.json").stat().st_mode)
    told, assumed = description or Description(), Description()
    said: dict[str, Any] = {}
    if modality == "normals":
        said |= {"normals_axes": told.normals_axes, "clip_normals": told.clip_normals}
    if told.prompt_padding != assumed.prompt_padding:
        said |= {"prompt_padding": told.prompt_padding}
    if said:
        (directory / DESCRIPTION_FILE).write_text(json.dumps(said, indent=2) + "\n")


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A module with weights of a dtype: itself if it has, else a copy."""
    # Module.to itself: diffusers' own warns that some models, which these are not, have parts to keep in float32.
    return module if module.dtype == dtype else torch.nn.Module.to(deepcopy(module), dtype)


def create(
    directory: Path,
    architecture: Architecture,
    modality: Modality,
    *,
    seed: int,
    prediction_type: PredictionType = "v_prediction",
    in_channels: int | None = None,
    processing_resolution: int = 128,
) -> None:
    """Write a checkpoint with random weights, float32: `build`, then `save`."""
    parts = build(architecture, seed=seed, prediction_type=prediction_type, in_channels=in_channels)
    save(parts, directory, modality, processing_resolution=processing_resolution)
