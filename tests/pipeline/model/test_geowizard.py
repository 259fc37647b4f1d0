"""GeoWizard's kind of checkpoint, on random weights, against a plain second derivation: loops, einsum and Pillow."""

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
import xarray
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError, ConfigError, StoreMismatchError
from depthmill.pipeline.geometry import processed_size, to_network
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.geowizard import switch
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.model.modules import load_unet, load_vae
from depthmill.workers.label import label

RESOLUTION = 48
TOLERANCE = 1e-4
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# sin 1, cos 1 and cos 0 = 1, sin 0 = 0, as GeoWizard lays them out: modality's sines, its cosines, the domain's.
S, C = math.sin(1), math.cos(1)
SCENES = {"indoor": [S, 0, 0, C, 1, 1], "outdoor": [0, S, 0, 1, C, 1], "object": [0, 0, S, 1, 1, C]}
SWITCHES = {"depth": [0, S, 1, C], "normals": [S, 0, C, 1]}


@pytest.fixture(scope="module")
def geowizard(tmp_path_factory):
    """A checkpoint in the layout that E2E-FT's GeoWizard trainer saves."""
    path = tmp_path_factory.mktemp("geowizard")
    architecture = scratch.Architecture(vae_channels=(8, 16, 16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        vae = scratch.build_vae(architecture)
        unet = UNet2DConditionModel(
            in_channels=8,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4),
            cross_attention_dim=24,
            norm_num_groups=8,
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=10,
        )
        clip = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            projection_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        image_encoder = CLIPVisionModelWithProjection(clip)
    for name, weight in unet.named_parameters():  # attention that is nearly uniform would hide who attends to whom
        if "attn" in name and "to_out" not in name:
            weight.data *= 4
    # Random weights decode to vectors around zero, whose direction is rounding error; real ones face the camera. Small
    # ones keep them from it whatever they are: of one seed they are others in other versions of transformers.
    vae.decoder.conv_out.bias.data = torch.tensor([0.1, 0.2, -0.9])
    vae.decoder.conv_out.weight.data *= 0.25
    vae.save_pretrained(path / "vae")
    unet.save_pretrained(path / "unet")
    image_encoder.save_pretrained(path / "image_encoder")
    scheduler = scratch.build_scheduler().config
    DDPMScheduler.from_config({k: v for k, v in scheduler.items() if k != "set_alpha_to_one"}).save_pretrained(
        path / "scheduler"
    )
    (path / "feature_extractor").mkdir()
    extractor = {
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "size": {"shortest_edge": 32},
    }
    (path / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(extractor))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "DepthNormalEstimationPipeline"}))
    return path


@pytest.fixture
def copy(geowizard, tmp_path):
    return shutil.copytree(geowizard, tmp_path / "geowizard")


def load(path, **options):
    return Labeler.from_pretrained(path, device="cpu", processing_resolution=RESOLUTION, **options)


def pictures(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clip(0, 1)
    return (fine * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_a_caller_s_default_dtype_changes_no_labels(geowizard):
    frames, labeler = pictures(2, 40, 56), load(geowizard)
    expected = labeler(frames)
    torch.set_default_dtype(torch.float64)
    try:
        found = [labeler(frames), load(geowizard)(frames)]
    finally:
        torch.set_default_dtype(torch.float32)
    for labels in found:
        np.testing.assert_array_equal(labels.depth, expected.depth)
        np.testing.assert_array_equal(labels.normals, expected.normals)


def test_bfloat16_of_pictures_so_tall_that_one_column_is_left_of_them(geowizard):
    """There oneDNN's convolutions of stride 2 are wrong on CPUs with AMX."""
    frames = pictures(2, 192, 4)
    exact, found = (
        Labeler.from_pretrained(geowizard, device="cpu", dtype=dtype, processing_resolution=192)(frames).depth
        for dtype in ("float32", "bfloat16")
    )
    assert np.abs(found - exact).mean() < 0.008


class Plain:
    """Attention by its definition, one sample and one head at a time; joint where there is no prompt, or not."""

    def __init__(self, joint):
        self.joint = joint

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        answers = []
        for i, tokens in enumerate(hidden_states):
            if encoder_hidden_states is not None:
                context = encoder_hidden_states[i]
            elif self.joint:
                context = torch.cat([hidden_states[0], hidden_states[1]])  # depth's tokens, normals' tokens
            else:
                context = tokens
            q, k, v = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
            width = q.shape[-1] // attn.heads
            heads = []
            for h in range(attn.heads):
                part = slice(h * width, (h + 1) * width)
                scores = torch.einsum("qd,kd->qk", q[:, part], k[:, part]) / math.sqrt(width)
                heads.append(torch.einsum("qk,kd->qd", scores.softmax(-1), v[:, part]))
            answers.append(attn.to_out[0](torch.cat(heads, dim=-1)))
        return torch.stack(answers)


@torch.inference_mode()
def reference(path, frames, domain="indoor", *, joint=True):
    """Depth and normals of frames at the processing resolution, one by one."""
    checkpoint = open_checkpoint(str(path), "depth")
    unet, vae = load_unet(checkpoint), load_vae(checkpoint)
    unet.set_attn_processor(Plain(joint))
    clip = CLIPVisionModelWithProjection.from_pretrained(path / "image_encoder")
    depths, normals = [], []
    for frame in frames:
        size = processed_size(*frame.shape[:2], RESOLUTION)
        picture = to_network(torch.from_numpy(frame), size, 4)[None]
        channels = ((picture[0, :, : size[0], : size[1]] + 1) / 2).numpy()
        small = [np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC)) for one in channels]
        seen = (np.stack(small) - np.float32(MEAN)[:, None, None]) / np.float32(STD)[:, None, None]
        prompt = clip(torch.from_numpy(seen)[None]).image_embeds[:, None]
        latent = vae.encode(picture).latent_dist.mean * 0.18215
        v = unet(
            torch.cat([latent, latent * 0], dim=1).repeat(2, 1, 1, 1),
            999,
            encoder_hidden_states=prompt.repeat(2, 1, 1),
            class_labels=torch.tensor([SWITCHES[name] + SCENES[domain] for name in ("depth", "normals")]),
        ).sample
        alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[-1]
        decoded = vae.decode(-((1 - alpha) ** 0.5) * v / 0.18215).sample[..., : size[0], : size[1]]
        depths.append((decoded[0].mean(0).clip(-1, 1) + 1) / 2)
        # E2E-FT answers minus what it decodes, with x to the left: x, y and z of the decoded are right, down, away.
        vectors = decoded[1] / decoded[1].norm(dim=0) * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
        normals.append(vectors.permute(1, 2, 0))
    return torch.stack(depths).numpy(), torch.stack(normals).numpy()


