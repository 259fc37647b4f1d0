"""GeoWizard: depth and normals of a picture from one joint UNet call, in the single step of E2E-FT.

Fu et al., "GeoWizard: Unleashing the Diffusion Priors for 3D Geometry Estimation from a Single Image" (ECCV 2024), §3,
fine-tuned by Martin Garcia et al. (WACV 2025) as `GonzaloMG/geowizard-e2e-ft`; facts from the GeoWizard/ folder of the
latter's repository. It differs from Marigold's kind in three things, and diffusers' own UNet has room for each:

- the prompt is the picture itself, embedded by CLIP's image encoder: one token;
- which of the two a sample is, and of what scene, is a class embedding beside the time's;
- depth and normals are two samples of one batch, which attend to each other wherever they attend to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from depthmill.pipeline.config import Sampling
from depthmill.pipeline.errors import CheckpointError, ConfigError
from depthmill.pipeline.model.blocks import use_shrinking
from depthmill.pipeline.model.checkpoint import Checkpoint, read_json
from depthmill.pipeline.model.modules import load_part, load_scheduler, load_unet, load_vae, vae_factor, vae_width
from depthmill.pipeline.model.single_step import decode_depth, decode_normals, x0_factor
from depthmill.pipeline.types import Domain, Modality

SWITCH_WIDTH = 10  # sine and cosine of 2 modalities and 3 domains


def check_joint(checkpoints: Sequence[Checkpoint], sampling: Sampling) -> bool:
    """Whether these checkpoints are one joint one, opened for each thing that it is to answer.

    Raises:
        CheckpointError: If a joint checkpoint is mixed with another.
        ConfigError: If it is to be sampled otherwise than in its single step.
    """
    joint = [checkpoint.name for checkpoint in checkpoints if checkpoint.domain is not None]
    if joint and len({checkpoint.directory for checkpoint in checkpoints}) > 1:
        raise CheckpointError(
            f"checkpoint {joint[0]} answers depth and normals together, and was given beside another; expected it "
            "alone: leave --normals-checkpoint out, or label depth and normals in two runs (--labels)"
        )
    if joint and not sampling.is_single_step:
        raise ConfigError(
            f"checkpoint {joint[0]} answers depth and normals together, in one step from zero noise alone: "
            "leave out steps, ensemble, noise and timestep_spacing"
        )
    return bool(joint)


def switch(domain: Domain) -> torch.Tensor:
    """What tells the network which sample is which, and of what scene (the switches of GeoWizard, §3).

    Returns:
        (2, 10) float32, depth then normals: sine and cosine of the modality's (0, 1) or (1, 0), then sine and cosine
        of the domain's one-hot vector.
    """
    modality = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float32)
    scene = torch.tensor([[domain == one for one in get_args(Domain)]] * 2, dtype=torch.float32)
    return torch.cat([modality.sin(), modality.cos(), scene.sin(), scene.cos()], dim=1)


class JointAttention:
    """Self-attention of a batch [depth of all pictures, normals of all], each picture's two samples attending to both.

    Both have the same keys and values, so that this is self-attention over the tokens of the two, laid end to end.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, attention: Any, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """(2B, N, width) -> (B, 2N, width), attended as `processor` does it, and back."""
        joined = torch.cat(tokens.chunk(2), dim=1)
        attended: torch.Tensor = self.processor(attention, joined, *args, **options)
        return torch.cat(attended.chunk(2, dim=1))


