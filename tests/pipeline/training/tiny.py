"""Training runs of a few seconds, and what they leave."""

import csv

from safetensors.torch import load_file

from depthmill.pipeline.config_files import validated
from depthmill.pipeline.training import train as train_module
from depthmill.pipeline.training.config import TrainConfig

ARCHITECTURE = {"vae_channels": (8, 16), "unet_channels": (16, 32), "head_channels": 8, "norm_groups": 4}


def config(pool, **changes):
    scenes = {"kind": "scenes", "path": pool, "scenes": 100, "height": 24, "width": 32}
    base = {
        "architecture": None if "start" in changes else ARCHITECTURE,
        "sets": [scenes],
        "steps": 4,
        "batch_size": 2,
        "accumulation": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "save_steps": 2,
        "picture_steps": 100,
        "loader_workers": 0,
        "processing_resolution": 32,
    }
    return validated(TrainConfig, base | changes, where="the test")


def table(run):
    with (run / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run, part="unet"):
    return load_file(run / "checkpoint" / part / "diffusion_pytorch_model.safetensors")


def stop_after(monkeypatch, step):
    """Let the run be stopped just after its state of `step` is saved."""
    save = train_module._save_state

    def stop(accelerator, folder, done):
        save(accelerator, folder, done)
        if done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "_save_state", stop)
