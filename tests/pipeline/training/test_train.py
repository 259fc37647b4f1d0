"""The trainer: what it learns, and that what it leaves loads everywhere."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthmill.pipeline.config_files import load_config
from depthmill.pipeline.errors import CheckpointError, ConfigError, TrainingError
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.training import losses, start
from depthmill.pipeline.training import train as train_module
from depthmill.pipeline.training.config import TrainConfig
from depthmill.pipeline.training.from_scratch.config import StagedConfig
from depthmill.pipeline.training.objectives import Objective
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.train import train
from depthmill.tests.pipeline.training.tiny import ARCHITECTURE, config, table, weights


@pytest.fixture(autouse=True)
def _new_accelerate():
    """Let each run of a test choose its device and precision: accelerate settles them once a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_papers_whole_way(scene_pool, tmp_path):
    """VAE, generative model, estimator, fine-tuning: each starts from the one before, and the last one labels."""
    runs = []
    for name, objective in (("a", "autoencoder"), ("b", "generative"), ("c", "diffusion"), ("d", "end_to_end")):
        settings = {"start": str(runs[-1])} if runs else {}
        runs.append(train(config(scene_pool, objective=objective, modality="normals", **settings), tmp_path / name))
    vaes = [weights(tmp_path / name, "vae") for name in "abcd"]
    assert all(torch.equal(vaes[0][key], other[key]) for other in vaes[1:] for key in vaes[0]), "the VAE is frozen"
    assert [weights(tmp_path / name)["conv_in.weight"].shape[1] for name in "abcd"] == [4, 4, 8, 8]
    vae = diffusers.AutoencoderKL.from_pretrained(runs[0] / "vae")
    pictures = open_set(config(scene_pool).sets[0], "depth")
    with torch.no_grad():
        latents = torch.cat([vae.encode(pictures.read(i).rgb * 2 - 1).latent_dist.mean for i in range(20)])
    assert vae.config.scaling_factor * latents.std() == pytest.approx(1, abs=0.1)

    said = [open_checkpoint(str(run), "normals").description for run in runs]
    assert [one.modality for one in said] == [None, None, "normals", "normals"]
    assert [one.clip_normals for one in said[2:]] == [True, False], "end to end, their length is free"
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), np.uint8)
    labels = Labeler.from_pretrained(runs[-1], runs[-1], labels=("normals",), device="cpu")(frames)
    pipe = diffusers.MarigoldNormalsPipeline.from_pretrained(runs[-1])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    theirs = pipe(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        num_inference_steps=1,
        latents=torch.zeros(2, 4, 12, 16),
        output_type="np",
    ).prediction
    cosine = (labels.normals * theirs).sum(-1)
    assert np.median(cosine) > 0.999  # theirs clips before it normalises, and decodes `prev_sample`


def test_a_depth_checkpoint_is_one_to_diffusers(scene_pool, tmp_path):
    made = train(config(scene_pool, steps=1), tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 32, 3), np.uint8)
    labels = Labeler.from_pretrained(made, device="cpu")(frames)
    pipe = diffusers.MarigoldDepthPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        torch.from_numpy(frames).permute(0, 3, 1, 2),
        num_inference_steps=1,
        latents=torch.zeros(2, 4, 12, 16),
        output_type="np",
    ).prediction[..., 0]
    assert np.corrcoef(labels.depth.ravel(), theirs.ravel())[0, 1] > 0.999


def test_end_to_end_learns(scene_pool, tmp_path):
    held_out = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32}
    settings = config(
        scene_pool,
        modality="normals",
        steps=40,
        batch_size=8,
        held_out=held_out,
        held_out_pictures=2,
        save_steps=40,
        picture_steps=30,
    )
    train(settings, tmp_path)
    loss = [float(row["loss"]) for row in table(tmp_path)]
    assert np.mean(loss[-10:]) < 0.85 * np.mean(loss[:10])
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == ["000030.png", "000040.png"]
    (events,) = (tmp_path / "tensorboard").rglob("events.*")
    board = EventAccumulator(str(events)).Reload()
    assert [scalar.value for scalar in board.Scalars("loss")] == pytest.approx(loss)
    assert [scalar.step for scalar in board.Scalars("held_out/mean angle")] == [30, 40]


