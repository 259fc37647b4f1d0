"""Work: what a network must compute, and how fast this machine multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from depthmill.pipeline.model.checkpoint import Checkpoint
from depthmill.pipeline.model.hashes import hash_files
from depthmill.pipeline.model.modules import vae_factor

_MATRIX = {"cpu": 2048, "cuda": 8192}  # rows: large enough that more are no faster
_MATMULS = {"cpu": 10, "cuda": 50}  # the first few after something else are slower: of 2, half the rate of 10 on AMX


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one picture, a multiplication and an addition being two.

    Attributes:
        encode: Of the VAE's encoder.
        unet: Of one UNet call.
        decode: Of the VAE's decoder.
    """

    encode: int
    unet: int
    decode: int


def network_flops(
    vae: dict[str, Any], unet: dict[str, Any], height: int, width: int, *, prompt_tokens: int = 2
) -> Flops:
    """Count the matrix products and convolutions of one picture in one step, of the network as it is published.

    Args:
        vae: Config of the autoencoder.
        unet: Config of the UNet.
        height: Of the picture as the network sees it, padding included, pixels.
        width: The same.
        prompt_tokens: Of the empty prompt.
    """
    with torch.device("meta"), torch.inference_mode():
        coder = AutoencoderKL.from_config(vae)
        denoiser = UNet2DConditionModel.from_config(unet)
        factor = vae_factor(coder)
        size = (height // factor, width // factor)
        latent = torch.empty(1, denoiser.config.in_channels, *size)
        prompt = torch.empty(1, prompt_tokens, denoiser.config.cross_attention_dim)
        return Flops(
            encode=_count(lambda: coder.encode(torch.empty(1, 3, height, width))),
            unet=_count(lambda: denoiser(latent, torch.tensor(0), encoder_hidden_states=prompt)),
            decode=_count(lambda: coder.decode(torch.empty(1, coder.config.latent_channels, *size))),
        )


def label_flops(checkpoints: Sequence[Checkpoint], height: int, width: int) -> int:
    """Operations that the labels of one picture need: an encoder whose files are the same is counted once.

    Args:
        checkpoints: None of them joint.
        height: As for `network_flops`.
        width: The same.
    """
    encoders: dict[str, int] = {}
    total = 0
    for checkpoint in checkpoints:
        one = network_flops(
            AutoencoderKL.load_config(checkpoint.directory / "vae"),
            UNet2DConditionModel.load_config(checkpoint.directory / "unet"),
            height,
            width,
            prompt_tokens=77 if checkpoint.description.prompt_padding == "max_length" else 2,
        )
        vae = checkpoint.directory / "vae"
        encoders[hash_files(vae, sorted(vae.glob("*.safetensors")))] = one.encode
        total += one.unet + one.decode
    return total + sum(encoders.values())


def matmuls(device: torch.device, dtype: torch.dtype) -> Callable[[], int]:
    """Something that multiplies large square matrices, and returns the operations that this took."""
    rows, times = (sizes.get(device.type, sizes["cpu"]) for sizes in (_MATRIX, _MATMULS))
    one, other = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(one)

    def multiply() -> int:
        for _ in range(times):
            torch.mm(one, other, out=result)
        return 2 * rows**3 * times

    return multiply


def _count(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