class GeoWizard(torch.nn.Module):
    """Depth, normals or both of a batch of pictures, in one UNet call.

    Args:
        checkpoints: A joint one, opened for each thing that is asked for; the other is predicted, but not decoded.
        device: Where the weights live.
        dtype: Of the network; labels are finished in float32 whatever it is.

    Raises:
        CheckpointError: If it cannot be loaded, or its parts do not fit.
    """

    def __init__(self, checkpoints: list[Checkpoint], device: torch.device, dtype: torch.dtype):
        super().__init__()
        checkpoint = checkpoints[-1]  # the one for normals, if there is: it has their axes
        scheduler = load_scheduler(checkpoint)
        self.vae, self.unet = load_vae(checkpoint), load_unet(checkpoint)
        self.image_encoder = load_part(checkpoint, CLIPVisionModelWithProjection, "image_encoder", dtype=torch.float32)
        _check_fit(checkpoint, self.unet, self.vae.config.latent_channels, self.image_encoder.config.projection_dim)
        self.clip_size, mean, std = _clip_input(checkpoint)
        self.unet.set_attn_processor(
            {
                name: JointAttention(processor) if name.endswith("attn1.processor") else processor
                for name, processor in self.unet.attn_processors.items()
            }
        )
        self.factor, self.width = vae_factor(self.vae), vae_width(self.vae)
        # Channels last is what tensor cores want; on CPUs it measured no faster.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.to(device, dtype)
        self.to(memory_format=self.layout)  # type: ignore[call-overload]  # torch's stub lacks it
        use_shrinking(self, device, dtype)
        assert checkpoint.domain is not None
        self.switch = switch(checkpoint.domain).to(device, dtype)
        self.clip_mean, self.clip_std = mean.to(device), std.to(device)
        self.timestep = scheduler.config.num_train_timesteps - 1
        self.x0_factor = x0_factor(scheduler)
        self.x0_clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        self.modalities = [one.modality for one in checkpoints]
        self.description = checkpoint.description
        self.dtype = dtype

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> dict[Modality, torch.Tensor]:
        """Label a batch.

        Args:
            pictures: (B, 3, h, w) float32 in [-1, 1], both sides multiples of `factor`.
            sizes: Height and width of each without the padding, which CLIP is not shown.

        Returns:
            For each modality (B, C, h, w) float32: depth C = 1 in [0, 1]; normals C = 3, unit, in the stored axes.
        """
        valid = [picture[:, : size[0], : size[1]] for picture, size in zip(pictures, sizes, strict=True)]
        prompt = self._embed(valid)  # (B, 1, width)
        pictures = pictures.to(self.dtype, memory_format=self.layout)
        latent = self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor
        out = self.unet(
            torch.cat([latent, torch.zeros_like(latent)], dim=1).repeat(2, 1, 1, 1),
            self.timestep,
            encoder_hidden_states=prompt.repeat(2, 1, 1),
            class_labels=self.switch.repeat_interleave(len(latent), dim=0),
        ).sample  # (2B, latent, h/factor, w/factor): depth of all, then normals of all
        x0 = out * self.x0_factor
        if self.x0_clip is not None:
            x0 = x0.clip(-self.x0_clip, self.x0_clip)
        depth, normals = (x0 / self.vae.config.scaling_factor).chunk(2)
        labels: dict[Modality, torch.Tensor] = {}
        if "depth" in self.modalities:
            labels["depth"] = decode_depth(self.vae.decode(depth).sample.float())
        if "normals" in self.modalities:
            labels["normals"] = decode_normals(self.vae.decode(normals).sample.float(), self.description)
        return labels

    def _embed(self, pictures: Sequence[torch.Tensor]) -> torch.Tensor:
        """CLIP's embedding of whole pictures, each (3, h, w) in [-1, 1], squeezed to CLIP's size: (B, 1, width)."""
        small = torch.cat(
            [F.interpolate((one[None] + 1) / 2, self.clip_size, mode="bicubic", antialias=True) for one in pictures]
        )
        normalised = ((small - self.clip_mean) / self.clip_std).to(self.dtype)
        embedding: torch.Tensor = self.image_encoder(normalised).image_embeds
        return embedding[:, None]


def _check_fit(checkpoint: Checkpoint, unet: UNet2DConditionModel, latent: int, prompt: int) -> None:
    wanted = {
        "in_channels": 2 * latent,
        "out_channels": latent,
        "cross_attention_dim": prompt,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": SWITCH_WIDTH,
    }
    wrong = {key: unet.config[key] for key, value in wanted.items() if unet.config[key] != value}
    if wrong:
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: its UNet has {_words(wrong)}; expected, as GeoWizard's beside this VAE and "
            f"this image encoder, {_words({key: wanted[key] for key in wrong})}: the parts are of different "
            "checkpoints, or of another kind (GeoWizard's second version is one)"
        )


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in settings.items())


def _clip_input(checkpoint: Checkpoint) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    """Height and width of the image encoder's pictures, and the (3, 1, 1) mean and deviation that they are given."""
    path = checkpoint.directory / "feature_extractor" / "preprocessor_config.json"
    config = read_json(path)
    try:
        size = (int(config["crop_size"]["height"]), int(config["crop_size"]["width"]))
        values = (config[key] for key in ("image_mean", "image_std"))
        mean, std = (torch.tensor(value, dtype=torch.float32).reshape(3, 1, 1) for value in values)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} has no usable crop_size, image_mean and image_std ({type(error).__name__}: {error}); expected "
            "crop_size with height and width, and three numbers each: fetch the checkpoint again"
        ) from error
    return size, mean, std
