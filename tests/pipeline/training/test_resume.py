"""Runs that were stopped: they go on to the same losses, or say why they cannot."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from depthmill.pipeline.errors import RunStoppedError, TrainingError
from depthmill.pipeline.training import train as train_module
from depthmill.pipeline.training.folder import read_config, write_config
from depthmill.pipeline.training.train import train
from depthmill.tests.pipeline.training.tiny import config, stop_after, table, weights


@pytest.fixture(autouse=True)
def _new_accelerate():
    """Let each run of a test choose its device and precision: accelerate settles them once a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "diffusion", "ema": 0.9, "modality": "normals"},
        pytest.param({"loader_workers": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_unbroken_one(scene_pool, tmp_path, monkeypatch, changes):
    settings = config(scene_pool, steps=6, accumulation=2, noise="gaussian", **changes)
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "broken")
    assert len(table(tmp_path / "broken")) == 4
    (tmp_path / "broken" / "states" / "000006.partial").mkdir()  # as a kill leaves it
    train(settings, tmp_path / "broken")
    assert table(tmp_path / "broken") == table(tmp_path / "whole")
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.gpu
def test_an_average_of_weights_resumes_on_a_gpu(scene_pool, tmp_path, monkeypatch):
    settings = config(scene_pool, steps=3, ema=0.9, save_steps=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path)
    train(settings, tmp_path)
    assert len(table(tmp_path)) == 3


def test_pictures_are_scored_though_a_kill_came_between_their_state_and_them(scene_pool, tmp_path, monkeypatch):
    held_out = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32}
    settings = config(scene_pool, held_out=held_out, held_out_pictures=2, picture_steps=2, ema=0.9)
    score, scored = train_module.score, []

    def killed(objective, batch, path):
        score(objective, batch, path)
        scored.append(table(tmp_path)[-1]["step"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "score", killed)
        for _ in range(2):  # at step 2; before step 3, then
            with pytest.raises(KeyboardInterrupt):
                train(settings, tmp_path)
    assert scored == ["2", "2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # the last
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path)
    train(settings, tmp_path)
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == ["000002.png", "000004.png"]
    boards = [EventAccumulator(str(events)).Reload() for events in (tmp_path / "tensorboard").rglob("events.*")]
    told = [board.Scalars("held_out/AbsRel") for board in boards if "held_out/AbsRel" in board.Tags()["scalars"]]
    assert sorted(scalar.step for scalars in told for scalar in scalars) == [2, 4]
    monkeypatch.setattr(train_module, "score", killed)
    train(settings, tmp_path)  # no more is to be scored


def test_a_full_disk_ends_the_run_and_keeps_its_state(scene_pool, tmp_path, monkeypatch):
    save = Accelerator.save_state

    def full(accelerator, folder):
        save(accelerator, folder)
        if Path(folder).name.startswith("000004"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        with pytest.raises(RunStoppedError, match="the disk is full"):
            train(config(scene_pool), tmp_path)
    assert "000002" in {path.name for path in (tmp_path / "states").iterdir()}
    train(config(scene_pool), tmp_path)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000004"]
    assert [row["step"] for row in table(tmp_path)] == list("1234"), "steps that are done again have one row"


def test_a_run_of_another_configuration_is_refused(scene_pool, tmp_path, monkeypatch):
    train(config(scene_pool, steps=2), tmp_path)
    with pytest.raises(TrainingError, match=r"another warmup_steps \(2, now 1\), seed \(0, now 1\)"):
        train(config(scene_pool, steps=2, warmup_steps=1, seed=1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_steps", lambda *_: pytest.fail("stopped before a state was saved"))
        with pytest.raises(pytest.fail.Exception):
            train(config(scene_pool, steps=2, warmup_steps=1, seed=1), tmp_path, overwrite=True)
    assert not (tmp_path / "states").exists(), "or the next call would go on from another run's"
    train(config(scene_pool, steps=2, warmup_steps=1, seed=1), tmp_path)


def test_a_run_goes_on_with_its_data_elsewhere_and_less_memory(scene_pool, tmp_path):
    train(config(scene_pool, steps=2), tmp_path / "run")
    shutil.copytree(scene_pool, tmp_path / "moved")
    train(config(tmp_path / "moved", steps=2, gradient_checkpointing=True), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"another sets \(.*'scenes': 100.*, now .*'scenes': 50"):
        train(config(scene_pool, steps=2, sets=[{"kind": "scenes", "scenes": 50}]), tmp_path / "run")


def test_a_state_goes_once_the_next_is_whole(tmp_path, monkeypatch):
    def save(path):
        Path(path).mkdir(parents=True)

    accelerator = SimpleNamespace(save_state=save, wait_for_everyone=lambda: None, is_main_process=True)
    train_module._save_state(accelerator, tmp_path, 2)
    remove, there = shutil.rmtree, []

    def noted(path, **options):
        there.append((path.name, path.exists(), sorted(one.name for one in tmp_path.iterdir())))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    train_module._save_state(accelerator, tmp_path, 4)
    assert [one for one in there if one[1]] == [("000002", True, ["000002", "000004"])]
    assert [one.name for one in tmp_path.iterdir()] == ["000004"]


def test_a_state_is_on_the_disk_before_the_one_before_it_goes(scene_pool, tmp_path, monkeypatch):
    synced = {}

    def sync(number):
        states = (tmp_path / "states").glob("*")
        synced[os.fstat(number).st_ino] = sorted(path.name for path in states)

    monkeypatch.setattr(os, "fsync", sync)
    train(config(scene_pool), tmp_path)
    state = [file for file in (tmp_path / "states" / "000004").iterdir() if file.stat().st_size]
    assert {"model.safetensors", "optimizer.bin"} <= {file.name for file in state}
    assert all(synced.get(file.stat().st_ino) == ["000002", "000004.partial"] for file in state)


def test_what_is_drawn_depends_on_the_seed_and_the_batch():
    drawn = [train_module._draws(*one).initial_seed() for one in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert len(set(drawn)) == 3
    assert drawn[0] == drawn[3]


def test_a_run_of_a_version_that_lacked_an_option_goes_on(scene_pool, tmp_path):
    train(config(scene_pool, steps=2), tmp_path)
    path = tmp_path / "config.json"
    old = json.loads(path.read_text())
    del old["weight_decay"], old["augment"]["degrade"]
    path.write_text(json.dumps(old))
    train(config(scene_pool, steps=2), tmp_path)
    assert json.loads(path.read_text())["weight_decay"] == 0.01
    path.write_text(json.dumps(old))
    with pytest.raises(TrainingError, match=r"another weight_decay \(0\.01, now 1\.0\)"):
        train(config(scene_pool, steps=2, weight_decay=1), tmp_path)


def test_a_step_is_of_as_many_pictures_when_processes_change(scene_pool, tmp_path, caplog):
    settings = config(scene_pool, steps=2, accumulation=4)
    train(settings, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accumulation": 1, "processes": 4}))  # as four left it
    train(settings, tmp_path)
    assert "come in another order" not in caplog.text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pictures": [101]}))
    train(settings, tmp_path)
    assert "the sets have [100] pictures, and had [101]: from step 2 on these come in another order" in caplog.text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 4}))
    with pytest.raises(TrainingError, match=r"accumulation x processes \(16, now 4\)"):
        train(settings, tmp_path)


def test_a_run_that_more_processes_began_goes_on_to_the_same_losses(scene_pool, tmp_path, monkeypatch):
    settings = config(scene_pool, steps=5, accumulation=4, save_steps=3)
    train(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "broken")
    path = tmp_path / "broken" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accumulation": 1, "processes": 4}))  # as four left it,
    (drawn,) = (tmp_path / "broken").glob("states/000003/random_states_*.pkl")
    torch.save(torch.load(drawn, weights_only=False) | {"step": 3}, drawn)  # after three micro-batches each
    train(settings, tmp_path / "broken")
    assert table(tmp_path / "broken") == table(tmp_path / "whole")


def test_a_run_goes_on_with_the_remedy_for_a_loss_that_was_no_number(scene_pool, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config(scene_pool), tmp_path)
    train(config(scene_pool, learning_rate=1e-4), tmp_path)
    assert "learning_rate is 0.0001, not 0.001" in caplog.text
    assert [float(row["learning_rate"]) > 1e-4 for row in table(tmp_path)] == [True, True, False, False]


def test_a_run_does_not_go_on_in_float16_after_another_precision(scene_pool, tmp_path):
    train(config(scene_pool, steps=1), tmp_path)
    half = config(scene_pool, steps=1, mixed_precision="fp16")
    with pytest.raises(TrainingError, match=r"mixed_precision no, .*go on with bf16 or no"):
        train_module._resume(Accelerator(cpu=True), half, tmp_path)  # fp16 itself needs a GPU


def test_machines_that_see_different_states_are_refused(scene_pool, tmp_path, monkeypatch):
    train(config(scene_pool, steps=1), tmp_path)
    monkeypatch.setattr(train_module, "gather_object", lambda names: [*names, "none"])
    with pytest.raises(TrainingError, match=r"is 000001 or none, .*share"):
        train(config(scene_pool, steps=1), tmp_path)


def test_nothing_is_removed_before_all_sets_are_found(scene_pool, tmp_path):
    train(config(scene_pool, steps=1), tmp_path / "run")
    there = sorted((tmp_path / "run").rglob("*"))
    lacking = {"kind": "hypersim", "path": tmp_path / "nowhere"}
    for changes in ({"sets": [lacking]}, {"held_out": lacking}):
        with pytest.raises(TrainingError, match="nowhere"):
            train(config(scene_pool, steps=1, **changes), tmp_path / "run", overwrite=True)
    assert sorted((tmp_path / "run").rglob("*")) == there


def test_a_run_with_stages_stays_as_it_is_unless_overwritten(scene_pool, tmp_path):
    write_config(tmp_path, {"stages": []})
    (tmp_path / "state.pt").touch()
    with pytest.raises(TrainingError, match="holds a run with stages"):
        train(config(scene_pool, steps=1), tmp_path)
    assert read_config(tmp_path) == {"stages": []}
    train(config(scene_pool, steps=1), tmp_path, overwrite=True)
    assert not (tmp_path / "state.pt").exists()
