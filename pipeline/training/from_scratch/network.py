"""The network that is trained: one VAE, one UNet for both modalities, and the constants of the single step.

The UNet answers with both latents, one behind the other, for the price of one. A checkpoint has a UNet for each
modality: they are the same in all but the last convolution, each with its half of the trained one's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.blocks import ChannelsLastNorm, Upsampling, replace, use_channels_last_norms
from depthmill.pipeline.model.checkpoint import Description, open_checkpoint
from depthmill.pipeline.model.modules import empty_prompt, load_text, load_unet, load_vae
from depthmill.pipeline.model.scratch import Architecture, Parts
from depthmill.pipeline.model.single_step import x0_factor
from depthmill.pipeline.types import Modality

MODALITIES: tuple[Modality, ...] = ("depth", "normals")

_LARGEST = 2.0  # how many times their first size queries' and keys' weights may have
_OWN = ("conv_out.weight", "conv_out.bias")  # of which each modality has its own


@dataclass(frozen=True, eq=False)
class Network:
    """Modules of both checkpoints.

    Attributes:
        modules: `vae`, and `unet`, which answers with the latents of `MODALITIES`, in this order.
        parts: What else a checkpoint is made of.
        prompt: (1, tokens, cross_attention_dim) the empty prompt's embedding.
        timestep: () int64, the last one.
        x0_factor: From the UNet's answer there to x0.
    """

    modules: torch.nn.ModuleDict
    parts: Parts
    prompt: Tensor
    timestep: Tensor
    x0_factor: float

    def encode(self, picture: Tensor) -> Tensor:
        """Mean of the VAE's latents, scaled: (B, 3, H, W) in [-1, 1] -> (B, latent channels, h, w).

        H and W are multiples of what the architecture divides by.
        """
        vae = self.parts.vae
        latent: Tensor = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Inverse of `encode`; what comes out is not clipped."""
        vae = self.parts.vae
        picture: Tensor = vae.decode(latent / vae.config.scaling_factor).sample
        return picture

    def step(self, latent: Tensor) -> Tensor:
        """One step at the last time step with zero noise: pictures' latents (B, C, h, w) to answers' (2B, C, h, w)."""
        prompt = self.prompt.expand(latent.shape[0], -1, -1)
        v = self.parts.unet(torch.cat([latent, torch.zeros_like(latent)], 1), self.timestep, prompt).sample
        answer: Tensor = self.x0_factor * v
        return torch.cat(answer.chunk(len(MODALITIES), dim=1))

    def answers(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What `step`'s latents (2B, C, h, w) are decoded to.

        Returns:
            Depth (B, H, W), near -1 and far +1, not clipped; normals (B, 3, H, W), of any length.
        """
        depth, normals = self.decode(latents).chunk(2)
        return depth.mean(1), normals

    @torch.no_grad()
    def hold_attention(self) -> None:
        """Bring queries' and keys' weights that have outgrown it back to `_LARGEST` times the size they began with.

        Larger, attention becomes all or nothing, and its gradient noise where two places tie.
        """
        for module in self.parts.unet.modules():
            if isinstance(module, Attention):
                for layer in (module.to_q, module.to_k):
                    # Of torch's first weights the squares of a row add up to 1/3.
                    largest = _LARGEST * (layer.out_features / 3) ** 0.5
                    layer.weight.mul_((largest / layer.weight.norm()).clamp(max=1))

    def save(self, directory: Path, *, processing_resolution: int, dtype: torch.dtype) -> None:
        """Write `depth/` and `normals/`, two checkpoints with one and the same VAE."""
        for index, modality in enumerate(MODALITIES):
            scratch.save(
                dataclasses.replace(self.parts, unet=self._unet(index)),
                directory / modality,
                modality,
                processing_resolution=processing_resolution,
                dtype=dtype,
                description=Description(clip_normals=False),  # the mean angle says nothing of their length
            )

    def load(self, name: str) -> None:
        """Take over the weights of a pair of checkpoints that `save` has written.

        Args:
            name: `demo`, or the folder with `depth/` and `normals/`.

        Raises:
            CheckpointError: If one of them cannot be loaded.
            TrainingError: If they are of another architecture, or were not trained as one network.
        """
        pair = [open_checkpoint(name if name == "demo" else str(Path(name) / m), m) for m in MODALITIES]
        weights, others = (load_unet(checkpoint).state_dict() for checkpoint in pair)
        for key, value in weights.items():
            if key in _OWN:
                weights[key] = torch.cat([value, others[key]])
            elif key not in others or not torch.equal(value, others[key]):
                raise TrainingError(
                    f"start is {name}, whose two UNets differ in {key}; expected a pair trained as one network: "
                    "the checkpoint folder of a run with stages"
                )
        try:
            self.parts.unet.load_state_dict(weights)
            self.parts.vae.load_state_dict(load_vae(pair[0]).state_dict())
            self.parts.text_encoder.load_state_dict(load_text(pair[0])[1].state_dict())
        except RuntimeError as error:
            raise TrainingError(
                f"start is {name}, which does not fit the run's architecture "
                f"({str(error).splitlines()[1].strip():.200}); "
                "expected the same: see the config.json of its unet and vae"
            ) from error
        self.prompt.copy_(empty_prompt(pair[0]))

    def _unet(self, index: int) -> UNet2DConditionModel:
        """The UNet of one modality alone."""
        both = self.parts.unet
        channels = both.config["out_channels"] // len(MODALITIES)
        one = UNet2DConditionModel.from_config({**both.config, "out_channels": channels})
        weights = both.state_dict()
        for name in _OWN:
            weights[name] = weights[name][index * channels : (index + 1) * channels]
        one.load_state_dict(weights)
        return one


class TurnedNorm(nn.Module):
    """`GroupNorm` for a CPU, of pictures whose channels lie last: torch's is ten times as fast where they lie first.

    So pictures are turned for it, and turned back: nothing else is to meet two layouts at once, which is slow, too.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        answer: Tensor = _Turned.apply(x, self.weight, self.bias, self.groups, self.eps)  # type: ignore[no-untyped-call]
        return answer


class _Turned(torch.autograd.Function):
    """Its own function, since a gradient that is turned by torch's own stays as it was turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        sizes = (len(x), x.shape[1], x.shape[2] * x.shape[3], groups)
        y, mean, scale = torch.native_group_norm(x, weight, bias, *sizes, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.sizes = sizes
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_x, *others = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(), *ctx.saved_tensors, *ctx.sizes, [True, True, True]
        )
        return of_x.contiguous(memory_format=torch.channels_last), *others, None, None


def build(architecture: Architecture, seed: int, device: torch.device) -> Network:
    """Make a network with random weights, in training mode; all but the text encoder is trained."""
    parts = scratch.build(architecture, seed=seed, out_channels=len(MODALITIES) * architecture.latent_channels)
    modules = torch.nn.ModuleDict({"vae": parts.vae, "unet": parts.unet}).to(device)
    replace(modules, Upsample2D, Upsampling)  # diffusers' lays large batches out anew
    # What tensor cores want, and oneDNN: convolutions of few channels are differentiated up to five times as fast.
    use_channels_last_norms(modules, ChannelsLastNorm if device.type == "cuda" else TurnedNorm)
    modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    tokens = torch.tensor([parts.tokenizer("").input_ids])
    with torch.no_grad():
        prompt = parts.text_encoder(tokens).last_hidden_state.to(device)
    last = torch.tensor(parts.scheduler.config.num_train_timesteps - 1, device=device)
    return Network(modules.train(), parts, prompt, last, x0_factor(parts.scheduler))
