"""Diffusion estimators: labels drawn from noise by DDIM, in one or more steps, alone or as ensembles.

What the paper sets out from and repairs (Ke et al., "Repurposing Diffusion-Based Image Generators for Monocular Depth
Estimation", CVPR 2024; Martin Garcia et al., WACV 2025, §3): the picture's latent stays, the label's starts as noise
and is denoised in `steps` UNet calls. The schedule and its update are diffusers' `DDIMScheduler`, with η = 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from depthmill.pipeline.config import Noise, Sampling
from depthmill.pipeline.errors import CheckpointError, ConfigError
from depthmill.pipeline.model.ensemble import ensemble_depth, ensemble_normals
from depthmill.pipeline.model.single_step import Head, SingleStep
from depthmill.pipeline.types import Modality

_OCTAVES = 10


class Sampler:
    """Draws labels with the parts of a loaded network.

    Args:
        network: Whose VAEs and UNets are used.
        sampling: How.

    Raises:
        CheckpointError: If a UNet takes no noisy latent.
        ConfigError: If a schedule has fewer time steps than are asked for.
    """

    def __init__(self, network: SingleStep, sampling: Sampling):
        self._network = network
        self._sampling = sampling
        self._schedulers = {head.modality: _schedule(head, sampling) for head in network.heads}

    @torch.inference_mode()
    def __call__(
        self, pictures: torch.Tensor, sizes: Sequence[tuple[int, int]], keys: Sequence[str], batch_size: int
    ) -> tuple[dict[Modality, list[torch.Tensor]], list[torch.Tensor] | None]:
        """Label a batch. Each picture is encoded once, however many members its ensemble has.

        Args:
            pictures: (B, 3, h', w') float32 in [-1, 1], both sides multiples of the network's `factor`.
            sizes: (h, w) of each picture without its padding, on which ensembles are aligned.
            keys: One for each picture, of which its noise is drawn.
            batch_size: Most members, of whichever pictures, in one UNet call.

        Returns:
            For each modality B tensors (C, h, w) float32: depth C = 1 in [0, 1]; normals C = 3, unit, in the stored
            axes. And the uncertainty of depth, B (1, h, w) float32, if it was asked for and there is an ensemble.
        """
        latents = self._network.encode(pictures)
        answers: dict[Modality, list[torch.Tensor]] = {}
        uncertainty = None
        for head in self._network.heads:
            drawn = self._draw(head, latents[head.modality], keys, batch_size)  # (B, E, C, h', w')
            members = [frame[..., : size[0], : size[1]] for frame, size in zip(drawn, sizes, strict=True)]
            if self._sampling.ensemble == 1:
                answers[head.modality] = [frame[0] for frame in members]
            elif head.modality == "normals":
                answers["normals"] = [ensemble_normals(frame) for frame in members]
            else:
                pairs = [ensemble_depth(frame[:, 0]) for frame in members]
                answers["depth"] = [depth[None] for depth, _ in pairs]
                uncertainty = [spread[None] for _, spread in pairs]
        return answers, uncertainty

    def _draw(self, head: Head, latent: torch.Tensor, keys: Sequence[str], batch_size: int) -> torch.Tensor:
        sampling = self._sampling
        rows = [(frame, member) for frame in range(len(keys)) for member in range(sampling.ensemble)]
        drawn = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            rngs = [generator(sampling.seed, keys[frame], member, head.modality) for frame, member in batch]
            noise = torch.stack([draw_noise(sampling.noise, latent.shape[1:], rng) for rng in rngs])
            x0 = self._denoise(head, latent[[frame for frame, _ in batch]], noise.to(latent.device))
            drawn.append(self._network.decode(head, x0))
        members = torch.cat(drawn)
        return members.view(len(keys), sampling.ensemble, *members.shape[1:])

    def _denoise(self, head: Head, picture: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """x0 of `noisy`, (B, latent, h, w) float32, which stays so between the steps, whatever the network's dtype."""
        scheduler = self._schedulers[head.modality]
        x0 = noisy
        # Of some counts diffusers' rounding makes one more trailing step, at -1, as of 61: asked of nothing, left out.
        for t in (t for t in scheduler.timesteps.tolist() if t >= 0):
            both = torch.cat([picture, noisy.to(picture.dtype)], dim=1).contiguous(memory_format=self._network.layout)
            out = head.unet(both, t, encoder_hidden_states=head.prompt.expand(len(both), -1, -1)).sample
            step = scheduler.step(out.float(), t, noisy)
            noisy, x0 = step.prev_sample, step.pred_original_sample
        # Not `prev_sample`: where the schedule's final ᾱ is not 1, as in Stable Diffusion's, that is still noisy.
        return x0.to(picture.dtype)


