import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from depthmill.pipeline.errors import CheckpointError, ConfigError
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.checkpoint import count_weights, open_checkpoint
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.model.modules import empty_prompt, load_scheduler, load_unet, load_vae
from depthmill.pipeline.model.single_step import load_heads

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def depth(checkpoints, tmp_path):
    """A depth checkpoint to spoil."""
    return shutil.copytree(checkpoints / "depth", tmp_path / "depth")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_describes_itself(checkpoints):
    depth, normals = (open_checkpoint(str(checkpoints / name), name) for name in ("depth", "normals"))
    assert depth.processing_resolution == normals.processing_resolution == 48
    assert normals.description.normals_axes == "right-up-towards"
    assert depth.sha256 != normals.sha256
    assert depth.sha256 == open_checkpoint(str(checkpoints / "depth"), "depth").sha256


def test_the_sha256_sees_one_changed_weight_one_changed_name_and_a_description(depth):
    before = open_checkpoint(str(depth), "depth").sha256
    renamed = (depth / "tokenizer" / "vocab.json").rename(depth / "tokenizer" / "vocab2.json")
    assert open_checkpoint(str(depth), "depth").sha256 != before
    renamed.rename(depth / "tokenizer" / "vocab.json")
    (depth / "depthmill.json").write_text("{}")
    assert open_checkpoint(str(depth), "depth").sha256 != before
    (depth / "depthmill.json").unlink()
    assert open_checkpoint(str(depth), "depth").sha256 == before
    weights = load_file(depth / WEIGHTS)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, depth / WEIGHTS)
    assert open_checkpoint(str(depth), "depth").sha256 != before


def test_the_sha256_is_the_same_in_whatever_order_files_are_listed(checkpoints, monkeypatch):
    before, listed = open_checkpoint(str(checkpoints / "depth"), "depth").sha256, Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda folder: reversed(list(listed(folder))))
    assert open_checkpoint(str(checkpoints / "depth"), "depth").sha256 == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pickle_is_refused(depth, part):
    (weights,) = (depth / part).glob("*.safetensors")
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"{part}/ holds only .*\.bin.*pickle.*safetensors"):
        open_checkpoint(str(depth), "depth")


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "tokenizer", "text_encoder"])
def test_a_missing_part_is_named(depth, part):
    shutil.rmtree(depth / part)
    with pytest.raises(CheckpointError, match=f"lacks {part}"):
        open_checkpoint(str(depth), "depth")


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("damage", ["missing", "left over", "of another shape", "cut off"])
def test_weights_must_fit_exactly(depth, part, damage):
    path = depth / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = "conv_in.weight" if part == "unet" else "encoder.conv_in.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "left over":
        weights["stray.weight"] = torch.zeros(1)
    elif damage == "of another shape":
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, path)
    if damage == "cut off":  # which can be told without reading it
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{part}/diffusion_pytorch_model.safetensors cannot be read"):
            open_checkpoint(str(depth), "depth")
        return
    checkpoint = open_checkpoint(str(depth), "depth")
    with pytest.raises(CheckpointError, match=f"{part}/"):
        (load_unet if part == "unet" else load_vae)(checkpoint)


def test_why_weights_cannot_be_read(depth, monkeypatch):
    opened = Path.open

    def refuse(path, *args, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"\.safetensors cannot be read \(.*Permission denied"):
        open_checkpoint(str(depth), "depth")


def test_a_place_that_may_not_be_looked_into_is_no_checkpoint(depth, monkeypatch):
    look = os.stat

    def refuse(path, *args, **options):
        if str(path) == str(depth):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(CheckpointError, match="no directory that this user can see"):
        open_checkpoint(str(depth), "depth")


@pytest.mark.parametrize("name", ["depth", "unet", "unet/config.json", "tokenizer/vocab.json"])
def test_what_may_not_be_read_is_named(depth, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(name))
    with pytest.raises(CheckpointError, match=f"{name} may not be read"):
        open_checkpoint(str(depth), "depth")


