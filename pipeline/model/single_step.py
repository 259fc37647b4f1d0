"""The network: one UNet call at the last time step, zero noise, between the VAE's encoder and decoder.

Martin Garcia et al., "Fine-Tuning Image-Conditional Diffusion Models is Easier than You Think" (WACV 2025), §3 and 4:
with `trailing` time steps the single step is asked at t = T - 1, where the zero latent is what it claims to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from depthmill.pipeline.errors import CheckpointError
from depthmill.pipeline.geometry import axes_signs
from depthmill.pipeline.model.blocks import use_shrinking
from depthmill.pipeline.model.checkpoint import DESCRIPTION_FILE, Checkpoint, Description, read_json
from depthmill.pipeline.model.modules import (
    check_fit,
    empty_prompt,
    load_scheduler,
    load_unet,
    load_vae,
    same,
    vae_factor,
    vae_width,
)
from depthmill.pipeline.types import Modality


def x0_factor(scheduler: DDIMScheduler) -> float:
    """What the UNet's output is multiplied by to give x0 when the noisy latent is zero, at the last time step.

    With ā = ᾱ_{T-1} and x_t = 0 (Salimans & Ho 2022, appendix D): v-prediction gives x0 = -sqrt(1 - ā)·v, ε-prediction
    x0 = -sqrt((1 - ā)/ā)·ε, and `sample` is x0 itself.
    """
    alpha = float(scheduler.alphas_cumprod[-1])
    match scheduler.config.prediction_type:
        case "v_prediction":
            return float(-((1 - alpha) ** 0.5))
        case "epsilon":
            return float(-(((1 - alpha) / alpha) ** 0.5))
        case _:
            return 1.0


def decode_depth(decoded: torch.Tensor) -> torch.Tensor:
    """Depth of a decoded picture.

    Args:
        decoded: (B, 3, H, W), the VAE decoder's output.

    Returns:
        (B, 1, H, W) in [0, 1], 0 near and 1 far: the mean of the channels, clipped to [-1, 1] and mapped. No picture is
        rescaled by its own range.
    """
    return (decoded.mean(dim=1, keepdim=True).clip(-1, 1) + 1) / 2


def decode_normals(decoded: torch.Tensor, description: Description) -> torch.Tensor:
    """Normals of a decoded picture.

    Args:
        decoded: (B, 3, H, W), the VAE decoder's output.
        description: The checkpoint's: clipping, z range and axes.

    Returns:
        (B, 3, H, W) unit vectors, x right, y up, z towards the viewer; zero where the decoder said zero.
    """
    if description.clip_normals:
        decoded = decoded.clip(-1, 1)
    if not description.full_z_range:
        decoded = torch.cat([decoded[:, :2], decoded[:, 2:] * 0.5 + 0.5], dim=1)
    vectors = unit(decoded)
    # No product with a tensor of the three signs: to send that to a GPU is to wait until all before it is done there.
    for axis, sign in enumerate(axes_signs(description.normals_axes)):
        if sign < 0:
            vectors[:, axis].neg_()
    return vectors


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Divide (..., 3, H, W) vectors by their length, or by 1e-6 if that is more."""
    # torch's own norm over this axis is 10 times slower on a CPU: a fifth of a small model's whole time.
    return vectors / (vectors * vectors).sum(dim=-3, keepdim=True).sqrt().clamp(min=1e-6)


@dataclass(frozen=True, eq=False)
class Head:
    """What one modality adds to the encoder: everything after the picture's latent."""

    modality: Modality
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    prompt: torch.Tensor  # (1, tokens, width)
    scheduler: DDIMScheduler
    timestep: int
    x0_factor: float
    x0_clip: float | None
    description: Description

    @property
    def takes_noise(self) -> bool:
        """Whether the UNet is given [picture, noisy label], not the picture's latent alone."""
        return bool(self.unet.config.in_channels == 2 * self.unet.config.out_channels)


def load_heads(checkpoints: Sequence[Checkpoint]) -> list[Head]:
    """Load one or two checkpoints, of different modalities, float32, on the CPU; bit-equal VAEs are kept once.

    Raises:
        CheckpointError: If one cannot be loaded, its UNet wants more than a time step and a prompt, or the two need
            pictures padded to different multiples.
    """
    heads = [_load(checkpoint) for checkpoint in checkpoints]
    if len(heads) == 2 and same(heads[0].vae, heads[1].vae):
        heads[1] = replace(heads[1], vae=heads[0].vae)
    factors = {vae_factor(head.vae) for head in heads}
    if len(factors) != 1:
        raise CheckpointError(
            f"the VAEs of {' and '.join(checkpoint.name for checkpoint in checkpoints)} shrink pictures by "
            f"{sorted(factors)}; expected one factor: label depth and normals in two runs"
        )
    return heads