def test_scenes_that_are_held_out_are_scored_in_their_range_of_depths(scene_pool, tmp_path, monkeypatch):
    held_out = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32}
    settings = config(scene_pool, held_out=held_out, batch_size=16)
    scored = Objective(start.load(settings), settings)
    pictures = train_module._held_out(settings)
    monkeypatch.setattr(scored, "answer", lambda rgb, draws: pictures.target.expand_as(rgb) / 100 - 1)  # perfect
    sheets = []
    monkeypatch.setattr(train_module, "draw_sheet", lambda rows, path: sheets.append(rows))
    assert train_module.score(scored, pictures, tmp_path / "a.png")["AbsRel"] < 1e-4
    depth, shown = (one[0, 0][pictures.mask[0]] for one in (pictures.target, sheets[0][1]))
    assert (shown[depth.argmin()], shown[depth.argmax()]) == (1, 0), "near is bright"
    beyond = replace(pictures, target=2 * pictures.target + 80)  # of what a scene's may be
    error = (1 - 80 / beyond.target)[beyond.mask[:, None]].mean()
    assert train_module.score(scored, beyond, tmp_path / "b.png")["AbsRel"] == pytest.approx(float(error), rel=0.1)


@pytest.mark.parametrize("objective", ["end_to_end", "autoencoder"])
def test_pictures_are_scored_as_many_at_once_as_are_trained_on(scene_pool, tmp_path, monkeypatch, objective):
    held_out = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32}
    found, sizes = [], []
    for few in (3, 16):
        settings = config(scene_pool, held_out=held_out, batch_size=few, objective=objective, noise="zeros")
        scored = Objective(start.load(settings), settings)
        encode = scored.encode
        monkeypatch.setattr(scored, "encode", lambda part, encode=encode: (sizes.append(len(part)), encode(part))[1])
        found.append(train_module.score(scored, train_module._held_out(settings), tmp_path / "a.png"))
    assert sizes == [3, 3, 3, 3, 3, 1, 16]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_pictures_that_the_vae_would_cut_are_refused_before_anything_is_trained(scene_pool, odd_pool, tmp_path):
    odd = {"kind": "scenes", "path": odd_pool, "scenes": 100, "height": 25, "width": 34}
    settings = config(scene_pool, held_out=odd)
    with pytest.raises(TrainingError, match=r"34x25; expected multiples of 2, .* height 24 and width 34"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "losses.csv").exists()
    with pytest.raises(TrainingError, match=r"34x25; expected multiples of 2"):
        train(config(scene_pool, sets=[odd]), tmp_path / "run")


def test_accumulated_gradients_are_those_of_the_larger_batch(scene_pool, tmp_path, monkeypatch):
    # Pooled, a picture's weight would depend on what else is in its micro-batch.
    by_picture = losses.depth_loss
    monkeypatch.setattr(losses, "depth_loss", lambda *args, pooled: by_picture(*args, pooled=False))
    common = {"steps": 2, "augment": {"flip": False}}
    train(config(scene_pool, batch_size=4, accumulation=1, **common), tmp_path / "large")
    train(config(scene_pool, batch_size=2, accumulation=2, **common), tmp_path / "small")
    large, small = weights(tmp_path / "large"), weights(tmp_path / "small")
    assert [float(row["loss"]) for row in table(tmp_path / "large")] == pytest.approx(
        [float(row["loss"]) for row in table(tmp_path / "small")], rel=1e-4
    )
    error = max(float((large[name] - small[name]).abs().max()) for name in large)
    assert error < 2e-4  # of two steps of AdamW, which makes much of gradients near 0