@pytest.mark.parametrize("damage", ["missing", "left over"])
def test_weights_of_shards_must_fit_exactly(depth, damage):
    unet = UNet2DConditionModel.from_pretrained(depth / "unet")
    (depth / WEIGHTS).unlink()
    unet.save_pretrained(depth / "unet", max_shard_size="500KB")
    load_unet(open_checkpoint(str(depth), "depth"))
    path = sorted((depth / "unet").glob("*.safetensors"))[1]
    weights = load_file(path)
    if damage == "missing":
        del weights[sorted(weights)[0]]
    else:
        weights["stray.weight"] = torch.zeros(1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unet/ does not fit .*(missing|unexpected) keys"):
        load_unet(open_checkpoint(str(depth), "depth"))


def test_text_encoder_must_fit_exactly(depth):
    path = depth / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="text_encoder/"):
        empty_prompt(open_checkpoint(str(depth), "depth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow"}, "flow.*v_prediction"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler.*DDIM.*distilled"),
        ({"_class_name": "EulerDiscreteScheduler"}, r"EulerDiscrete.*DDIM.*DDIMScheduler\.from_config"),
        ({"thresholding": True}, "thresholding"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "epsilon.*rescale_betas_zero_snr"),
    ],
)
def test_a_scheduler_that_has_no_single_step(depth, change, message):
    edit_json(depth / "scheduler" / "scheduler_config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        load_scheduler(open_checkpoint(str(depth), "depth"))


@pytest.mark.parametrize("change", [{"beta_schedule": "sigmoid"}, {"num_train_timesteps": "1000"}])
def test_a_scheduler_with_values_that_ddim_does_not_take(depth, change):
    edit_json(depth / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler", **change)
    with pytest.raises(CheckpointError, match="scheduler/ cannot be loaded"):
        load_scheduler(open_checkpoint(str(depth), "depth"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scheduler", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000; expected .* 100000 at most"),
        ("scheduler", {"beta_start": 2, "beta_end": 3}, r"its betas leave -\S+ to \S+ of the signal; expected 0 to 1"),
        ("scheduler", {"clip_sample": True, "clip_sample_range": "x"}, "clip_sample_range is 'x'"),
        ("unet", {"layers_per_block": 10**7}, r"layers_per_block is 10000000 in .* are of \d at most"),
        ("unet", {"block_out_channels": [32, 10**6]}, r"block_out_channels is 1000000 in .* at most"),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor is 'x'; expected a number above 0"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor is nan"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made_of_them(depth, part, change, message):
    edit_json(depth / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **change)
    with pytest.raises(CheckpointError, match=rf"{part}/ cannot be loaded \({message}.*fetch it again"):
        load_heads([open_checkpoint(str(depth), "depth")])


@pytest.mark.parametrize("side", ["x", 10**9, -1])
def test_a_resolution_that_makes_no_sense(depth, side):
    edit_json(depth / "model_index.json", default_processing_resolution=side)
    with pytest.raises(CheckpointError, match=f"default_processing_resolution is {side!r}; expected pixels"):
        open_checkpoint(str(depth), "depth")


def test_a_pipe_or_a_device_is_not_read(depth):
    (depth / "unet" / "a.safetensors").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"unet/a\.safetensors is a pipe or a device; expected a file"):
        open_checkpoint(str(depth), "depth")


def test_x0_is_not_clipped_where_pndm_would_not(depth):
    PNDMScheduler(prediction_type="v_prediction").save_pretrained(depth / "scheduler")
    assert not load_scheduler(open_checkpoint(str(depth), "depth")).config.clip_sample


def test_a_unet_for_another_task(depth):
    weights = load_file(depth / WEIGHTS)
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], weights["conv_in.weight"][:, :1]], dim=1)
    save_file(weights, depth / WEIGHTS)
    edit_json(depth / "unet" / "config.json", in_channels=9)
    with pytest.raises(CheckpointError, match="takes 9 channels"):
        load_unet(open_checkpoint(str(depth), "depth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 6}, "takes 6 channels and answers 3"),
        ({"out_channels": 1}, "takes 3 channels and answers 1"),
        ({"shift_factor": 0.1}, r"shift_factor 0\.1.*scaled alone"),
        ({"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}, r"latents_mean \[.*latents_std \["),
    ],
)
def test_a_vae_for_other_pictures_or_of_another_kind(depth, change, message):
    config = AutoencoderKL.load_config(depth / "vae")
    AutoencoderKL.from_config(config, **change).save_pretrained(depth / "vae")
    with pytest.raises(CheckpointError, match=message):
        load_vae(open_checkpoint(str(depth), "depth"))


@pytest.mark.parametrize(
    "wants",
    [
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 4},  # Lotus
        {"num_class_embeds": 3},
        {
            "addition_embed_type": "text_time",  # SDXL
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8,
        },
        {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 32},
    ],
)
def test_a_unet_that_wants_more_than_a_prompt_is_refused_before_any_picture(depth, wants):
    config = UNet2DConditionModel.load_config(depth / "unet")
    UNet2DConditionModel.from_config(config, **wants).save_pretrained(depth / "unet")
    checkpoint = open_checkpoint(str(depth), "depth")
    with pytest.raises(CheckpointError, match=rf"its UNet wants {next(iter(wants))} .*Stable Diffusion"):
        load_heads([checkpoint])


def test_swapped_checkpoints_are_noticed(checkpoints):
    with pytest.raises(CheckpointError, match=r"answers normals.*give one, or swap .* of depthmill label"):
        open_checkpoint(str(checkpoints / "normals"), "depth")


def test_a_checkpoint_that_answers_disparity_is_refused_unless_it_says_otherwise(depth):
    edit_json(depth / "model_index.json", prediction_type="disparity")  # as diffusers' Marigold may have it
    with pytest.raises(CheckpointError, match=r"answers 'disparity'.*given for depth.*another checkpoint"):
        open_checkpoint(str(depth), "depth")
    (depth / "depthmill.json").write_text('{"modality": "depth"}')
    assert open_checkpoint(str(depth), "depth").description.modality == "depth"


@pytest.mark.parametrize("name", ["no/such/place", "nowhere", "owner/not-on-the-hub"])
def test_a_checkpoint_that_is_not_there(name):
    with pytest.raises(CheckpointError, match="no directory"):
        open_checkpoint(name, "depth")


COPIES = ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model.non_ema-00001-of-00002.safetensors"]


def test_copies_beside_the_weights_change_nothing(depth):
    before = open_checkpoint(str(depth), "depth").sha256
    for name in COPIES:
        shutil.copy(depth / WEIGHTS, depth / "unet" / f"diffusion_pytorch_{name}")
    assert open_checkpoint(str(depth), "depth").sha256 == before
    assert Labeler.from_pretrained(depth)


@pytest.mark.parametrize("name", COPIES)
def test_copies_alone_are_no_weights(depth, name):
    (depth / WEIGHTS).rename(depth / "unet" / f"diffusion_pytorch_{name}")
    variant = "non_ema" if "non_ema" in name else "fp16"
    with pytest.raises(CheckpointError, match=rf"unet/ holds only diffusion_pytorch_{name}.*variant='{variant}'"):
        open_checkpoint(str(depth), "depth")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(str(tmp_path / "model.safetensors"), "depth")


def test_axes_of_the_published_and_of_others(checkpoints):
    from depthmill.pipeline.model import checkpoint as module

    published = module._PUBLISHED.items()
    e2e = {f"GonzaloMG/{name}-normals" for name in ("marigold-e2e-ft", "stable-diffusion-e2e-ft", "marigold")}
    assert {name for name, one in published if one.normals_axes == "left-up-towards"} == e2e
    assert {name for name, one in published if not one.clip_normals} == e2e
    assert all(f"-{one.modality}" in name for name, one in published)
    given = open_checkpoint(str(checkpoints / "normals"), "normals", normals_axes="right-down-away")
    assert given.description.normals_axes == "right-down-away"
    with pytest.raises(ConfigError, match="sideways"):
        open_checkpoint(str(checkpoints / "normals"), "normals", normals_axes="sideways")


@pytest.mark.parametrize("described", [None, '{"modality": "normals"}'])
@pytest.mark.parametrize(
    "copy", ["marigold-e2e-ft-normals", "models--GonzaloMG--marigold-e2e-ft-normals/snapshots/0123abcd"]
)
def test_a_copy_of_a_published_checkpoint_has_its_axes(checkpoints, tmp_path, caplog, copy, described):
    directory = shutil.copytree(checkpoints / "normals", tmp_path / copy)
    (directory / "depthmill.json").write_text('{"normals_axes": "right-up-towards"}')  # its own word is better
    description = open_checkpoint(str(directory), "normals").description
    assert description.normals_axes == "right-up-towards"
    assert not description.clip_normals, "what it does not say is still the published one's"
    assert not caplog.records, "nothing is assumed of the axes"
    (directory / "depthmill.json").unlink()
    if described:
        (directory / "depthmill.json").write_text(described)
    for _ in range(2):
        description = open_checkpoint(str(directory), "normals").description
    assert description.normals_axes == "left-up-towards"
    assert not description.clip_normals
    said = [record.levelname for record in caplog.records if "left-up-towards" in record.message]
    assert said == ([] if "snapshots" in copy else ["WARNING"]), "once what is assumed, and no more"


def test_a_published_checkpoints_range_of_z_is_its_index(checkpoints, tmp_path):
    name = "models--prs-eth--marigold-normals-v0-1/snapshots/0123abcd"
    directory = shutil.copytree(checkpoints / "normals", tmp_path / name)
    (directory / "depthmill.json").unlink()
    assert open_checkpoint(str(directory), "normals").description.full_z_range
    edit_json(directory / "model_index.json", use_full_z_range=False)
    assert not open_checkpoint(str(directory), "normals").description.full_z_range


@pytest.mark.parametrize("left", [None, '{"modality": "normals"}'])
def test_axes_of_what_the_papers_trainer_saved_are_asked_for(checkpoints, tmp_path, caplog, left):
    directory = shutil.copytree(checkpoints / "normals", tmp_path / "mine")
    edit_json(directory / "model_index.json", _class_name="StableDiffusionPipeline", prediction_type=None)
    (directory / "depthmill.json").write_text('{"normals_axes": "left-up-towards"}')
    for options in ({}, {"normals_axes": "left-up-towards"}):  # with its depthmill.json, and told
        description = open_checkpoint(str(directory), "normals", **options).description
        assert not description.clip_normals, "its loss left their length free"
        assert not caplog.records
        (directory / "depthmill.json").unlink(missing_ok=True)
    if left:
        (directory / "depthmill.json").write_text(left)
    assert open_checkpoint(str(directory), "normals").description.normals_axes == "right-up-towards"
    assert "taken to be right-up-towards" in caplog.text
    assert "--normals-axes" in caplog.text


@pytest.mark.parametrize("name", ["gonzalomg/Marigold-E2E-FT-Normals", "GonzaloMG/marigold-e2e-ft-normals@v1/a"])
def test_the_hub_s_ids_in_any_case_and_at_a_revision(checkpoints, tmp_path, monkeypatch, name):
    directory = shutil.copytree(checkpoints / "normals", tmp_path / "snapshot")
    (directory / "depthmill.json").unlink()
    asked = []

    def download(hub_id, revision, **patterns):
        asked.append((hub_id, revision))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_checkpoint(name, "normals").description.normals_axes == "left-up-towards"
    assert set(asked) == {(name.partition("@")[0], "v1/a" if "@" in name else None)}


@pytest.mark.parametrize("copy", ["marigold-normals", "marigold-normals-v1-1"])
def test_a_name_that_others_may_have_says_nothing_of_the_axes(checkpoints, tmp_path, copy):
    directory = shutil.copytree(checkpoints / "normals", tmp_path / copy)
    (directory / "depthmill.json").unlink(missing_ok=True)
    assert open_checkpoint(str(directory), "normals").description.normals_axes == "right-up-towards"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt_padding", "pad"),
        ("normals_axes", 3),
        ("normals_axes", "sideways"),
        ("clip_normals", "false"),
        ("modality", "albedo"),
        ("axes", "left-up-towards"),
    ],
)
def test_a_description_is_checked(depth, key, value):
    (depth / "depthmill.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"depthmill\.json: .*{key}.*{value}"):
        open_checkpoint(str(depth), "depth")


@pytest.mark.parametrize(("padding", "tokens"), [("do_not_pad", 2), ("max_length", 77)])
def test_the_empty_prompt_is_padded_as_the_checkpoint_says(checkpoints, tmp_path, padding, tokens):
    path = shutil.copytree(checkpoints / "normals", tmp_path / "normals")
    (path / "depthmill.json").write_text(json.dumps({"prompt_padding": padding}))
    assert empty_prompt(open_checkpoint(str(path), "normals")).shape == (1, tokens, 32)
    (path / "tokenizer" / "tokenizer_config.json").unlink()  # which alone knows how long a prompt may be
    assert empty_prompt(open_checkpoint(str(path), "normals")).shape == (1, tokens, 32)


def test_a_tokenizer_of_another_vocabulary(depth):
    (depth / "tokenizer" / "tokenizer.json").unlink()
    (depth / "tokenizer" / "vocab.json").write_text(json.dumps({"<|startoftext|>": 5, "<|endoftext|>": 6}))
    with pytest.raises(CheckpointError, match=r"tokenizer/ .*index out of range"):
        empty_prompt(open_checkpoint(str(depth), "depth"))


def test_bit_equal_vaes_are_kept_once(checkpoints, tmp_path):
    shared = Labeler.from_pretrained(checkpoints / "depth", checkpoints / "normals", device="cpu")
    assert len(shared._network.folded.encoders) == 1
    other = shutil.copytree(checkpoints / "normals", tmp_path / "normals")
    path = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + 1e-7
    save_file(weights, path)
    apart = Labeler.from_pretrained(checkpoints / "depth", other, device="cpu")
    assert len(apart._network.folded.encoders) == 2


def test_a_text_to_image_model_is_refused_unless_it_says_that_it_answers(tmp_path):
    parts = scratch.build(scratch.Architecture(), seed=0, in_channels=4)
    scratch.save(parts, tmp_path / "sd", None, processing_resolution=48)
    for kind in ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", ["my_pipeline", "MyPipeline"], None):
        edit_json(tmp_path / "sd" / "model_index.json", _class_name=kind)
        with pytest.raises(CheckpointError, match=r"text-to-image.*depthmill train"):
            load_heads([open_checkpoint(str(tmp_path / "sd"), "depth")])
    edit_json(tmp_path / "sd" / "model_index.json", _class_name=["my_pipeline", "MarigoldDepthPipeline"])
    assert load_heads([open_checkpoint(str(tmp_path / "sd"), "depth")])
    edit_json(tmp_path / "sd" / "model_index.json", _class_name="StableDiffusionPipeline")
    (tmp_path / "sd" / "depthmill.json").write_text('{"modality": "depth"}')
    assert Labeler.from_pretrained(str(tmp_path / "sd"))


def test_weights_are_counted_of_what_sees_each_picture(checkpoints):
    pair = [open_checkpoint(str(checkpoints / name), name) for name in ("depth", "normals")]
    parts = [load(checkpoint) for checkpoint in pair for load in (load_vae, load_unet)]
    assert count_weights(pair) == sum(weight.numel() for part in parts for weight in part.state_dict().values())