@pytest.mark.parametrize("domain", ["indoor", "outdoor", "object"])
@pytest.mark.parametrize("shape", [(3, 32, 48), (1, 48, 36), (2, 31, 48)], ids=str)  # the last one is padded
def test_equals_the_plain_derivation(geowizard, shape, domain):
    frames = pictures(*shape)
    labels = load(geowizard, domain=domain)(frames)
    depth, normals = reference(geowizard, frames, domain)
    errors = np.abs(labels.depth - depth).max(), np.abs(labels.normals - normals).max()
    print(f"parity: {shape} {domain}: depth {errors[0]:.1e}, normals {errors[1]:.1e}")
    assert max(errors) <= TOLERANCE
    assert depth.std() > 1e-3
    assert normals.std() > 1e-3


def test_depth_and_normals_attend_to_each_other(geowizard):
    """That the comparison above could see attention that does not join them, the wrong domain, or swapped samples."""
    frames = pictures(1, 32, 48)
    depth, normals = reference(geowizard, frames)
    apart = reference(geowizard, frames, joint=False)
    outdoors = reference(geowizard, frames, "outdoor")
    for other in (apart, outdoors):
        moved = np.abs(other[0] - depth).max(), np.abs(other[1] - normals).max()
        print(f"moved: {moved}")
        assert min(moved) > 10 * TOLERANCE


def test_a_frame_has_the_same_labels_in_any_company(geowizard):
    labeler, frames = load(geowizard), pictures(3, 32, 48)
    together = labeler(frames)
    assert np.abs(together.depth[0] - together.depth[1]).max() > 1e-3
    for i, frame in enumerate(frames):
        alone = labeler(frame[None])
        assert np.allclose(together.depth[i], alone.depth[0], atol=TOLERANCE)
        assert np.allclose(together.normals[i], alone.normals[0], atol=TOLERANCE)


def test_frames_of_several_sizes_share_a_batch(geowizard):
    labeler, frames = load(geowizard), [*pictures(1, 32, 48), *pictures(1, 31, 48, seed=1)]
    assert len({labeler.processed_size(*frame.shape[:2]) for frame in frames}) == 2
    assert len({labeler.batch_shape(*frame.shape[:2]) for frame in frames}) == 1
    for frame, together in zip(frames, labeler.label(frames), strict=True):
        assert np.allclose(together.depth, labeler(frame[None]).depth, atol=TOLERANCE)


@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_one_of_both_is_the_same_as_when_both_are_asked_for(geowizard, modality):
    frames = pictures(2, 24, 30)
    both, one = load(geowizard)(frames), load(geowizard, labels=(modality,))(frames)
    assert np.array_equal(getattr(both, modality), getattr(one, modality))
    assert getattr(one, {"depth": "normals", "normals": "depth"}[modality]) is None


def test_switch():
    for domain, scene in SCENES.items():
        expected = [SWITCHES[name] + scene for name in ("depth", "normals")]
        assert torch.allclose(switch(domain), torch.tensor(expected))


