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

from depthmill.pipeline.evaluation import metrics
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.training import losses, scenes
from depthmill.pipeline.training.from_scratch.train import HELD_OUT_SEED
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M, Views

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
    labels = labeler(views.frames())
    assert labels.depth is not None
    assert labels.normals is not None
    return torch.from_numpy(labels.depth), torch.from_numpy(labels.normals).permute(0, 3, 1, 2)


def score(labeler: Labeler, count: int, guessed: tuple[torch.Tensor, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Means over scenes, of the model and of the guess: AbsRel and δ1 after alignment, and normals' mean angle."""
    rows: dict[str, list[dict[str, float]]] = {"model": [], "guess": []}
    for start in range(FIRST_SEED, FIRST_SEED + count, _BATCH):
        views = scenes.view(range(start, min(start + _BATCH, FIRST_SEED + count)), HEIGHT, WIDTH)
        n = len(views.rgb)
        answers = {"model": label(labeler, views), "guess": tuple(part.expand(n, *part.shape[1:]) for part in guessed)}
        for name, (depth, normals) in answers.items():
            for i, mask in enumerate(views.mask.numpy()):
                if not mask.any():
                    continue
                p, t = depth[i].numpy()[mask], views.depth[i].numpy()[mask]
                figures = metrics.depth_metrics(p, t, *metrics.Moments.of(p, t).affine, DEPTH_RANGE_M)
                n_p, n_t = (one[i].permute(1, 2, 0).numpy()[mask] for one in (normals, views.normals))
                angle = float(metrics.angles_deg(n_p, n_t).mean())
                rows[name].append({"abs_rel": figures["abs_rel"], "delta1": figures["delta1"], "normals": angle})
    return {name: {key: float(np.mean([row[key] for row in of])) for key in of[0]} for name, of in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--depth", default="demo", help="depth checkpoint")
    parser.add_argument("--normals", help="normals checkpoint, if the depth checkpoint is not `demo`")
    arguments = parser.parse_args()
    labeler = Labeler.from_pretrained(arguments.depth, arguments.normals, labels=("depth", "normals"))
    started = time.monotonic()
    figures = score(labeler, arguments.scenes, guess(GUESS_SCENES))
    model, guessed = figures["model"], figures["guess"]
    folder = Path(__file__).parents[1] / "pipeline" / "model" / "demo"
    sizes = {m: sum(f.stat().st_size for f in (folder / m).rglob("*.safetensors")) / 1e6 for m in ("depth", "normals")}
    recipe = json.loads((folder / "training.json").read_text())
    lines = [
        "# The embedded checkpoint on held-out scenes",
        "",
        f"`python benchmarks/demo_checkpoint.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of "
        f"{platform.machine()}, torch {torch.__version__}, {time.monotonic() - started:.0f} s.",
        "",
        f"{arguments.scenes} rendered scenes (version {scenes.VERSION}) of {HEIGHT} x {WIDTH} that it was not trained "
        f"on, labelled at its own processing resolution, {labeler.processing_resolution}; means over scenes.",
        "",
        "| | model | guess without looking | goal |",
        "| --- | --- | --- | --- |",
        f"| depth, AbsRel after alignment | {model['abs_rel']:.3f} | {guessed['abs_rel']:.3f} | <= 0.10 |",
        f"| depth, δ1 after alignment | {model['delta1']:.3f} | {guessed['delta1']:.3f} | >= 0.90 |",
        f"| normals, mean angle | {model['normals']:.1f}° | {guessed['normals']:.1f}° | <= 15° |",
        "",
        f"Size: depth {sizes['depth']:.1f} MB + normals {sizes['normals']:.1f} MB, float16.",
        "",
        "Training (`configs/train-demo.yaml`):",
        *(f"- {name}: {value}" for name, value in recipe.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if (arguments.depth, arguments.normals, arguments.scenes) == ("demo", None, 256):
        Path(__file__).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