def test_the_average_is_what_is_scored_and_saved(scene_pool, tmp_path, monkeypatch):
    settings = {"steps": 3, "save_steps": 1, "picture_steps": 1}
    train(config(scene_pool, **settings), tmp_path / "raw")
    held_out = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32}
    settings |= {"ema": 0.999, "held_out": held_out, "held_out_pictures": 1}
    score, scored = train_module.score, []

    def noted(objective, *given):
        scored.append(objective.unet.conv_in.weight.clone())
        return score(objective, *given)

    monkeypatch.setattr(train_module, "score", noted)
    train(config(scene_pool, **settings), tmp_path / "average")
    first = start.load(config(scene_pool)).parts.unet.state_dict()["conv_in.weight"]
    raw, average = (weights(tmp_path / name)["conv_in.weight"] for name in ("raw", "average"))
    assert 0 < (average - first).abs().max() < (raw - first).abs().max()
    assert torch.equal(scored[-1], average)
    assert table(tmp_path / "average") == table(tmp_path / "raw"), "it is not what is trained on"


def test_a_step_is_as_long_as_the_schedule_and_decays_as_it_is_told(scene_pool, tmp_path):
    """Without a gradient to speak of, only the decay of weights is left: the learning rate times its own."""
    settings = config(scene_pool, steps=1, gradient_clip=1e-15, weight_decay=20.0)
    begun = start.load(settings).parts.unet.state_dict()
    train(settings, tmp_path)
    for name, weight in weights(tmp_path).items():  # half of the peak, in the first of two steps of warm-up
        torch.testing.assert_close(weight, begun[name] * (1 - 0.5e-3 * 20), rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["marigold", "stable-diffusion"])
@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_the_papers_runs_are_configured_as_the_paper_has_them(start, modality):
    shipped = load_config(TrainConfig, f"train-{start}-{modality}", {})
    assert (shipped.objective, shipped.modality, shipped.noise) == ("end_to_end", modality, "zeros")
    assert [(each.kind, each.ratio) for each in shipped.sets] == [("hypersim", 9), ("vkitti2", 1)]
    assert (shipped.steps, shipped.batch_size, shipped.accumulation) == (20_000, 2, 16)
    assert (shipped.learning_rate, shipped.warmup_steps, shipped.final_learning_rate) == (3e-5, 100, 0.01)