def _schedule(head: Head, sampling: Sampling) -> DDIMScheduler:
    if not head.takes_noise:
        raise CheckpointError(
            f"the {head.modality} checkpoint's UNet takes {head.unet.config.in_channels} channels, the picture's "
            "latent alone, so that no label can be drawn from noise; expected one that takes the noisy latent too: use "
            "it in one step, trailing, with noise zeros and no ensemble (the defaults)"
        )
    return schedule(head.scheduler, sampling)


def schedule(scheduler: DDIMScheduler, sampling: Sampling) -> DDIMScheduler:
    """A checkpoint's schedule with the time steps that are asked for.

    Raises:
        ConfigError: If it has not so many.
    """
    scheduler = DDIMScheduler.from_config(scheduler.config, timestep_spacing=sampling.timestep_spacing)
    last = scheduler.config.num_train_timesteps - 1
    if sampling.steps <= last + 1:
        scheduler.set_timesteps(sampling.steps)
        if max(scheduler.timesteps) <= last:
            return scheduler
    raise ConfigError(
        f"steps is {sampling.steps}, {sampling.timestep_spacing}, of a schedule whose last time step is {last}; "
        f"expected at most {last}: lower steps (--steps of depthmill label)"
    )


def generator(seed: int, key: str, member: int, modality: Modality) -> torch.Generator:
    """A CPU generator of its own for each member of each frame: its noise depends on no other's, nor on the device.

    Of the seed, torch's CPU generator takes the low 32 bits: of 100,000 frames, one or two have another's noise.
    """
    digest = hashlib.blake2b(f"{seed}/{member}/{modality}/{key}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def draw_noise(kind: Noise, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """What one label's latent starts from.

    Args:
        kind: `zeros`; `gaussian`, standard normal; `pyramid`, see `pyramid_noise`.
        shape: (C, h, w) of the latent.
        generator: On the CPU.

    Returns:
        `shape` float32, on the CPU.
    """
    match kind:
        case "zeros":
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        case "gaussian":
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        case "pyramid":
            return pyramid_noise(shape, generator)


def pyramid_noise(shape: tuple[int, ...], generator: torch.Generator, discount: float = 0.9) -> torch.Tensor:
    """Multi-resolution noise, in which large structures are as strong as small ones, of unit variance.

    White noise, and on it octaves i = 0, 1, … of white noise of ever smaller size, enlarged bilinearly and weighed
    `discount`^i. An octave's sides are those of the one before divided by r^i, with r drawn from [2, 4) each time: the
    first is of full size. They end with the first that is one pixel high or wide. (Whitaker, "Multi-Resolution Noise
    for Diffusion Model Training", 2023; with these numbers in Marigold's `multi_res_noise_like` and E2E-FT's
    `pyramid_noise_like`, which divide by the deviation of the whole batch. Here it is the frame's own.)

    Args:
        shape: (C, h, w).
        generator: On the CPU.
        discount: Weight of an octave over that of the one before.

    Returns:
        `shape` float32, on the CPU.
    """
    channels, height, width = shape
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    for octave in range(_OCTAVES):
        shrink = (2 + 2 * torch.rand((), generator=generator, dtype=torch.float32, device="cpu").item()) ** octave
        height, width = max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
        small = torch.randn(1, channels, height, width, generator=generator, dtype=torch.float32, device="cpu")
        noise += discount**octave * F.interpolate(small, shape[1:], mode="bilinear")[0]
        if 1 in (height, width):
            break
    return noise / noise.std()
