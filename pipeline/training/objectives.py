"""What is learnt, as the loss of one batch: four objectives over the same modules.

With ᾱ the scheduler's cumulative product, z a latent and n noise, z_t = sqrt(ᾱ_t) z + sqrt(1 - ᾱ_t) n. The network runs
in whatever precision it is told to; latents are noised, and losses taken, in float32.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.geometry import axes_signs
from depthmill.pipeline.model.modules import vae_factor
from depthmill.pipeline.model.sampling import draw_noise, pyramid_noise
from depthmill.pipeline.training import losses
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.config import TrainConfig
from depthmill.pipeline.training.start import Start

_PYRAMID = 0.9  # discount of the multi-resolution noise that Marigold is trained on, at the last time step


class Objective(torch.nn.Module):
    """The modules and the loss, in one module, so that data-parallel wrappers see one forward pass.

    Args:
        start: What is trained.
        config: Says what is learnt.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    prompt: Tensor
    signs: Tensor

    def __init__(self, start: Start, config: TrainConfig):
        super().__init__()
        self.unet, self.vae = start.parts.unet, start.parts.vae
        # Whatever it says of pictures: latents are not clipped.
        self.scheduler = DDIMScheduler.from_config(start.parts.scheduler.config, clip_sample=False)
        self.scheduler.set_timesteps(1)
        self.config = config
        self.register_buffer("prompt", start.prompt, persistent=False)
        signs = torch.tensor(axes_signs(start.description.normals_axes)).view(1, 3, 1, 1)
        self.register_buffer("signs", signs, persistent=False)
        self.requires_grad_(False)
        self.trained.requires_grad_(True)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()

    @property
    def trained(self) -> torch.nn.Module:
        """The part that learns; the rest is frozen."""
        trained: torch.nn.Module = self.vae if self.config.objective == "autoencoder" else self.unet
        return trained

    def forward(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Terms of the loss, each () float32: `loss` is what to descend.

        `unused` is the share of pictures that the task's loss could not be taken of: without a pixel that counts, or,
        end to end, with flat depth.

        Args:
            batch: Pictures and truth, on the modules' device.
            rng: Draws time steps and noise, on the CPU whatever the device.
        """
        loss = getattr(self, f"_{self.config.objective}")
        terms: dict[str, Tensor] = loss(batch, rng)
        return terms

    def check_size(self, pictures: Tensor) -> None:
        """Refuse pictures (B, 3, H, W) that the VAE would give back smaller than they are.

        Raises:
            TrainingError: Then.
        """
        factor = vae_factor(self.vae)
        height, width = pictures.shape[2:]
        if height % factor or width % factor:
            raise TrainingError(
                f"pictures are {width}x{height}; expected multiples of {factor}, the factor of the checkpoint's VAE: "
                f"give the set, or augment, height {height - height % factor} and width {width - width % factor}"
            )

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled, of pictures (B, 3, H, W) in [-1, 1]: the mean, not a sample."""
        self.check_size(pictures)
        latent: Tensor = self.vae.encode(pictures).latent_dist.mean * self.vae.config.scaling_factor
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Inverse of `encode`, float32, not clipped."""
        picture: Tensor = self.vae.decode(latent / self.vae.config.scaling_factor).sample.float()
        return picture

    def drawn(self, batch: Batch) -> Tensor:
        """The truth as a picture (B, 3, H, W) in [-1, 1]: depth from its 2nd to its 98th percentile; normals."""
        if batch.target.shape[1] == 3:
            return batch.target * self.signs
        return losses.normalised_depth(batch.target[:, 0], batch.mask)[:, None].expand(-1, 3, -1, -1)

    def _autoencoder(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Half of the batch as pictures, half as truth, given back; latents held, weakly, to unit size."""
        pictures = torch.cat([batch.rgb[0::2] * 2 - 1, self.drawn(batch)[1::2]])
        latent = self.encode(pictures).float()
        reconstruction = (self.decode(latent) - pictures).abs().mean()
        return {
            "loss": reconstruction + 1e-2 * (latent.square().mean() - 1).clamp(min=0),
            "reconstruction": reconstruction,
        }

    def _generative(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            latent = self.encode(batch.rgb * 2 - 1).float()
        return self._denoising(latent, None, torch.ones_like(batch.mask), rng)

    def _diffusion(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            picture, truth = self.encode(torch.cat([batch.rgb * 2 - 1, self.drawn(batch)])).float().chunk(2)
        return self._denoising(truth, picture, batch.mask, rng)

    def _denoising(self, latent: Tensor, given: Tensor | None, mask: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the network's answer to noisy latents, at a random time for each.

        Ho et al. 2020, eq. 14, for epsilon; Salimans & Ho 2022, section 4, for v. Cells of the latent that see a pixel
        without truth do not count, as in Marigold's training for depth; for normals that counts all.
        """
        last = self.scheduler.config.num_train_timesteps
        times = torch.randint(last, (len(latent),), generator=rng)
        strength = _PYRAMID if given is not None else 0.0  # Stable Diffusion's noise is gaussian
        discounts = (strength * times / last).tolist()  # annealed to gaussian noise at t = 0
        noise = torch.stack([pyramid_noise(latent.shape[1:], rng, discount) for discount in discounts]).to(latent)
        t = times.to(latent.device)
        noisy = self.scheduler.add_noise(latent, noise, t)
        answer = self.unet(
            noisy if given is None else torch.cat([given, noisy], dim=1), t, self.prompt.expand(len(latent), -1, -1)
        ).sample
        match self.scheduler.config.prediction_type:
            case "v_prediction":
                wanted = self.scheduler.get_velocity(latent, noise, t)
            case "epsilon":
                wanted = noise
            case _:
                wanted = latent
        seen = F.adaptive_max_pool2d((~mask)[:, None].float(), latent.shape[2:]) == 0  # (B, 1, h, w)
        error = (answer.float() - wanted.float()).square() * seen
        return {"loss": error.sum() / (seen.sum() * latent.shape[1]).clamp(min=1), "unused": _unused(seen)}

    def answer(self, rgb: Tensor, rng: torch.Generator) -> Tensor:
        """The decoded single step (the paper, section 4): (B, 3, H, W) float32, depth or normals as a picture."""
        with torch.no_grad():
            picture = self.encode(rgb * 2 - 1)
        noise = torch.stack([draw_noise(self.config.noise, picture.shape[1:], rng) for _ in rgb]).to(picture)
        last = self.scheduler.config.num_train_timesteps - 1
        prompt = self.prompt.expand(len(rgb), -1, -1)
        out = self.unet(torch.cat([picture, noise], dim=1), last, prompt).sample
        return self.decode(self.scheduler.step(out, last, noise).pred_original_sample)

    def _end_to_end(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        decoded = self.answer(batch.rgb, rng)
        with torch.autocast(decoded.device.type, enabled=False):
            if self.config.modality == "normals":
                loss = losses.normals_loss(decoded * self.signs, batch.target, batch.mask)
                return {"loss": loss, "unused": _unused(batch.mask)}
            depth, truth = decoded.mean(dim=1).clip(-1, 1), batch.target[:, 0]  # (B, H, W) each
            loss = losses.depth_loss(depth, truth, batch.mask, pooled=True)
            return {"loss": loss, "unused": _unused(losses.clip_depth(truth, batch.mask)[1][:, None])}


def _unused(counts: Tensor) -> Tensor:
    """Share of pictures of which nothing counts; `counts` (B, ...) is bool."""
    return 1 - counts.flatten(1).any(1).float().mean()
