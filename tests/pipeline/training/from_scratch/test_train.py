from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from depthmill.pipeline.config_files import load_config
from depthmill.pipeline.errors import CheckpointError, ConfigError, RunStoppedError, TrainingError
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.modules import load_vae
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.folder import read_config, write_config
from depthmill.pipeline.training.from_scratch import data, network
from depthmill.pipeline.training.from_scratch import train as train_module
from depthmill.pipeline.training.from_scratch.config import Stage, StagedConfig
from depthmill.pipeline.training.from_scratch.optimizer import Optimizer
from depthmill.pipeline.training.from_scratch.train import train
from depthmill.pipeline.training.pool import open_pool

ROOT = Path(__file__).parents[4]


def config(scene_pool: Path, *, small_steps: int = 4, **changes: object) -> StagedConfig:
    stage = {"scenes": 100, "batch_size": 3, "height": 24, "width": 32, "learning_rate": 1e-3, "warmup_steps": 2}
    base = {
        "architecture": {"vae_channels": (8, 16, 16), "unet_channels": (16, 32), "norm_groups": 4},
        "processing_resolution": 32,
        "data": {"pool": scene_pool, "height": 24, "width": 32},
        "save_steps": 2,
        "picture_steps": 100,
        "stages": [
            {**stage, "name": "vae", "objective": "autoencoder", "steps": 2},
            {**stage, "name": "both", "objective": "end_to_end", "steps": small_steps},
        ],
    }
    return StagedConfig.model_validate(base | changes)