def test_gradient_checkpointing_changes_no_loss(scene_pool, tmp_path):
    train(config(scene_pool, steps=2), tmp_path / "plain")
    train(config(scene_pool, steps=2, gradient_checkpointing=True), tmp_path / "checkpointed")
    plain, checkpointed = ([float(row["loss"]) for row in table(tmp_path / n)] for n in ("plain", "checkpointed"))
    assert checkpointed == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param(None, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("modality", ["depth", "normals"])
def test_half_precision_is_near_to_single(scene_pool, tmp_path, modality, device):
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = config(scene_pool, modality=modality, mixed_precision=precision, gradient_checkpointing=True)
        train(settings, tmp_path / precision, device=device)
    single, half = ([float(row["loss"]) for row in table(tmp_path / name)] for name in ("no", "bf16"))
    assert half != single
    assert half[0] == pytest.approx(single[0], rel=0.01)
    assert half == pytest.approx(single, rel=0.2)  # they part company, a little with every step
    assert next(iter(weights(tmp_path / "bf16").values())).dtype == torch.float32


def test_widened_conv_in_answers_two_equal_latents_as_one_up_to_the_bias(scene_pool):
    unet = start.load(config(scene_pool, objective="generative")).parts.unet
    latent = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    narrow, bias = unet.conv_in(latent), unet.conv_in.bias[:, None, None]
    start.widen(unet)
    assert unet.config.in_channels == 8
    torch.testing.assert_close(unet.conv_in(torch.cat([latent, latent], 1)), narrow - bias / 2)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_state(scene_pool, tmp_path):
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan, its gradient's norm .*: lower learning_rate"):
        # Adam's first steps are as long as the learning rate, whatever the gradient.
        train(config(scene_pool, learning_rate=1e30, warmup_steps=1, save_steps=1), tmp_path)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000001"]


def test_a_gradient_that_is_no_number_is_not_saved(scene_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(torch.inf))
    with pytest.raises(TrainingError, match="its gradient's norm inf"):
        train(config(scene_pool, save_steps=1), tmp_path)
    assert not list(tmp_path.glob("states/*"))


@pytest.fixture
def scaled(monkeypatch):
    """Scale gradients as float16 has them scaled, which a CPU does not train in."""

    def scaled(**options):
        def accelerator(**settings):
            made = Accelerator(**(settings | {"mixed_precision": "no"}))
            made.scaler = torch.amp.GradScaler("cpu", **options)
            return made

        monkeypatch.setattr(train_module, "Accelerator", accelerator)

    return scaled


@pytest.mark.parametrize(
    ("growth", "overflowed"),
    [({}, "1000"), ({"growth_factor": 1e4, "growth_interval": 1}, "1010")],
    ids=["once", "twice"],
)
def test_steps_left_out_for_an_overflow_are_counted(scene_pool, tmp_path, scaled, monkeypatch, growth, overflowed):
    scaled(init_scale=3e38, backoff_factor=1e-4, **growth)
    monkeypatch.setattr(train_module, "_OVERFLOWS", 2)  # in a row, which none are here
    train(config(scene_pool, mixed_precision="fp16"), tmp_path)
    assert "".join(row["overflowed"] for row in table(tmp_path)) == overflowed


def test_a_run_whose_every_step_overflows_ends(scene_pool, tmp_path, scaled, monkeypatch):
    scaled(init_scale=torch.inf)
    monkeypatch.setattr(train_module, "_OVERFLOWS", 3)
    for steps, last in ((8, 2), (2, 1)):
        with pytest.raises(TrainingError, match=rf"step {last}: .* overflowed at {last + 1} steps .*precision bf16"):
            train(config(scene_pool, mixed_precision="fp16", steps=steps), tmp_path / str(steps))
        assert not (tmp_path / str(steps) / "checkpoint").exists()


def test_float16_is_refused_where_nothing_would_be_in_it(scene_pool, tmp_path):
    with pytest.raises(ConfigError, match=r"mixed_precision is fp16, .* on cpu: give bf16 or no"):
        train(config(scene_pool, mixed_precision="fp16"), tmp_path, device="cpu")


@pytest.mark.gpu
def test_float16_learns_on_a_gpu(scene_pool, tmp_path):
    train(config(scene_pool, mixed_precision="fp16", steps=8), tmp_path)
    assert "0" in {row["overflowed"] for row in table(tmp_path)}


def test_a_gpu_that_is_too_small_ends_the_run_with_what_to_change(scene_pool, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Objective, "forward", full)
    with pytest.raises(TrainingError, match=r"batch_size is 2, .*Tried to allocate 20.00 GiB.*gradient_checkpointing"):
        train(config(scene_pool), tmp_path)


def test_a_device_that_is_not_there_is_refused(scene_pool, tmp_path):
    with pytest.raises(ConfigError, match="device is 'cuda:99', which torch cannot use"):
        train(config(scene_pool), tmp_path, device="cuda:99")


def test_processes_wait_for_one_that_writes_to_a_slow_disk(scene_pool, tmp_path, monkeypatch):
    asked = {}

    def join(**options):
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(InterruptedError):
        train_module._accelerator(config(scene_pool), tmp_path, "cpu")
    assert asked["timeout"] >= timedelta(hours=1), "NCCL's own is 10 minutes, for a state of 14 GB"


def test_a_device_that_accelerate_does_not_take_is_refused(scene_pool, tmp_path):
    with pytest.raises(ConfigError, match=r"device is 'meta', but accelerate gives this process, one of 1, c\w+"):
        train(config(scene_pool), tmp_path, device="meta")


@pytest.mark.gpu
def test_the_device_that_was_asked_for_is_trained_on(scene_pool, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(start, "save", lambda begun, *_: used.append(begun.parts.unet.device))
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    train(config(scene_pool, steps=1), tmp_path, device=str(last))
    assert used == [last]


def test_what_is_saved_is_what_was_trained(scene_pool, tmp_path):
    begun = train(config(scene_pool, steps=1, modality="normals"), tmp_path / "start")
    (begun / "depthmill.json").write_text('{"prompt_padding": "max_length", "normals_axes": "left-up-towards"}')
    schedule = begun / "scheduler" / "scheduler_config.json"
    changes = {"clip_sample": True, "timestep_spacing": "leading"}
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | changes))
    options = {"processing_resolution": 40, "save_dtype": "float16", "modality": "normals"}
    made = train(config(scene_pool, steps=1, start=str(begun), **options), tmp_path / "made")
    opened = open_checkpoint(str(made), "normals")
    assert opened.processing_resolution == 40
    assert (opened.description.prompt_padding, opened.description.normals_axes) == ("max_length", "left-up-towards")
    saved = json.loads((made / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["clip_sample"], saved["timestep_spacing"]) == (False, "trailing")
    assert weights(tmp_path / "made")["conv_in.weight"].dtype == torch.float16


def test_a_start_may_be_in_a_home_folder(scene_pool, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config(scene_pool, start="~/a").start == "/home/somebody/a"


def test_a_start_of_the_wrong_kind_is_refused(scene_pool, tmp_path):
    made = train(config(scene_pool, steps=1), tmp_path)
    with pytest.raises(TrainingError, match="takes 8 channels"):
        start.load(config(scene_pool, start=str(made), objective="generative"))
    with pytest.raises(ConfigError, match="either start"):
        config(scene_pool, start=str(made), architecture=ARCHITECTURE)


def test_a_start_that_wants_more_than_pictures_and_a_prompt_is_refused(scene_pool, tmp_path):
    made = train(config(scene_pool, steps=1), tmp_path)
    unet = diffusers.UNet2DConditionModel.load_config(made / "unet")
    diffusers.UNet2DConditionModel.from_config(unet, num_class_embeds=3).save_pretrained(made / "unet")
    with pytest.raises(CheckpointError, match=r"its UNet wants num_class_embeds 3; expected Stable Diffusion"):
        start.load(config(scene_pool, start=str(made)))
    (made / "text_encoder").rename(made / "image_encoder")  # as a GeoWizard checkpoint has it
    (made / "feature_extractor").mkdir()
    (made / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"answers depth and normals together.*start from Stable Diffusion"):
        start.load(config(scene_pool, start=str(made)))


def test_an_autoencoder_that_would_never_see_depth_is_refused(scene_pool):
    with pytest.raises(ConfigError, match="batch_size is 1; an autoencoder needs 2"):
        config(scene_pool, objective="autoencoder", batch_size=1)
    assert config(scene_pool, batch_size=1).batch_size == 1


@pytest.mark.parametrize(
    "ignored",
    [
        {"noise": "gaussian", "objective": "generative"},
        {"augment": {"smallest_cut": 0.5}},
    ],
    ids=lambda ignored: next(iter(ignored)),
)
def test_an_option_that_the_objective_does_not_heed_is_refused(scene_pool, ignored):
    with pytest.raises(ConfigError, match=rf"{next(iter(ignored))}: .*give height|{next(iter(ignored))} is .*leave it"):
        config(scene_pool, **ignored)


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_twice_the_accumulation(scene_pool, tmp_path):
    (damaged,) = scene_pool.rglob("*.npy")
    scenes = np.load(damaged)
    scenes["depth"][::3] = np.inf  # nothing but sky: skipped
    copy = tmp_path / damaged.relative_to(scene_pool)
    copy.parent.mkdir()
    np.save(copy, scenes)
    train(config(tmp_path, accumulation=2), tmp_path / "one")
    settings = config(tmp_path, accumulation=1).model_dump(mode="json", exclude_none=True)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    train_it = ["-m", "depthmill.cli", "train", tmp_path / "two.yaml", "--out", tmp_path / "two", "--device", "cpu"]
    done = subprocess.run([*launch, *train_it], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("step 4/4") == 1
    skipped = [[row["skipped"] for row in table(tmp_path / name)] for name in ("one", "two")]
    assert skipped[0] == skipped[1]
    assert float(skipped[0][-1]) > 0
    one, two = ([float(row["loss"]) for row in table(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    whole, shared = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max(float((whole[name] - shared[name]).abs().max()) for name in whole) < 1e-4


@pytest.mark.parametrize("kind", [TrainConfig, StagedConfig])
def test_a_seed_that_numpy_would_not_take_is_refused(kind):
    with pytest.raises(ValidationError, match=r"seed\n.*greater than or equal to 0"):
        kind.model_validate({"seed": -1})
