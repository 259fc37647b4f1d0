from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import MarigoldDepthPipeline, MarigoldNormalsPipeline
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from depthmill.pipeline.model import scratch
from depthmill.pipeline.types import Modality

PIPELINES = {"depth": MarigoldDepthPipeline, "normals": MarigoldNormalsPipeline}
DEMO = Path(__file__).parents[3] / "pipeline" / "model" / "demo"
PARTS = {"unet", "vae", "scheduler", "tokenizer", "text_encoder"}


@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_loads_in_diffusers_and_its_answer_varies(tmp_path: Path, modality: Modality) -> None:
    scratch.create(tmp_path, scratch.Architecture(), modality, seed=1, processing_resolution=64)

    pipeline = PIPELINES[modality].from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == PARTS
    assert pipeline.default_processing_resolution == 64
    assert pipeline.default_denoising_steps == 1
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.tokenizer("").input_ids == [0, 1]

    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    latents = torch.zeros(1, 4, 12, 16)
    prediction = torch.as_tensor(pipeline(image, latents=latents, output_type="pt").prediction)
    assert prediction.std(dim=(-1, -2)).min() > 0.02


def test_only_normals_describe_their_axes(tmp_path: Path) -> None:
    for modality in ("depth", "normals"):
        scratch.create(tmp_path / modality, scratch.Architecture(), modality, seed=1)
    assert not (tmp_path / "depth" / "depthmill.json").exists()
    assert json.loads((tmp_path / "normals" / "depthmill.json").read_text()) == {
        "normals_axes": "right-up-towards",
        "clip_normals": True,
    }


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scratch.create(tmp_path / name, scratch.Architecture(), "depth", seed=seed)
    assert torch.equal(before, torch.get_rng_state())

    weights = [load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in "abc"]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0]["conv_in.weight"], weights[2]["conv_in.weight"])


def test_half_precision_on_disk_leaves_the_modules_in_single(tmp_path: Path) -> None:
    parts = scratch.build(scratch.Architecture(), seed=0, prediction_type="sample", in_channels=4)
    scratch.save(parts, tmp_path, "depth", processing_resolution=96, dtype=torch.float16)
    assert parts.unet.dtype == torch.float32
    for part in ("unet", "vae"):
        weights = load_file(tmp_path / part / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["in_channels"] == 4
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "sample"


def test_the_files_that_transformers_4_reads_are_the_tokenizers_own(tmp_path: Path) -> None:
    scratch.create(tmp_path, scratch.Architecture(), "depth", seed=0)  # another checkpoint's files must not stay
    vocabulary = ["<|startoftext|>", "<|endoftext|>", "!", "a", "b</w>", "ab</w>"]
    tokenizer = CLIPTokenizer(
        vocab={word: i for i, word in enumerate(vocabulary)}, merges=[("a", "b</w>")], pad_token="!"
    )
    parts = replace(scratch.build(scratch.Architecture(), seed=0), tokenizer=tokenizer)
    scratch.save(parts, tmp_path, "depth", processing_resolution=96)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    read = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read("ab").input_ids == [0, 5, 1]
    assert read.pad_token == "!"


def test_weights_may_be_read_by_whoever_may_read_the_rest(tmp_path: Path) -> None:
    scratch.create(tmp_path, scratch.Architecture(), "depth", seed=0)
    modes = {path.stat().st_mode for path in tmp_path.glob("*/*") if path.suffix in (".json", ".safetensors")}
    assert modes == {(tmp_path / "model_index.json").stat().st_mode}


def test_text_encoders_have_the_names_that_every_transformers_reads(tmp_path: Path) -> None:
    scratch.create(tmp_path, scratch.Architecture(), "depth", seed=0)
    for checkpoint in (tmp_path, DEMO / "depth", DEMO / "normals"):
        weights = load_file(checkpoint / "text_encoder" / "model.safetensors")
        assert {key.split(".")[0] for key in weights} == {"text_model"}


@pytest.mark.parametrize(
    "wrong",
    [{"unet_attention": (True,)}, {"norm_groups": 5}, {"head_channels": 24}, {"no_such_size": 1}],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        scratch.Architecture.model_validate(wrong)