def _load(checkpoint: Checkpoint) -> Head:
    scheduler = load_scheduler(checkpoint)
    vae, unet, prompt = load_vae(checkpoint), load_unet(checkpoint), empty_prompt(checkpoint)
    kind, channels = read_json(checkpoint.directory / "model_index.json").get("_class_name"), unet.config.in_channels
    unsaid = checkpoint.description.modality is None and "Marigold" not in str(kind)  # a custom one's is a list
    if unsaid and channels == unet.config.out_channels:
        raise CheckpointError(
            f"{checkpoint.name} is a text-to-image model by its files (model_index.json: {kind}, a UNet of {channels} "
            f"channels); expected one fine-tuned to answer {checkpoint.modality}: `depthmill train` does that; "
            f"if it was done, say so in {DESCRIPTION_FILE} beside model_index.json: "
            f'{{"modality": "{checkpoint.modality}"}}'
        )
    check_fit(checkpoint, unet, vae, prompt)
    return Head(
        modality=checkpoint.modality,
        vae=vae,
        unet=unet,
        prompt=prompt,
        scheduler=scheduler,
        timestep=scheduler.config.num_train_timesteps - 1,
        x0_factor=x0_factor(scheduler),
        x0_clip=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        description=checkpoint.description,
    )


class SingleStep(torch.nn.Module):
    """Depth, normals or both of a batch of pictures, in one UNet call each, by diffusers' modules as they are.

    What `specialize.py` must equal, and what runs where the UNet is asked more than once, or has parts that it does not
    know.

    Args:
        heads: What `load_heads` loaded.
        device: Where the weights live.
        dtype: Of the network; labels are finished in float32 whatever it is.
    """

    def __init__(self, heads: Sequence[Head], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.encoders = list({id(head.vae): head.vae for head in heads}.values())
        self.factor = vae_factor(heads[0].vae)
        self.width = max(vae_width(vae) for vae in self.encoders)
        # Channels last is what tensor cores want; on CPUs it measured no faster.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        modules = [*self.encoders, *(head.unet for head in heads)]
        self.networks = torch.nn.ModuleList(modules).to(device, dtype)
        self.networks.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's stub lacks it
        use_shrinking(self.networks, device, dtype)
        self.heads = [replace(head, prompt=head.prompt.to(device, dtype)) for head in heads]
        self.dtype = dtype

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor) -> dict[Modality, torch.Tensor]:
        """Label a batch.

        Args:
            pictures: (B, 3, h, w) float32 in [-1, 1], both sides multiples of `factor`.

        Returns:
            For each modality (B, C, h, w) float32: depth C = 1 in [0, 1]; normals C = 3, unit, in the stored axes.
        """
        latents = self.encode(pictures)
        return {head.modality: self.decode(head, self._x0(head, latents[head.modality])) for head in self.heads}

    def encode(self, pictures: torch.Tensor) -> dict[Modality, torch.Tensor]:
        """Pictures (B, 3, h, w) to each head's scaled latents (B, latent, h/factor, w/factor); each VAE runs once."""
        pictures = pictures.to(self.dtype, memory_format=self.layout)
        latents = {
            id(vae): vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor for vae in self.encoders
        }
        return {head.modality: latents[id(head.vae)] for head in self.heads}

    @staticmethod
    def decode(head: Head, x0: torch.Tensor) -> torch.Tensor:
        """A head's scaled latents (B, latent, h/factor, w/factor) to its labels (B, C, h, w), as `forward` has them."""
        decoded = head.vae.decode(x0 / head.vae.config.scaling_factor).sample.float()  # (B, 3, h, w)
        return decode_depth(decoded) if head.modality == "depth" else decode_normals(decoded, head.description)

    @staticmethod
    def _x0(head: Head, latent: torch.Tensor) -> torch.Tensor:
        out = head.unet(
            torch.cat([latent, latent.new_zeros(latent.shape)], dim=1) if head.takes_noise else latent,
            head.timestep,
            encoder_hidden_states=head.prompt.expand(len(latent), -1, -1),
        ).sample
        x0: torch.Tensor = out * head.x0_factor
        return x0 if head.x0_clip is None else x0.clip(-head.x0_clip, head.x0_clip)
