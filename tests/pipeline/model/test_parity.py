"""The labeler against diffusers' own Marigold pipelines, on random weights, in float32."""

import functools

import diffusers
import numpy as np
import pytest
import torch

from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.labeler import Labeler

ARCHITECTURE = scratch.Architecture()
SHAPES = [(72, 96), (96, 72), (75, 200), (150, 90)]  # landscape, portrait, sides that need padding, shrunk
RESOLUTION = 96
TOLERANCE = 1e-4


@functools.cache
def pipeline(path, modality):
    kind = {"depth": diffusers.MarigoldDepthPipeline, "normals": diffusers.MarigoldNormalsPipeline}[modality]
    pipe = kind.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    # The pipelines decode the scheduler's `prev_sample`; at the last step that is x0 where the final ᾱ is 1. (Where it
    # is not, as in Stable Diffusion's own config, E2E-FT's reference decodes `pred_original_sample`, and so do we.)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    return pipe


@functools.cache
def labeler(root):
    return Labeler.from_pretrained(root / "depth", root / "normals", device="cpu", dtype="float32")


def reference(path, modality, frames):
    """What diffusers answers: (B, H, W) depth or (B, H, W, 3) normals."""
    pipe = pipeline(path, modality)
    longer, factor = max(frames.shape[1:3]), pipe.vae_scale_factor
    latent_size = [-(-(side * RESOLUTION // longer) // factor) for side in frames.shape[1:3]]
    result = pipe(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        num_inference_steps=1,
        batch_size=len(frames),
        latents=torch.zeros(len(frames), 4, *latent_size),
        output_type="np",
    ).prediction
    return result[..., 0] if modality == "depth" else result


def pictures(count, height, width, seed=0):
    """Smooth random pictures with full range, so that clipping and resizing matter."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    fine = fine + 0.1 * torch.randn(fine.shape, generator=generator)
    return (fine.clip(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes (once) a depth and a normals checkpoint: `checkpoints(prediction)` is their folder."""

    @functools.cache
    def make(prediction="v_prediction"):
        root = tmp_path_factory.mktemp(prediction)
        for seed, modality in enumerate(("depth", "normals")):
            parts = scratch.build(ARCHITECTURE, seed=seed, prediction_type=prediction)
            # Random weights decode to vectors around zero, whose direction is rounding error: diffusers differs from
            # itself by 2e-3 there, between a batch of 8 and 8 batches of 1. Real normals face the camera; so do these.
            parts.vae.decoder.conv_out.weight.data *= 0.5
            parts.vae.decoder.conv_out.bias.data = torch.tensor([0.1, 0.2, 0.9])
            scratch.save(parts, root / modality, modality, processing_resolution=RESOLUTION)
        return root

    return make


def check(root, modality, shape, batch):
    frames = pictures(batch, *shape)
    ours = getattr(labeler(root)(frames), modality)
    theirs = reference(root / modality, modality, frames)
    assert ours.shape == theirs.shape
    assert ours.std() > 1e-3, "a constant answer would agree with anything"
    error = np.abs(ours - theirs).max()
    print(f"parity: {modality} {shape} batch {batch}: {error:.2e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_equals_diffusers(checkpoints, modality, shape, batch):
    check(checkpoints(), modality, shape, batch)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_equals_diffusers_for_every_prediction_type(checkpoints, modality, prediction):
    check(checkpoints(prediction), modality, SHAPES[0], 1)