def test_given_axes_hold_for_the_normals(geowizard):
    frames = pictures(1, 24, 30)
    mirrored = load(geowizard, normals_axes="left-down-away")(frames).normals
    assert np.allclose(mirrored, load(geowizard)(frames).normals * [-1, 1, 1], atol=1e-6)
    assert np.array_equal(
        mirrored, load(geowizard, normals_checkpoint=geowizard, normals_axes="left-down-away")(frames).normals
    )


def test_the_domain_is_part_of_the_identity(geowizard, checkpoints):
    def identities(**options):
        opened = open_checkpoints(LabelConfig(checkpoint=str(geowizard), **options))
        return {checkpoint.modality: checkpoint.identity for checkpoint in opened}

    assert identities() == identities(domain="indoor") != identities(domain="outdoor")
    assert set(identities()) == {"depth", "normals"}
    assert identities()["depth"]["domain"] == "indoor"
    assert "domain" not in open_checkpoint(str(checkpoints / "depth"), "depth").identity


def test_a_run_labels_both_and_is_not_mixed_with_another_domain(geowizard, tmp_path):
    (frame,) = pictures(1, 32, 48)
    (tmp_path / "in").mkdir()
    Image.fromarray(frame).save(tmp_path / "in" / "a.png")

    def run(domain):
        config = LabelConfig(
            checkpoint=str(geowizard), domain=domain, processing_resolution=RESOLUTION, device="cpu", workers=0
        )
        label([str(tmp_path / "in")], tmp_path / "out.zarr", config, console=Console(file=io.StringIO()))

    run("outdoor")
    (group,) = (path.name for path in (tmp_path / "out.zarr").iterdir() if path.is_dir())
    stored = xarray.open_zarr(tmp_path / "out.zarr", group=group)
    expected = load(geowizard, domain="outdoor")(frame[None])
    assert np.abs(stored.depth.values - expected.depth).max() <= 2e-4  # half a packing step, and rounding
    assert np.abs(stored.normals.values - expected.normals).max() <= 0.5 / 127 + TOLERANCE
    with pytest.raises(StoreMismatchError, match="domain"):
        run("indoor")


def test_a_domain_is_for_checkpoints_that_have_one(checkpoints):
    with pytest.raises(ConfigError, match=r"domain is 'object'.*GeoWizard"):
        open_checkpoints(LabelConfig(checkpoint=str(checkpoints / "depth"), labels=("depth",), domain="object"))


def test_it_is_not_mixed_with_another(geowizard, checkpoints):
    config = LabelConfig(checkpoint=str(checkpoints / "depth"), normals_checkpoint=str(geowizard))
    with pytest.raises(CheckpointError, match="together, and was given beside another"):
        open_checkpoints(config)


def test_it_is_sampled_in_one_step_alone(geowizard):
    with pytest.raises(ConfigError, match="in one step from zero noise alone"):
        open_checkpoints(LabelConfig(checkpoint=str(geowizard), steps=4, noise="gaussian"))


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "feature_extractor"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(CheckpointError, match=f"lacks {part}"):
        open_checkpoint(str(copy), "depth")


def test_a_pickle_is_refused(copy):
    (copy / "image_encoder" / "model.safetensors").rename(copy / "image_encoder" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"image_encoder/ holds only .*pickle"):
        open_checkpoint(str(copy), "depth")


@pytest.mark.parametrize("damage", ["missing", "left over", "of another shape", "changed"])
def test_the_image_encoder_must_fit_exactly(copy, damage):
    path = copy / "image_encoder" / "model.safetensors"
    weights = load_file(path)
    before = open_checkpoint(str(copy), "depth").sha256
    name = "visual_projection.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "left over":
        weights["stray.weight"] = torch.zeros(1)
    elif damage == "of another shape":
        weights[name] = weights[name][:-1].contiguous()
    else:
        weights[name] = weights[name] + 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    assert open_checkpoint(str(copy), "depth").sha256 != before
    if damage == "changed":
        load(copy)
    else:
        with pytest.raises(CheckpointError, match="image_encoder/"):
            load(copy)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"projection_class_embeddings_input_dim": 4}, "unet/"),
        ("unet/config.json", {"class_embed_type": None}, "unet/"),
        ("feature_extractor/preprocessor_config.json", {"crop_size": 32}, "crop_size"),
        ("feature_extractor/preprocessor_config.json", {"image_mean": [0.5]}, "image_mean"),
    ],
)
def test_configs_that_do_not_fit(copy, file, change, message):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_a_unet_without_the_switch(copy):
    """Such as Stable Diffusion's own, or that of GeoWizard's second version, which has 4 inputs for 10."""
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    UNet2DConditionModel.from_config(config | {"projection_class_embeddings_input_dim": 4}).save_pretrained(
        copy / "unet"
    )
    with pytest.raises(CheckpointError, match=r"input_dim 4; expected.*input_dim 10.*second version"):
        load(copy)
