"""The objectives against their definitions, with networks that know the answer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from depthmill.pipeline.config_files import validated
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.checkpoint import Description
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.training import losses, objectives, start
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.config import TrainConfig
from depthmill.pipeline.training.objectives import Objective

ARCHITECTURE = {"vae_channels": (8, 16), "unet_channels": (16, 32), "head_channels": 8, "norm_groups": 4}


def objective(prediction="v_prediction", axes=None, **changes):
    settings = {"architecture": ARCHITECTURE, "sets": [{"kind": "scenes", "path": "unused", "scenes": 100}], **changes}
    config = validated(TrainConfig, settings, where="the test")
    begun = start.load(config)
    schedule = scratch.build_scheduler(prediction).config
    parts = replace(begun.parts, scheduler=DDIMScheduler.from_config(schedule, clip_sample=True))  # to be ignored
    description = Description(normals_axes=axes) if axes else begun.description
    return Objective(replace(begun, parts=parts, description=description), config)


def batch(channels=1, seed=0):
    draws = torch.Generator().manual_seed(seed)
    target = torch.rand(3, channels, 16, 24, generator=draws) + 1
    if channels == 3:
        target = torch.nn.functional.normalize(target, dim=1)
    return Batch(torch.rand(3, 3, 16, 24, generator=draws), target, torch.ones(3, 16, 24, dtype=torch.bool))


class Knowing(torch.nn.Module):
    """A UNet that knows the latents z without noise, and so what the noise was; wrong by 100 in some cells."""

    def __init__(self, z, prediction, wrong=0.0):
        super().__init__()
        self.z, self.prediction, self.wrong = z, prediction, wrong
        self.alphas = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod

    def forward(self, noisy, t, prompt):
        noisy, a = noisy[:, -4:], self.alphas[t].view(-1, 1, 1, 1)
        noise = (noisy - a.sqrt() * self.z) / (1 - a).sqrt()
        answer = {"epsilon": noise, "sample": self.z, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * self.z}
        return SimpleNamespace(sample=answer[self.prediction] + 100 * self.wrong)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("kind", ["generative", "diffusion"])
def test_denoising_is_perfect_for_who_knows_the_answer(kind, prediction):
    pictures = batch()
    trained = objective(prediction, objective=kind)
    shown = trained.drawn(pictures) if kind == "diffusion" else pictures.rgb * 2 - 1
    z = trained.encode(shown).detach()
    trained.unet = Knowing(z, prediction)
    assert trained(pictures, torch.Generator().manual_seed(1))["loss"] < 1e-4  # 1 / sqrt(1 - a) is 30 at t = 0
    trained.unet = Knowing(z + 1, prediction)
    assert trained(pictures, torch.Generator().manual_seed(1))["loss"] > 0.1


@pytest.mark.parametrize("kind", ["generative", "diffusion"])
def test_latents_are_noised_in_float32_whatever_the_networks_run_in(kind):
    pictures = batch()
    trained = objective(objective=kind)
    with torch.autocast("cpu", torch.bfloat16):
        shown = trained.drawn(pictures) if kind == "diffusion" else pictures.rgb * 2 - 1
        trained.unet = Knowing(trained.encode(shown).detach().float(), "v_prediction")
        assert trained(pictures, torch.Generator().manual_seed(1))["loss"] < 1e-4


def test_cells_that_see_a_pixel_without_truth_do_not_count():
    pictures = batch()
    pictures.mask[:, 5, 7] = False
    trained = objective(objective="diffusion")
    wrong = torch.zeros(1, 1, 8, 12)
    wrong[..., 2, 3] = 1  # the cell of that pixel: latents are half the size
    for errors, loss in ((wrong, 0), (0.01, 1)):  # there alone; the same everywhere
        trained.unet = Knowing(trained.encode(trained.drawn(pictures)).detach(), "v_prediction", errors)
        got = trained(pictures, torch.Generator().manual_seed(1))["loss"]
        assert got == pytest.approx(loss, abs=1e-3), "the mean of all other cells"


def test_an_autoencoder_is_given_every_other_picture_and_of_the_rest_the_truth(monkeypatch):
    trained, given, shown = objective(objective="autoencoder"), batch(), []
    encode = trained.encode
    monkeypatch.setattr(trained, "encode", lambda pictures: shown.append(pictures) or encode(pictures))
    trained(given, torch.Generator())
    assert torch.equal(shown[0], torch.cat([given.rgb[::2] * 2 - 1, trained.drawn(given)[1:2]]))


@pytest.mark.parametrize(("size", "held"), [(0.5, 0), (3, 0.08)])
def test_latents_of_an_autoencoder_are_held_to_unit_size(monkeypatch, size, held):
    trained = objective(objective="autoencoder")
    monkeypatch.setattr(trained, "encode", lambda pictures: torch.full((3, 4, 8, 12), float(size)))
    got = trained(batch(), torch.Generator())
    assert (got["loss"] - got["reconstruction"]).item() == pytest.approx(held, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "modality"), [("end_to_end", "depth"), ("end_to_end", "normals"), ("diffusion", "depth")]
)
def test_pictures_that_no_loss_is_taken_of_are_counted(kind, modality):
    pictures = batch(channels=1 if modality == "depth" else 3)
    trained = objective(objective=kind, modality=modality)
    assert trained(pictures, torch.Generator())["unused"] == 0
    pictures.mask[0] = False
    assert trained(pictures, torch.Generator())["unused"] == pytest.approx(1 / 3)
    if kind == "diffusion":
        pictures.mask[1, ::2, ::2] = False  # in every cell of the latent
    elif modality == "depth":
        pictures.target[1] = 3  # flat
    else:
        pictures.mask[1] = False
    assert trained(pictures, torch.Generator())["unused"] == pytest.approx(2 / 3)
    without = Batch(pictures.rgb[:2], pictures.target[:2], pictures.mask[:2])
    terms = trained(without, torch.Generator())
    assert (terms["loss"], terms["unused"]) == (0, 1)


def test_the_single_step_is_the_labelers(tmp_path):
    trained = objective()
    start.save(start.load(trained.config), tmp_path, trained.config)
    frames = (batch().rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    depth = Labeler.from_pretrained(tmp_path, processing_resolution=24, device="cpu")(frames.numpy()).depth
    answer = trained.answer(frames.permute(0, 3, 1, 2) / 255, torch.Generator())
    torch.testing.assert_close(answer.mean(1).clip(-1, 1) / 2 + 0.5, torch.from_numpy(depth), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_the_single_step_from_noise_is_ddims(prediction):
    trained = objective(prediction, noise="gaussian")
    rgb = batch().rgb
    got = trained.answer(rgb, torch.Generator().manual_seed(2))
    picture = trained.encode(rgb * 2 - 1)
    draws = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(picture.shape[1:], generator=draws) for _ in rgb])
    out = trained.unet(torch.cat([picture, noise], 1), 999, trained.prompt.expand(3, -1, -1)).sample
    a = trained.scheduler.alphas_cumprod[999]
    x0 = {
        "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * out,
        "epsilon": (noise - (1 - a).sqrt() * out) / a.sqrt(),
        "sample": out,
    }
    torch.testing.assert_close(got, trained.decode(x0[prediction]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axes", ["right-up-towards", "left-up-towards"])
def test_truth_is_turned_to_the_checkpoints_axes(axes, monkeypatch):
    pictures = batch(channels=3)
    trained = objective(modality="normals", axes=axes)
    own = pictures.target * torch.tensor([-1.0 if axes.startswith("left") else 1.0, 1, 1]).view(1, 3, 1, 1)
    torch.testing.assert_close(trained.drawn(pictures), own)
    monkeypatch.setattr(trained, "answer", lambda rgb, draws: own * 3)
    assert trained(pictures, torch.Generator())["loss"] < 0.01


def test_every_valid_pixel_of_a_batch_counts_the_same_as_in_the_papers_code(monkeypatch):
    pictures = batch()
    pictures.mask[1, :12] = False
    trained = objective()
    depth = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    monkeypatch.setattr(trained, "answer", lambda rgb, draws: depth[:, None].expand_as(rgb))
    expected = losses.depth_loss(depth, pictures.target[:, 0], pictures.mask, pooled=True)
    assert trained(pictures, torch.Generator())["loss"] == expected
    assert expected != losses.depth_loss(depth, pictures.target[:, 0], pictures.mask)


def test_the_loss_is_of_depth_that_is_clipped(monkeypatch):
    pictures = batch()
    depth = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1)) * 3 - 1.5
    trained = objective()
    monkeypatch.setattr(trained, "answer", lambda rgb, draws: depth[:, None].expand_as(rgb))
    expected = losses.depth_loss(depth.clip(-1, 1), pictures.target[:, 0], pictures.mask, pooled=True)
    assert trained(pictures, torch.Generator())["loss"] == expected


def test_large_structures_of_noise_fade_towards_the_picture(monkeypatch):
    """As Marigold anneals them: in proportion to the time step, and for pictures of their own not at all."""
    discounts = []

    def noted(shape, rng, discount):
        discounts.append(discount)
        return torch.zeros(shape)

    monkeypatch.setattr(objectives, "pyramid_noise", noted)
    for kind in ("diffusion", "generative"):
        objective(objective=kind)(batch(), torch.Generator().manual_seed(1))
    times = torch.randint(1000, (3,), generator=torch.Generator().manual_seed(1))
    assert discounts == pytest.approx([*(0.9 * times / 1000).tolist(), 0, 0, 0])


def test_depth_is_drawn_from_near_to_far_and_the_vae_is_frozen():
    pictures = batch()
    trained = objective()
    drawn = trained.drawn(pictures)
    assert drawn.shape == (3, 3, 16, 24)
    for picture, depth in zip(drawn[:, 0], pictures.target[:, 0], strict=True):
        assert picture.flatten()[depth.argmin()] == -1
        assert picture.flatten()[depth.argmax()] == 1
    trained(pictures, torch.Generator())["loss"].backward()
    assert all(parameter.grad is None for parameter in trained.vae.parameters())
    assert trained.unet.conv_in.weight.grad.abs().sum() > 0
