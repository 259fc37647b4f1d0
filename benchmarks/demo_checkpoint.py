"""Score the embedded checkpoint on rendered scenes that it was never trained on; writes `demo_checkpoint.md`.

    python benchmarks/demo_checkpoint.py [--scenes 256]

Beside it, the best guess that does not look at the picture: for depth, each pixel's mean over scenes of the training
set, every one first normalised as the network's target is; for normals, each pixel's mean normal. The guess is aligned
to each scene's metric depth by the same least-squares fit as the model's answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.training import losses, scenes
from depthmill.pipeline.training.from_scratch.train import HELD_OUT_SEED
from depthmill.pipeline.training.raycast import Views

HEIGHT, WIDTH = 96, 128
# Not those that pictures during training were drawn of, with which its course was judged.
FIRST_SEED = HELD_OUT_SEED + 10_000
GUESS_SCENES = 256
_BATCH = 16


def guess(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-pixel mean over training scenes: depth (1, H, W) and normals (1, 3, H, W)."""
    depth, normals = torch.zeros(1, HEIGHT, WIDTH), torch.zeros(1, 3, HEIGHT, WIDTH)
    for start in range(0, count, _BATCH):
        views = scenes.view(range(start, start + _BATCH), HEIGHT, WIDTH)
        depth += losses.normalised_depth(views.depth, views.mask).sum(0)
        normals += views.normals.sum(0)
    return depth / count, torch.nn.functional.normalize(normals, dim=1)


def label(labeler: Labeler, views: Views) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth (B, H, W) and normals (B, 3, H, W) of scenes, through the same door that users go through."""
    frames = (views.rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    labels = labeler(frames)
    assert labels.depth is not None
    assert labels.normals is not None
    return torch.from_numpy(labels.depth), torch.from_numpy(labels.normals).permute(0, 3, 1, 2)


def score(labeler: Labeler, count: int, guessed: tuple[torch.Tensor, torch.Tensor]) -> dict[str, np.ndarray]:
    """Figures of each scene, by name."""
    rows: dict[str, list[torch.Tensor]] = {"AbsRel": [], "AbsRel, guess": [], "normals": [], "normals, guess": []}
    for start in range(FIRST_SEED, FIRST_SEED + count, _BATCH):
        views = scenes.view(range(start, min(start + _BATCH, FIRST_SEED + count)), HEIGHT, WIDTH)
        n = len(views.rgb)
        depth, normals = label(labeler, views)
        guess_depth, guess_normals = guessed[0].expand(n, -1, -1), guessed[1].expand(n, -1, -1, -1)
        for name, prediction in (("AbsRel", depth), ("AbsRel, guess", guess_depth)):
            rows[name].append(losses.abs_rel(prediction, views.depth, views.mask))
        for name, prediction in (("normals", normals), ("normals, guess", guess_normals)):
            angle = losses.angles_deg(prediction, views.normals) * views.mask
            rows[name].append(angle.sum((1, 2)) / views.mask.sum((1, 2)))
    return {name: torch.cat(values).numpy() for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--depth", default="demo", help="depth checkpoint")
    parser.add_argument("--normals", help="normals checkpoint, if the depth checkpoint is not `demo`")
    arguments = parser.parse_args()
    labeler = Labeler.from_pretrained(arguments.depth, arguments.normals, labels=("depth", "normals"))
    started = time.monotonic()
    figures = {
        name: float(np.nanmean(values))
        for name, values in score(labeler, arguments.scenes, guess(GUESS_SCENES)).items()
    }
    folder = Path(__file__).parents[1] / "pipeline" / "model" / "demo"
    sizes = {m: sum(f.stat().st_size for f in (folder / m).rglob("*.safetensors")) / 1e6 for m in ("depth", "normals")}
    recipe = json.loads((folder / "training.json").read_text())
    lines = [
        "# The embedded checkpoint on held-out scenes",
        "",
        f"`python benchmarks/demo_checkpoint.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of "
        f"{platform.machine()}, torch {torch.__version__}, {time.monotonic() - started:.0f} s.",
        "",
        f"{arguments.scenes} rendered scenes of {HEIGHT} x {WIDTH} that it was not trained on, labelled at its own "
        f"processing resolution, {labeler.processing_resolution}; means over scenes.",
        "",
        "| | model | guess without looking | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        f"| depth, AbsRel after alignment | {figures['AbsRel']:.3f} | {figures['AbsRel, guess']:.3f} "
        f"| {figures['AbsRel'] / figures['AbsRel, guess']:.2f} | <= 0.6 of the guess |",
        f"| normals, mean angle | {figures['normals']:.1f}° | {figures['normals, guess']:.1f}° "
        f"| {figures['normals'] / figures['normals, guess']:.2f} | <= 25° |",
        "",
        f"Size: depth {sizes['depth']:.1f} MB + normals {sizes['normals']:.1f} MB, float16.",
        "",
        "Training (`configs/train-demo.yaml`):",
        *(f"- {name}: {value}" for name, value in recipe.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.depth == "demo" and arguments.scenes == 256:
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
