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
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from depthmill.pipeline.bench.timing import Spent, interleave, ratio, typical
from depthmill.pipeline.evaluation.metrics import Moments, angles_deg, depth_metrics
from depthmill.pipeline.model.backend import pick_device, pick_dtype
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.store import write_atomically
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M, Views

HERE = Path(__file__).parent
FIRST_SEED = 1_000_020_000  # scenes of the embedded checkpoint's own test begin 10,000 below
MODALITIES = ("depth", "normals")
NOISES = ("gaussian", "pyramid")
ROUNDS, TIMED = 3, 16  # in which all ways are timed; pictures that each labels in one


Figures = dict[str, np.ndarray]  # (scenes,) each: `abs_rel` and `delta1`, or the mean `angle` in degrees


@dataclass(frozen=True)
class Way:
    """An estimator and how it is sampled.

    Attributes:
        name: Of this, in files.
        model: Whose checkpoints, `<model>-depth` and `<model>-normals`.
        options: Of `Labeler.from_pretrained`.
    """

    name: str
    model: str
    options: dict[str, Any]


class Paper:
    """One run of all of it, in one folder."""

    def __init__(self, settings: dict[str, Any], out: Path):
        self.settings, self.out = settings, out
        (out / "results").mkdir(parents=True, exist_ok=True)
        record = json.dumps({"scenes": scenes.VERSION, **settings}, indent=1)
        if (out / "settings.json").exists() and (out / "settings.json").read_text() != record:
            sys.exit(f"{out} holds a run of other settings (settings.json there): give another --out, or remove it")
        write_atomically(out / "settings.json", record.encode())
        self.clock = out / "seconds.json"  # of all calls before this one
        self.began = time.monotonic() - (json.loads(self.clock.read_text()) if self.clock.exists() else 0.0)
        self.environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"])}

    def seconds(self) -> float:
        """How long all of it took so far, whatever was stopped and begun again."""
        return time.monotonic() - self.began

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
            write_atomically(seconds, json.dumps(spent + time.monotonic() - started).encode())
        done.touch()

    def figures(self, way: Way, modality: str) -> Figures:
        """Each scene's figures of an estimator with one way of sampling, from its file or by labelling."""
        path = self.out / "results" / f"{way.name}-{modality}.json"
        if not path.exists():
            print("labelling", path.stem, flush=True)
            write_atomically(path, json.dumps(self._score(way, modality)).encode())
        return {name: np.array(values) for name, values in json.loads(path.read_text()).items()}

    def times(self, ways: Sequence[Way], modality: str) -> dict[str, list[Spent]]:
        """What labelling a picture took, all ways in turn, `ROUNDS` times."""
        path = self.out / "results" / f"times-{modality}.json"
        if not path.exists():
            print("timing", modality, flush=True)
            labelers = {way.name: self._labeler(way, modality) for way in ways}
            pictures = self._held_out().frames()[:TIMED]

            def timed(labeler: Labeler) -> Callable[[], int]:
                def label() -> int:
                    labeler(pictures)
                    return len(pictures)

                return label

            device = next(iter(labelers.values())).device
            spent = interleave({name: timed(labeler) for name, labeler in labelers.items()}, ROUNDS, device)
            found = {name: list(map(asdict, each)) for name, each in spent.items()}
            write_atomically(path, json.dumps(found).encode())
        return {name: [Spent(**one) for one in each] for name, each in json.loads(path.read_text()).items()}

    def _labeler(self, way: Way, modality: str) -> Labeler:
        checkpoint = self.out / f"{way.model}-{modality}" / "checkpoint"
        return Labeler.from_pretrained(
            checkpoint, checkpoint, labels=(modality,), batch_size=self.settings["batch_size"], **way.options
        )

    @cache  # noqa: B019  # there is one
    def _held_out(self) -> Views:
        """Scenes that nothing is trained on, but for those without truth."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.settings["held_out"])
        views = scenes.view(seeds, self.settings["height"], self.settings["width"])
        some = views.mask.flatten(1).any(1)
        return Views(views.rgb[some], views.depth[some], views.normals[some], views.mask[some])

    def _score(self, way: Way, modality: str) -> dict[str, list[float]]:
        labels, views = self._labeler(way, modality)(self._held_out().frames()), self._held_out()
        mask = views.mask.numpy()
        if modality == "normals":
            truth = views.normals.permute(0, 2, 3, 1).numpy()
            angles = [angles_deg(p[m], t[m]).mean() for p, t, m in zip(labels.normals, truth, mask, strict=True)]
            return {"angle": [float(angle) for angle in angles]}
        rows = [
            depth_metrics(p, t, *Moments.of(p, t).affine, DEPTH_RANGE_M)
            for prediction, truth, valid in zip(labels.depth, views.depth.numpy(), mask, strict=True)
            for p, t in [(prediction[valid], truth[valid])]
        ]
        return {name: [float(row[name]) for row in rows] for name in ("abs_rel", "delta1")}


def sampled(steps: int, spacing: str, members: int = 1) -> Way:
    """The diffusion estimator, sampled so."""
    name = f"{steps}-{spacing}-{members}"
    options = {"steps": steps, "ensemble": members, "timestep_spacing": spacing, "noise": "gaussian", "seed": 0}
    return Way(name, "diffusion", options)


def described(steps: int, spacing: str, members: int) -> str:
    """The same in words."""
    words = f"{steps} step{'s' if steps > 1 else ''}, {spacing}"
    return f"{words}, ensemble of {members}" if members > 1 else words


def report(paper: Paper, seconds: Mapping[str, float]) -> str:
    """`RESULTS.md`, whole."""
    s = paper.settings
    most, many = max(s["estimators_steps"]), s["ensemble"]
    schedules = [(1, "leading"), *((steps, "trailing") for steps in s["estimators_steps"]), (most, "leading")]
    estimator = {
        described(steps, spacing, members): sampled(steps, spacing, members)
        for members in (1, many)
        for steps, spacing in schedules
        if members == 1 or spacing == "trailing" or steps == 1
    }
    slow, fast = sampled(most, "trailing", many), Way("fine-tuned", "from-diffusion", {})
    fine = {
        "the estimator, 1 step, trailing": sampled(1, "trailing"),
        f"the estimator, {most} steps, ensemble of {many}": slow,
        "fine-tuned from the generative model": Way("from-generative", "from-generative", {}),
        "fine-tuned from the estimator": fast,
    }
    noisy = {"zeros": fast} | {noise: Way(noise, noise, {"noise": noise, "seed": 0}) for noise in NOISES}
    ways = list({way.name: way for way in (*estimator.values(), *fine.values(), *noisy.values())}.values())
    times = {modality: paper.times(ways, modality) for modality in MODALITIES}
    ratios = {modality: ratio(spent[slow.name], spent[fast.name]) for modality, spent in times.items()}

    def table(first: str, rows: Mapping[str, Way]) -> list[str]:
        head = [first, "AbsRel ↓", "δ1 ↑", "normals, mean ↓", "ms a picture (depth / normals)"]
        lines = [head, ["---"] * len(head)]
        reference: Figures | None = None
        for name, way in rows.items():
            found = paper.figures(way, "depth") | paper.figures(way, "normals")
            took = [1e3 * typical(times[modality][way.name]).wall_s for modality in MODALITIES]
            ms = " / ".join(f"{one:.1f}" if one < 100 else f"{one:,.0f}" for one in took)
            lines.append([name, *(cell(found, reference, figure) for figure in ("abs_rel", "delta1", "angle")), ms])
            reference = reference or found
        return [f"| {' | '.join(line)} |" for line in lines]

    dtype = str(pick_dtype("auto", pick_device("auto"))).removeprefix("torch.")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    about = f"""\
