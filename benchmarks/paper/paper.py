"""The paper's findings at small scale, with this project's own scenes and code; writes `RESULTS.md`.

    python benchmarks/paper/paper.py [benchmarks/paper/small.yaml] [--out runs/paper]

From nothing: a VAE; a generative model of pictures on its latents; from that, one diffusion estimator for depth and one
for normals (the Marigold objective); from those and from the generative model, end-to-end fine-tuning. Then every
estimator is scored on scenes that nothing was trained on, through the same `Labeler` that users call. Everything that
is finished is kept in `--out`, and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from depthmill.pipeline.evaluation.metrics import angles_deg, depth_metrics, fit_affine
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M, Views

HERE = Path(__file__).parent
FIRST_SEED = 1_000_020_000  # scenes of the embedded checkpoint's own test begin 10,000 below
MODALITIES = ("depth", "normals")
NOISES = ("gaussian", "pyramid")


class Paper:
    """One run of all of it, in one folder."""

    def __init__(self, settings: dict[str, Any], out: Path):
        self.settings, self.out = settings, out
        out.mkdir(parents=True, exist_ok=True)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}

    def train(self) -> dict[str, float]:
        """Train what is not there yet, wave by wave; the seconds that each took."""
        self._wave([("autoencoder", "autoencoder", {})])
        self._wave([("generative", "generative", {"start": "autoencoder"})])
        self._wave([(f"diffusion-{m}", "diffusion", {"start": "generative", "modality": m}) for m in MODALITIES])
        fine = [
            (f"from-{start}-{m}", "end_to_end", {"start": name, "modality": m})
            for start in ("diffusion", "generative")
            for m in MODALITIES
            for name in [f"diffusion-{m}" if start == "diffusion" else start]
        ]
        noisy = [
            (f"{noise}-{m}", "end_to_end", {"start": f"diffusion-{m}", "modality": m, "noise": noise})
            for noise in NOISES
            for m in MODALITIES
        ]
        self._wave([*fine, *noisy])
        return {path.parent.name: json.loads(path.read_text()) for path in sorted(self.out.glob("*/seconds.json"))}

    def _wave(self, jobs: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        with ThreadPoolExecutor(self.settings["jobs_at_once"]) as executor:
            list(executor.map(lambda job: self._job(*job), jobs))

    def _job(self, name: str, objective: str, options: dict[str, Any]) -> None:
        folder = self.out / name
        config = {**self.settings["train"], **self.settings[objective], **options, "objective": objective}
        if "start" in config:
            config["start"] = str(self.out / config["start"] / "checkpoint")
        folder.mkdir(exist_ok=True)
        (folder / "train.yaml").write_text(yaml.safe_dump(config))
        done, seconds = folder / "done", folder / "seconds.json"
        if done.exists():
            return
        spent = json.loads(seconds.read_text()) if seconds.exists() else 0.0  # before it was interrupted
        print(f"training {name}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "depthmill.cli", "train", str(folder / "train.yaml"), "--out", str(folder)]
        try:
            with (folder / "train.log").open("a") as log:
                subprocess.run(command, check=True, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        finally:
            seconds.write_text(json.dumps(spent + time.monotonic() - started))
        done.touch()

    @cache  # noqa: B019  # there is one
    def held_out(self) -> Views:
        """Scenes that nothing is trained on."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.settings["held_out"])
        return scenes.view(seeds, self.settings["height"], self.settings["width"])

    def score(self, name: str, modality: str, **options: Any) -> dict[str, float]:
        """Figures of one estimator with one way of sampling, from its file or by labelling."""
        words = [name, *(f"{key}={value}" for key, value in sorted(options.items()))]
        path = self.out / "results" / f"{'_'.join(words)}.json"
        if not path.exists():
            print("labelling", *words, flush=True)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(self._score(name, modality, options)))
        result: dict[str, float] = json.loads(path.read_text())
        return result

    def _score(self, name: str, modality: str, options: Mapping[str, Any]) -> dict[str, float]:
        checkpoint = self.out / name / "checkpoint"
        labeler = Labeler.from_pretrained(
            checkpoint, checkpoint, labels=(modality,), batch_size=self.settings["batch_size"], **options
        )
        views = self.held_out()
        frames = (views.rgb * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        labeler(frames[:1])  # the first call pays for set-up
        started = time.perf_counter()
        labels = labeler(frames)
        seconds = (time.perf_counter() - started) / len(frames)
        mask = views.mask.numpy()
        if modality == "normals":
            truth = views.normals.permute(0, 2, 3, 1).numpy()
            return {"mean": float(angles_deg(labels.normals[mask], truth[mask]).mean()), "seconds": seconds}
        rows = [
            depth_metrics(p, t, *fit_affine(p, t), DEPTH_RANGE_M)
            for prediction, truth, valid in zip(labels.depth, views.depth.numpy(), mask, strict=True)
            for p, t in [(prediction[valid], truth[valid])]
            if valid.any()
        ]
        return {key: float(np.mean([row[key] for row in rows])) for key in ("abs_rel", "delta1")} | {"seconds": seconds}


def cells(paper: Paper, name: str, **options: Any) -> list[str]:
    """The columns that every table shares: AbsRel, δ1, mean angle, and milliseconds a picture."""
    depth = paper.score(f"{name}-depth", "depth", **options)
    normals = paper.score(f"{name}-normals", "normals", **options)
    times = f"{1e3 * depth['seconds']:.1f} / {1e3 * normals['seconds']:.1f}"
    return [f"{depth['abs_rel']:.3f}", f"{depth['delta1']:.3f}", f"{normals['mean']:.1f}°", times]


def sampling(steps: int = 1, members: int = 1, spacing: str = "trailing") -> dict[str, Any]:
    """How the diffusion estimator is sampled, as the labeler's options."""
    return {"steps": steps, "ensemble": members, "timestep_spacing": spacing, "noise": "gaussian", "seed": 0}


def table(first: str, rows: Iterable[tuple[str, list[str]]]) -> list[str]:
    head = [first, "AbsRel ↓", "δ1 ↑", "normals, mean ↓", "ms a picture (depth / normals)"]
    lines = [head, ["---"] * len(head), *([name, *values] for name, values in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def report(paper: Paper, seconds: Mapping[str, float]) -> str:
    """`RESULTS.md`, whole."""
    s = paper.settings
    most, many = max(s["estimators_steps"]), s["ensemble"]
    schedules = [(1, "leading"), *((steps, "trailing") for steps in s["estimators_steps"]), (most, "leading")]
    estimator = [
        (
            f"{steps} step{'s' if steps > 1 else ''}, {spacing}{f', ensemble of {members}' if members > 1 else ''}",
            cells(paper, "diffusion", **sampling(steps, members, spacing)),
        )
        for members in (1, many)
        for steps, spacing in schedules
        if members == 1 or spacing == "trailing" or steps == 1
    ]
    fine = [
        ("the estimator, 1 step, trailing", cells(paper, "diffusion", **sampling())),
        (
            f"the estimator, {most} steps, ensemble of {many}",
            cells(paper, "diffusion", **sampling(most, many)),
        ),
        ("fine-tuned from the generative model", cells(paper, "from-generative")),
        ("fine-tuned from the estimator", cells(paper, "from-diffusion")),
    ]
    noisy = [
        ("zeros", cells(paper, "from-diffusion")),
        *((noise, cells(paper, noise, noise=noise, seed=0)) for noise in NOISES),
    ]
    slow = {m: paper.score(f"diffusion-{m}", m, **sampling(most, many)) for m in MODALITIES}
    ratio = {m: slow[m]["seconds"] / paper.score(f"from-diffusion-{m}", m)["seconds"] for m in MODALITIES}
    return "\n".join(
        [
            "# The paper at small scale",
            "",
            f"`make paper`, finished {datetime.now(UTC):%Y-%m-%d}: {os.cpu_count()} CPU cores of {platform.machine()}"
            f"{', ' + torch.cuda.get_device_name() if torch.cuda.is_available() else ''}, torch {torch.__version__}.",
            f"Trained from nothing on rendered scenes (version {scenes.VERSION}), at {s['width']} x {s['height']};",
            f"scored on {s['held_out']} other scenes, through `Labeler`. One seed. AbsRel and δ1 after affine",
            "alignment to metric depth, means over scenes; normals over all pixels. Times are of this run, on a",
            "machine shared with others.",
            "",
            "## The diffusion estimator: schedule, steps, ensembles",
            *table("sampling, gaussian noise", estimator),
            "",
            "## End-to-end fine-tuning",
            *table("model", fine),
            "",
            "## Noise, in fine-tuning from the estimator and in labelling",
            *table("noise", noisy),
            "",
            "## The headline",
            f"{most} steps x an ensemble of {many} takes {ratio['depth']:.0f} times (depth) and {ratio['normals']:.0f} "
            "times (normals) as long as the fine-tuned single step; the paper says more than 200.",
            "",
            "## Training",
            *(
                f"- {name}: {s[objective_of(name)]['steps']} steps of {s['train']['batch_size']}, {spent / 60:.1f} min"
                for name, spent in seconds.items()
            ),
            f"- together {sum(seconds.values()) / 3600:.1f} h, {s['jobs_at_once']} at once",
            "",
        ]
    )


def objective_of(name: str) -> str:
    """Which section of the settings a job was trained by."""
    return next((each for each in ("autoencoder", "generative", "diffusion") if name.startswith(each)), "end_to_end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="?", default=HERE / "small.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings.read_text())
    torch.set_num_threads(settings["threads"])
    paper = Paper(settings, arguments.out)
    text = report(paper, paper.train())
    print(text)
    if arguments.settings.resolve() == HERE / "small.yaml":
        (HERE / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