def losses(run: Path) -> list[list[str]]:
    with (run / "losses.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(autouse=True, scope="module")
def _held_out() -> Iterator[None]:
    """The scenes that runs draw are the same for all, and rendered once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "view", cache(scenes.view))
        yield


@pytest.fixture(scope="module")
def trained(scene_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `config(scene_pool)`; who goes on in it copies it."""
    run = tmp_path_factory.mktemp("trained")
    train(config(scene_pool), run)
    return run


class KilledError(Exception):
    """Stands in for the death of the process."""


@pytest.mark.parametrize("killed_after", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(
    scene_pool: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int
) -> None:
    step, calls = train_module._step, 0

    def dying(*args: object) -> dict[str, float]:
        nonlocal calls
        if calls == killed_after:
            raise KilledError
        calls += 1
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_step", dying)
        with pytest.raises(KilledError):
            train(config(scene_pool), tmp_path / "broken")
    train(config(scene_pool), tmp_path / "broken")

    assert losses(tmp_path / "broken") == losses(trained)
    assert len(losses(tmp_path / "broken")) == 1 + 2 + 4
    name = "checkpoint/depth/unet/diffusion_pytorch_model.safetensors"
    weights = [load_file(run / name) for run in (tmp_path / "broken", trained)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_what_a_run_leaves_behind(scene_pool: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoint"
    vae, other = (
        load_file(checkpoints / m / "vae" / "diffusion_pytorch_model.safetensors") for m in ("depth", "normals")
    )
    assert all(torch.equal(vae[key], other[key]) for key in vae)
    unet, other = (
        load_file(checkpoints / m / "unet" / "diffusion_pytorch_model.safetensors") for m in ("depth", "normals")
    )
    # One network was trained for both; only what it answers with is each modality's own.
    assert torch.equal(unet["conv_in.weight"], other["conv_in.weight"])
    assert unet["conv_out.weight"].shape[0] == 4
    assert not torch.equal(unet["conv_out.weight"], other["conv_out.weight"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    # Nothing is left to do, so nothing is done, until a stage is added.
    before = losses(tmp_path)
    train(config(scene_pool), tmp_path)
    assert losses(tmp_path) == before
    longer = config(scene_pool).model_dump()
    longer["stages"] += ({**longer["stages"][1], "name": "more", "steps": 1},)
    train(StagedConfig.model_validate(longer), tmp_path)
    assert losses(tmp_path)[:-1] == before


def test_another_run_is_refused_but_for_stages_to_come(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = train_module._step

    def dying(*args: object) -> dict[str, float]:
        if any(isinstance(arg, Stage) and arg.name == "both" for arg in args):
            raise KilledError
        return step(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_step", dying)
        with pytest.raises(KilledError):
            train(config(scene_pool, seed=1), tmp_path)
    before = losses(tmp_path)
    with pytest.raises(TrainingError, match="another seed"):
        train(config(scene_pool, seed=2), tmp_path)
    changed = config(scene_pool, seed=1).model_dump()
    changed["stages"][0]["learning_rate"] = 5e-4
    with pytest.raises(TrainingError, match="another stages"):
        train(StagedConfig.model_validate(changed), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_step", dying)
        with pytest.raises(KilledError):  # before anything of its own is saved
            train(config(scene_pool, seed=2), tmp_path, overwrite=True)
    train(config(scene_pool, seed=2), tmp_path)
    assert len(losses(tmp_path)) == 1 + 2 + 4
    assert losses(tmp_path)[1] != before[1]


def test_a_run_without_stages_stays_as_it_is_unless_overwritten(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, {"steps": 4})
    (tmp_path / "losses.csv").write_text("step,loss\n1,0.5\n")
    (tmp_path / "states").mkdir()
    with pytest.raises(TrainingError, match="holds a run without stages"):
        train(config(scene_pool), tmp_path)
    assert read_config(tmp_path) == {"steps": 4}
    monkeypatch.setattr(train_module, "_stage", Mock(side_effect=KilledError))
    with pytest.raises(KilledError):
        train(config(scene_pool), tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_one_of_several_processes_is_refused(scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one of 2: call depthmill train itself"):
        train(config(scene_pool), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train_module._autoencoder
    monkeypatch.setattr(
        train_module,
        "_autoencoder",
        lambda net, views: {key: value * torch.nan for key, value in original(net, views).items()},
    )
    with pytest.raises(TrainingError, match=r"stage 'vae', step 0: the loss is nan"):
        train(config(scene_pool), tmp_path)


def test_threads_give_the_mean_of_their_parts_gradients(scene_pool: Path) -> None:
    run = config(scene_pool)
    net = network.build(run.architecture, 0, torch.device("cpu"))
    views = open_pool(scene_pool, 100, 24, 32, processes=1).read(np.arange(6))
    parameter = net.modules["unet"].conv_out.weight
    differentiated = train_module._differentiated(net, run.stages[1], run)
    trained = list(net.modules.parameters())
    together = train_module._gradients(differentiated, trained, views, 2)
    gradient = parameter.grad.clone()
    parts = []
    for half in (views[:3], views[3:]):
        terms = train_module._gradients(differentiated, trained, half, 1)
        parts.append((float(terms["loss"]), parameter.grad.clone()))
    assert float(together["loss"]) == pytest.approx((parts[0][0] + parts[1][0]) / 2, rel=1e-5)
    torch.testing.assert_close(gradient, (parts[0][1] + parts[1][1]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_fused_optimizer_moves_each_weight_by_its_own_gradient(scene_pool: Path, threads: int) -> None:
    """It pairs what lies at the same place in memory, in whatever order gradients and weights lie there."""
    run = config(scene_pool)
    net = network.build(run.architecture, 0, torch.device("cpu"))
    trained = list(net.modules.parameters())
    differentiated = train_module._differentiated(net, run.stages[1], run)
    views = open_pool(scene_pool, 100, 24, 32, processes=1).read(np.arange(6))
    train_module._gradients(differentiated, trained, views, threads)
    expected = {i: weight.detach() - weight.grad for i, weight in enumerate(trained) if weight.grad is not None}
    torch.optim.SGD(trained, lr=1.0, fused=True).step()
    assert len(expected) > 100
    for i, weight in expected.items():
        torch.testing.assert_close(trained[i].detach(), weight)


def test_no_picture_outweighs_the_median_one(scene_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient = torch.randn(6, 4, 3, 3)  # three pictures, each of two modalities
    gradient[1::3] *= 1000
    held = train_module._held(gradient)
    lengths = [torch.cat([g[i::3].flatten() for i in range(3)]).view(3, -1).norm(dim=1) for g in (gradient, held)]
    torch.testing.assert_close(lengths[1], lengths[0].clamp(max=float(lengths[0].median())))
    torch.testing.assert_close(
        torch.nn.functional.normalize(held[1], dim=0), torch.nn.functional.normalize(gradient[1], dim=0)
    )

    run = config(scene_pool)
    net = network.build(run.architecture, 0, torch.device("cpu"))
    seen = []
    monkeypatch.setattr(train_module, "_held", lambda g: seen.append(g.shape) or 0 * g)
    trained = list(net.modules["unet"].parameters())
    views = open_pool(scene_pool, 100, 24, 32, processes=1).read(np.arange(3))
    _, gradients = train_module._differentiated(net, run.stages[1], run)(views)
    assert seen == [(6, 4, 6, 8)]
    assert not any(
        g.any() for p, g in zip(net.modules.parameters(), gradients, strict=True) if p in set(trained) and g is not None
    )


def differentiated(scene_pool: Path) -> tuple[network.Network, list[torch.nn.Parameter]]:
    """A network and its weights, with their gradients of a batch."""
    run = config(scene_pool)
    net = network.build(run.architecture, 0, torch.device("cpu"))
    weights = list(net.modules.parameters())
    views = open_pool(scene_pool, 100, 24, 32, processes=1).read(np.arange(3))
    train_module._gradients(train_module._differentiated(net, run.stages[1], run), weights, views, 1)
    return net, weights


def test_muon_moves_the_unets_matrices_in_all_directions_alike(scene_pool: Path) -> None:
    net, trained = differentiated(scene_pool)
    before = {name: weight.detach().clone() for name, weight in net.modules.named_parameters()}
    optimizer = Optimizer(net, trained)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()
    moved = {name: weight.detach() - before[name] for name, weight in net.modules.named_parameters()}
    matrix = moved["unet.mid_block.resnets.0.conv1.weight"].permute(0, 2, 3, 1).flatten(1)
    sizes = torch.linalg.svdvals(matrix)
    assert sizes[-1] > 0.4 * sizes[0], "an orthogonal matrix, nearly"
    assert matrix.square().mean().sqrt() == pytest.approx(0.2e-2, rel=0.3), "a fifth of the learning rate"
    gradient = net.modules["unet"].mid_block.resnets[0].conv1.weight.grad
    assert (matrix * gradient.permute(0, 2, 3, 1).flatten(1)).sum() < 0
    for name in ("unet.conv_in.weight", "unet.conv_out.weight", "unet.mid_block.resnets.0.norm1.weight"):
        step = moved[name][net.modules.get_parameter(name).grad != 0].abs()
        torch.testing.assert_close(step, torch.full_like(step, 1e-2), rtol=0.05, atol=0)  # AdamW's first step


def test_a_state_that_was_loaded_does_not_keep_its_learning_rate(scene_pool: Path) -> None:
    net, weights = differentiated(scene_pool)
    before = Optimizer(net, weights)
    before.step()
    after = Optimizer(net, weights)
    after.load_state_dict(before.state_dict())
    for group in after.param_groups:
        group["lr"] = 0.0
    there = [weight.detach().clone() for weight in weights]
    after.step()
    assert all(torch.equal(weight, was) for weight, was in zip(weights, there, strict=True))


def test_a_torch_without_muon_is_refused(scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TrainingError, match=r"torch >= 2\.9"):
        train(config(scene_pool), tmp_path)


def test_a_run_of_another_optimizer_does_not_go_on(scene_pool: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    state = torch.load(tmp_path / "state.pt")
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    torch.save(
        {**state, "stage": 1, "step": 2, "optimizer": torch.optim.AdamW(parameters).state_dict()}, tmp_path / "state.pt"
    )
    with pytest.raises(TrainingError, match="an earlier version began"):
        train(config(scene_pool), tmp_path)


def test_held_out_scenes_are_of_a_size_that_the_network_takes(scene_pool: Path, tmp_path: Path) -> None:
    run = config(scene_pool, processing_resolution=50)  # 37.5 rows
    views = train_module._held_out(run, torch.device("cpu"))
    assert views.depth.shape[1:] == (36, 48)
    net = network.build(run.architecture, 0, torch.device("cpu"))
    assert "AbsRel" in train_module.draw(net, views, tmp_path / "a.png")


def test_training_lowers_the_loss(scene_pool: Path, tmp_path: Path) -> None:
    train(config(scene_pool, small_steps=24, save_steps=100), tmp_path)
    rows = [float(row[3]) for row in losses(tmp_path)[1:] if row[0] == "both"]
    assert sum(rows[-8:]) < 0.9 * sum(rows[:8])


def test_a_run_goes_on_from_what_another_left(scene_pool: Path, trained: Path, tmp_path: Path) -> None:
    first, checkpoints = config(scene_pool), trained / "checkpoint"
    state = torch.load(trained / "state.pt")["modules"]
    net = network.build(first.architecture, 7, torch.device("cpu"))
    net.load(str(checkpoints))
    prompt = network.build(first.architecture, first.seed, torch.device("cpu")).prompt
    torch.testing.assert_close(net.prompt, prompt, rtol=1e-2, atol=1e-3)
    for name, value in net.modules.state_dict().items():  # written in half precision
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-4)

    second = config(
        scene_pool, start=str(checkpoints), mixed_precision="bf16", stages=[{**first.model_dump()["stages"][1]}]
    )
    train(second, tmp_path / "second")
    gone_on = float(losses(tmp_path / "second")[1][3])
    assert gone_on < float(losses(trained)[3][3])  # less than that stage's first loss in the first run


def test_a_start_and_a_pool_may_be_in_a_home_folder(scene_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    run = config(scene_pool, start="~/a", data={"pool": "~/pool", "height": 24, "width": 32})
    assert (run.start, run.data.pool) == ("/home/somebody/a", Path("/home/somebody/pool"))


def test_a_full_disk_ends_the_run_and_keeps_its_state(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = torch.save, []

    def full(state: object, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunStoppedError, match="the disk is full"):
            train(config(scene_pool, small_steps=2), tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["stage"] == 1
    (tmp_path / "config.json").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"config\.json cannot be read"):
        train(config(scene_pool, small_steps=2), tmp_path)


def test_a_state_is_on_the_disk_before_it_has_its_name(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, state, synced = config(scene_pool), tmp_path / "state.pt", []
    net = network.build(run.architecture, 0, torch.device("cpu"))
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file), state.exists())))
    train_module._save(net, Optimizer(net, train_module._trained(net, run.stages[0])), (0, 1), run, tmp_path)
    ((file, named),) = synced
    assert (file.st_ino, file.st_size, named) == (state.stat().st_ino, state.stat().st_size, False)


def test_a_start_that_does_not_fit_is_refused(scene_pool: Path, trained: Path, tmp_path: Path) -> None:
    checkpoints = shutil.copytree(trained / "checkpoint", tmp_path / "first")
    wider = config(scene_pool).model_dump()["architecture"] | {"unet_channels": (32, 32)}
    with pytest.raises(TrainingError, match=r"does not fit the run's architecture \(.{1,200}\); expected the same"):
        train(config(scene_pool, start=str(checkpoints), architecture=wider), tmp_path / "wider")
    parts = scratch.build(config(scene_pool).architecture, seed=3)
    scratch.save(parts, checkpoints / "normals", "normals", processing_resolution=32)
    with pytest.raises(TrainingError, match="expected a pair trained as one network"):
        train(config(scene_pool, start=str(checkpoints)), tmp_path / "pair")
    with pytest.raises(CheckpointError):
        train(config(scene_pool, start=str(tmp_path / "nowhere")), tmp_path / "nowhere")


def test_bfloat16_gives_nearly_the_gradients_of_float32(scene_pool: Path) -> None:
    views = open_pool(scene_pool, 100, 24, 32, processes=1).read(np.arange(3))
    gradients = []
    for precision in ("no", "bf16"):
        run = config(scene_pool, mixed_precision=precision)
        net = network.build(run.architecture, 0, torch.device("cpu"))
        trained = list(net.modules.parameters())
        train_module._gradients(train_module._differentiated(net, run.stages[1], run), trained, views, 1)
        gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    assert not torch.equal(*gradients)


class NoFloat64(TorchDispatchMode):
    """What Apple's GPUs and some of Intel's cannot do."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for value in tree_leaves((arguments, options, result)):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


def test_scenes_batches_and_losses_do_without_float64(scene_pool: Path) -> None:
    run = config(scene_pool)
    pool, net = open_pool(scene_pool, 100, 24, 32, processes=1), network.build(run.architecture, 0, torch.device("cpu"))
    with NoFloat64():
        scenes.view(range(8), 12, 16)
        for stage in run.stages:
            train_module._differentiated(net, stage, run)(data.batch(pool, stage, 0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_gpu_trains_in_a_graph_as_a_cpu_does(scene_pool: Path, tmp_path: Path, precision: str) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        run = config(scene_pool, small_steps=6, mixed_precision=precision)
        train(run, tmp_path / device, device=device)
        tables.append([float(row[3]) for row in losses(tmp_path / device)[1:]])
    assert tables[1] == pytest.approx(tables[0], rel=0.1), "noise is of each device's own generator"
    checkpoint = open_checkpoint(str(tmp_path / "cuda" / "checkpoint" / "depth"), "depth")
    assert tuple(load_vae(checkpoint).config.block_out_channels) == (8, 16, 16)


def test_the_graph_is_of_the_device_that_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    current, streams, recorded = ["cuda:0"], [], []

    @contextmanager
    def device(name: str) -> Iterator[None]:
        current.append(name)
        yield
        current.pop()

    def stream() -> Mock:
        streams.append(current[-1])
        return Mock(device=current[-1])

    @contextmanager
    def graph(_: object, stream: Mock | None = None, **options: object) -> Iterator[None]:
        recorded.append(current[-1] if stream is None else stream.device)
        yield

    fake = Mock(device=device, Stream=stream, current_stream=stream, stream=lambda _: nullcontext(), graph=graph)
    monkeypatch.setattr(torch, "cuda", fake)
    train_module._captured(Mock(), Mock(rgb=Mock(device="cuda:1")))
    assert streams == ["cuda:1"] * 2
    assert recorded == ["cuda:1"]


def test_the_demos_config_is_valid() -> None:
    demo = load_config(StagedConfig, ROOT / "configs" / "train-demo.yaml", {})
    assert demo.architecture.latent_channels == 16


def test_an_autoencoder_that_would_never_see_normals_is_refused(scene_pool: Path) -> None:
    wrong = config(scene_pool).model_dump()
    wrong["stages"][0]["batch_size"] = 2
    with pytest.raises(ValueError, match="stage 'vae': batch_size is 2; an autoencoder needs 3"):
        StagedConfig.model_validate(wrong)


def test_sizes_that_the_network_cannot_take_are_refused(scene_pool: Path) -> None:
    for height, width, reason in ((22, 30, "not divisible"), (24, 24, "aspect")):
        wrong = config(scene_pool).model_dump()
        for stage in wrong["stages"]:
            stage |= {"height": height, "width": width}
        with pytest.raises(ValueError, match=reason):
            StagedConfig.model_validate(wrong)