`make paper`, finished {datetime.now(UTC):%Y-%m-%d}: {os.cpu_count()} CPU cores of {platform.machine()}{gpu}, torch {torch.__version__}.
Trained from nothing on rendered scenes (version {scenes.VERSION}) of {s["width"]} x {s["height"]}, scored on {s["held_out"]} others through `Labeler`
in {dtype}. One seed. AbsRel and δ1 are after affine alignment to metric depth and clipping to the depths that scenes may have. Figures
are means over scenes; in brackets, the mean difference from the table's first row, scene by scene, ± its standard error
over scenes (not over trainings). Times are medians of {ROUNDS} rounds in which all ways labelled {TIMED} pictures in turn, on a
shared machine. What starts from noise runs the network as it is, the single step from zeros with its constants folded
in, as `depthmill label` has it."""  # noqa: E501 (a line each)
    headline = f"""\
{most} steps x an ensemble of {many} takes {ratios["depth"]:.0f} times as long as the fine-tuned single step for depth,
{ratios["normals"]:.0f} times for normals (medians of {ROUNDS} rounds, least and most); the paper says more than 200."""
    trained = [
        f"- {name}: {s[objective_of(name)]['steps']} steps of {s['train']['batch_size']}, {spent / 60:.1f} min"
        for name, spent in seconds.items()
    ]
    trained.append(
        f"- together {sum(seconds.values()) / 3600:.1f} h, {s['jobs_at_once']} at once; with rendering, scoring and "
        f"timing, `make paper` took {paper.seconds() / 3600:.1f} h"
    )
    sections = {
        "# The paper at small scale": [about],
        "## The diffusion estimator: schedule, steps, ensembles": table("sampling, gaussian noise", estimator),
        "## End-to-end fine-tuning": table("model", fine),
        "## Noise, in fine-tuning from the estimator and in labelling": table("noise", noisy),
        "## The headline": [headline],
        "## Training": trained,
    }
    return "\n".join(line for title, lines in sections.items() for line in (title, "", *lines, ""))


def cell(figures: Figures, reference: Figures | None, figure: str) -> str:
    """A figure's mean over scenes, and how far it is from the reference's."""
    digits, unit = (1, "°") if figure == "angle" else (3, "")
    values = figures[figure]
    text = f"{values.mean():.{digits}f}{unit}"
    if reference is None:
        return text
    apart = values - reference[figure]
    return f"{text} ({apart.mean():+.{digits}f} ± {apart.std(ddof=1) / np.sqrt(len(apart)):.{digits}f})"


def objective_of(name: str) -> str:
    """Which section of the settings a job was trained by."""
    return next((each for each in ("autoencoder", "generative", "diffusion") if name.startswith(each)), "end_to_end")


def shortened(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """As few steps and scenes as all of it can be run with."""
    few = {each: {**settings[each], "steps": 2} for each in ("autoencoder", "generative", "diffusion", "end_to_end")}
    scenes_of = [{**each, "path": str(out / "scenes"), "scenes": 100} for each in settings["train"]["sets"]]
    train = {**settings["train"], "sets": scenes_of, "batch_size": 3, "warmup_steps": 1}
    return {**settings, **few, "train": train, "held_out": 4, "estimators_steps": [1, 2], "ensemble": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, nargs="?", default=HERE / "small.yaml")
    parser.add_argument("--quick", action="store_true", help="two steps of each: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings.read_text())
    torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if arguments.quick else arguments.out
        paper = Paper(shortened(settings, out) if arguments.quick else settings, out)
        try:
            text = report(paper, paper.train())
        finally:
            write_atomically(paper.clock, json.dumps(paper.seconds()).encode())
    print(text)
    if arguments.settings.resolve() == HERE / "small.yaml" and not arguments.quick:
        (HERE / "RESULTS.md").write_text(text)


if __name__ == "__main__":
    main()
