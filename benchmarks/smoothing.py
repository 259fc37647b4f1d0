"""Temporal smoothing against its simple alternatives; writes `smoothing.md`.

    python benchmarks/smoothing.py [--quick]

On rendered clips, disturbed by a random scale and shift a frame and by noise, everything is measured against the truth.
On the shipped clip, of a camera that stands still, there is none: what is known there is that whatever does not move in
the picture should not move in depth either. That needs neither optical flow nor anything else that smoothing uses.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import Preset, SmoothConfig
from depthmill.pipeline.evaluation.metrics import Moments, depth_metrics
from depthmill.pipeline.evaluation.temporal import alignment_error
from depthmill.pipeline.smoothing.edges import segment_edges, view
from depthmill.pipeline.smoothing.filter import FilterFrame, filter_frames
from depthmill.pipeline.smoothing.solve import solve
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.training import clips
from depthmill.tests.pipeline.smoothing import worlds

Floats = npt.NDArray[np.float32]
Pictures = npt.NDArray[np.uint8]

LEAK, FLOW = SmoothConfig().leak, SmoothConfig().flow
CLIP = Path(__file__).parents[1] / "demo" / "pedestrians.mp4"
_ALPHA = 0.2  # of the exponential mean: how much of a frame is its own
_WINDOW, _OVERLAP = 32, 8  # of Video-Depth-Anything: frames a window, and frames that two share
_STILL = 4  # grey levels: what a pixel of a background may vary


# What is compared: each takes (N, H, W, 3) pictures and (N, H, W) raw depth, and gives (N, H, W) depth.


def none(pictures: Pictures, raw: Floats) -> Floats:
    """The labels as they are."""
    return raw


def exponential(pictures: Pictures, raw: Floats) -> Floats:
    """A causal exponential mean of the depth maps, as scripts do it."""
    result = raw.copy()
    for i in range(1, len(raw)):
        before = np.where(np.isnan(result[i - 1]), raw[i], result[i - 1])  # what comes into view has no past
        result[i] = _ALPHA * raw[i] + (1 - _ALPHA) * before
    return result


def windows(pictures: Pictures, raw: Floats) -> Floats:
    """Windows made consistent by least squares, then stitched as Video-Depth-Anything stitches its own.

    Its network sees a window at once. Labels of single frames have to be made consistent first: each is fitted to the
    median of its window. Then a window is fitted to what is there already on the frames they share, and faded in.
    """
    result = np.empty_like(raw)
    start = 0
    while True:
        part = raw[start : start + _WINDOW]
        middle = np.median(part, axis=0)
        part = np.stack([affine(one, middle) for one in part])
        shared = min(_OVERLAP, start)
        if shared:
            there = result[start : start + shared]
            a, b = fit(part[:shared], there)
            part = a * part + b
            fade = (np.arange(1, shared + 1, dtype=np.float32) / (shared + 1))[:, None, None]
            part[:shared] = fade * part[:shared] + (1 - fade) * there
        result[start : start + len(part)] = part
        if start + _WINDOW >= len(raw):
            return result
        start += _WINDOW - _OVERLAP


def smoothed(pictures: Pictures, raw: Floats, leak: float = LEAK, max_edge: int = 32, flow: Preset = FLOW) -> Floats:
    """Ours: scale and shift a frame."""
    edges, score = segment_edges(map(view, pictures, raw), 0, max_edge=max_edge, flow=flow)
    solution = solve(edges, score, np.ones(len(raw), bool), leak=leak)
    return solution.scale[:, None, None] * raw + solution.shift[:, None, None]


def filtered(pictures: Pictures, raw: Floats) -> Floats:
    """Ours, then the filter."""
    return np.stack([one.depth for one in filter_frames(to_filter(pictures, smoothed(pictures, raw)), 0, 0)])


def to_filter(pictures: Pictures, depth: Floats) -> Iterator[FilterFrame]:
    return (FilterFrame(*pair, normals=None, shot=0) for pair in zip(pictures, depth, strict=True))


# Causes of rows where something else is better, by what the row's name contains, or the better one's.
_WHY_NOT = {
    "TAE": "a mean over frames also evens out what projecting to whole pixels costs; it is wrong by more (AbsRel)",
    "lag": "only a mean over frames changes the shape of a frame's depth: raw labels, and a scale and shift, have none",
    "windows": "windows fit every pixel of a frame to one median picture, as if the camera stood still: they take away "
    "the slow changes that the leak leaves, and the real ones of a camera that goes forward with them (AbsRel there, "
    "and undisturbed)",
    "exponential": "a causal mean of depth maps is steadier where nothing moves, and smears what does (lag)",
}

METHODS: dict[str, Callable[[Pictures, Floats], Floats]] = {
    "none": none,
    f"exponential mean, {_ALPHA}": exponential,
    f"windows of {_WINDOW}, overlap {_OVERLAP}": windows,
    "depthmill": smoothed,
    "depthmill, --filter": filtered,
}


def fit(of: Floats, to: Floats) -> tuple[float, float]:
    """Scale and shift of the least squares from one set of depths to another, where both are finite."""
    known = np.isfinite(of) & np.isfinite(to)
    return Moments.of(of[known], to[known]).affine


def affine(of: Floats, to: Floats) -> Floats:
    a, b = fit(of, to)
    return (a * of + b).astype(np.float32)


def against_truth(depth: Floats, clip: clips.Clip) -> dict[str, float]:
    """Figures of a clip's depth, lower is better except δ1; TAE in per cent."""
    truth = np.where(clip.valid, clip.depth_m, np.nan)
    logs = np.log([max(fit(one, other)[0], 1e-6) for one, other in zip(depth, truth, strict=True)])
    scale, shift = fit(depth, truth)
    figures = depth_metrics(depth[clip.valid], truth[clip.valid], scale, shift, (1e-3, np.inf))
    # As `depthmill evaluate` does: TAE divides by depths, and what is put behind the camera would be all of it.
    metres = np.maximum(scale * depth + shift, np.nanmin(truth))
    views = [(one, clip.intrinsics, pose) for one, pose in zip(metres, clip.poses, strict=True)]
    errors = [alignment_error(a, b, k, k, at, to) for (a, k, at), (b, _, to) in pairwise(views)]
    errors += [alignment_error(b, a, k, k, to, at) for (a, _, at), (b, k, to) in pairwise(views)]
    return {
        "flicker": float(np.diff(logs).std()),
        "AbsRel": figures["abs_rel"],
        "δ1": figures["delta1"],
        "TAE": 100 * float(np.mean(errors)),
    }


def against_the_background(depth: Floats, raw: Floats, pictures: Pictures) -> dict[str, float]:
    """How far depth moves where the picture does not: the camera stands still.

    A frame's scale is the interquartile range of its background's depth, its shift the median, in units of the clip's
    interquartile range. Lag is what smoothing does to things that move: how far the shape of a frame's depth, after the
    best scale and shift, is from its labels there.
    """
    grey = np.stack([cv2.GaussianBlur(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), (0, 0), 2) for one in pictures])
    still = grey.std(0) < _STILL
    moving = np.abs(grey.astype(np.float32) - np.median(grey, axis=0)) > 4 * _STILL
    low, middle, high = np.percentile(depth[:, still], (25, 50, 75), axis=1)
    spread = float(np.median(high - low))
    shape = np.stack([affine(*pair) for pair in zip(depth, raw, strict=True)])
    return {
        "scale, frame to frame": float(np.diff(np.log(high - low)).std()),
        "scale, whole clip": float(np.log(high - low).std()),
        "shift, frame to frame": float(np.diff(middle).std()) / spread,
        "shift, whole clip": float(middle.std()) / spread,
        "pixels, frame to frame": float(np.diff(depth[:, still], axis=0).std(0).mean()) / spread,
        "lag where things move": float(np.abs(shape - raw)[moving].mean()) / spread,
    }


def rendered(seeds: range, frames: int, height: int) -> dict[str, list[tuple[clips.Clip, Floats, Floats]]]:
    """By camera: clips, their depth in [0, 1] as it is, and as it is disturbed."""
    found: dict[str, list[tuple[clips.Clip, Floats, Floats]]] = {}
    for camera in clips.CAMERAS:
        found[camera] = []
        for seed in seeds:
            clip = clips.render_clip(seed, camera, frames, height, height * 4 // 3)
            calm = worlds.normalised(clip.depth_m, clip.valid, beyond=2)
            found[camera].append((clip, calm, worlds.disturbed(calm, seed)[0]))
    return found


def stop_and_go(clip: clips.Clip, calm: Floats) -> tuple[clips.Clip, Floats]:
    """A forward-moving clip that begins and ends with its camera at rest for half its length each."""
    n = len(calm)
    order = np.concatenate([np.zeros(n // 2, int), np.arange(n), np.full(n // 2, n - 1)])
    names = ("rgb", "depth_m", "normals", "valid", "poses")
    return replace(clip, **{name: getattr(clip, name)[order] for name in names}), calm[order]


def shipped(frames: int | None) -> tuple[Pictures, Floats, float]:
    """The shipped clip: pictures, labels of the embedded checkpoint, and the CPU seconds that a frame's took."""
    from depthmill.pipeline.model.labeler import Labeler

    with closing(open_source(CLIP)) as source:
        pictures = np.stack([one.image for one in source.read(0, frames or source.probe().frames)])
    labeler = Labeler.from_pretrained("demo", None, labels=("depth",), dtype="float32")
    labeler(pictures[:1])
    started = time.process_time()
    depth = np.concatenate([labeler(pictures[i : i + 4]).depth for i in range(0, len(pictures), 4)])
    return pictures, depth, (time.process_time() - started) / len(pictures)


def options(
    made: dict[str, list[tuple[clips.Clip, Floats, Floats]]], pictures: Pictures, raw: Floats
) -> dict[str, dict[str, float]]:
    """What the flow's preset, and the longest edge, give and cost."""
    found = {}
    tried: list[tuple[Preset, int]] = [
        ("ultrafast", 32),
        ("fast", 32),
        ("medium", 32),
        ("fast", 16),
        ("fast", 4),
        ("fast", 1),
    ]
    for flow, max_edge in tried:
        rows = {}
        for camera, those in made.items():
            row = means([against_truth(smoothed(c.rgb, noisy, LEAK, max_edge, flow), c) for c, _, noisy in those])
            rows |= {f"{camera}, {figure}": row[figure] for figure in ("flicker", "AbsRel")}
        started = time.process_time()
        real = against_the_background(smoothed(pictures, raw, LEAK, max_edge, flow), raw, pictures)
        took_s = time.process_time() - started
        rows |= {f"real clip, {name}": real[name] for name in ("scale, frame to frame", "pixels, frame to frame")}
        found[f"{flow}, {max_edge}"] = rows | {"real clip, CPU ms a frame": 1000 * took_s / len(raw)}
    return found


def timings(pictures: Pictures, raw: Floats) -> dict[str, float]:
    """CPU seconds a frame of each phase."""
    marks = [time.process_time()]
    with closing(open_source(CLIP)) as source:
        for _ in source.read(0, len(raw)):
            pass
    marks.append(time.process_time())
    edges, score = segment_edges(map(view, pictures, raw), 0)
    marks.append(time.process_time())
    solution = solve(edges, score, np.ones(len(raw), bool), leak=LEAK)
    marks.append(time.process_time())
    depth = solution.scale[:, None, None] * raw + solution.shift[:, None, None]
    marks.append(time.process_time())
    for _ in filter_frames(to_filter(pictures, depth), 0, 0):
        pass
    marks.append(time.process_time())
    phases = ("decode again", "edges", "solve", "apply (when read)", "filter (depth alone)")
    return dict(zip(phases, np.diff(marks) / len(raw), strict=True))


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def table(columns: dict[str, dict[str, float]], first: str) -> list[str]:
    """Rows of figures, one column a method; the best of a row is bold, whoever has it."""
    lines = [f"| {first} | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        best = (max if "δ1" in name else min)(float(f"{value:.3g}") for value in values)
        shown = [f"**{v:.3g}**" if float(f"{v:.3g}") == best else f"{v:.3g}" for v in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def why_not(columns: dict[str, dict[str, float]]) -> list[str]:
    """The rows where ours are not the best, each with what is known of the cause."""
    lines = []
    for name in next(iter(columns.values())):
        sign = -1 if "δ1" in name else 1
        values = {method: sign * float(f"{column[name]:.3g}") for method, column in columns.items()}
        best = min(values, key=values.__getitem__)
        if values[best] < min(value for method, value in values.items() if "depthmill" in method):
            told = f"{name}: {best}"
            reason = next((text for part, text in _WHY_NOT.items() if part in told), "not explained")
            lines.append(f"- {name}: {reason}.")
    return ["", "Where something else is better:", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short, small clip of each kind; writes no file")
    quick = parser.parse_args().quick
    seeds, frames, height = (range(1), 12, 48) if quick else (range(3), 64, 144)

    made = rendered(seeds, frames, height)
    disturbed, calm = {}, {}
    for name, method in METHODS.items():
        disturbed[name] = {
            f"{camera}, {figure}": value
            for camera, those in made.items()
            for figure, value in means([against_truth(method(c.rgb, noisy), c) for c, _, noisy in those]).items()
        }
        calm[name] = means([against_truth(method(c.rgb, still), c) for c, still, _ in made["forward"]])
    stopping = [stop_and_go(c, still) for c, still, _ in made["forward"]]
    leaks = {}
    for leak in (0.0, LEAK / 4, LEAK / 2, LEAK, LEAK * 2):
        rows = {}
        for camera, those in made.items():
            row = means([against_truth(smoothed(c.rgb, noisy, leak), c) for c, _, noisy in those])
            rows |= {f"{camera}, {figure}": row[figure] for figure in ("flicker", "AbsRel")}
        row = means([against_truth(smoothed(c.rgb, still, leak), c) for c, still, _ in made["forward"]])
        rows |= {f"forward, undisturbed, {figure}": row[figure] for figure in ("AbsRel", "δ1")}
        row = means([against_truth(smoothed(c.rgb, still, leak), c) for c, still in stopping])
        rows |= {f"stop and go, undisturbed, {figure}": row[figure] for figure in ("AbsRel", "δ1")}
        leaks[f"{leak:g}"] = rows

    pictures, raw, label_s = shipped(8 if quick else None)
    real = {name: against_the_background(method(pictures, raw), raw, pictures) for name, method in METHODS.items()}
    chosen = options(made, pictures, raw)
    times = {"label (embedded checkpoint, float32, on the CPU)": label_s, **timings(pictures, raw)}

    title = f"{len(seeds)} clips a camera of {frames} frames, {height * 4 // 3} x {height}, means over clips"
    text = "\n".join(
        [
            "# Temporal smoothing and its alternatives",
            "",
            f"`python benchmarks/smoothing.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of "
            f"{platform.machine()}, OpenCV {cv2.__version__}.",
            "",
            "## Rendered clips, disturbed",
            f"{title}. Each frame has a random scale (log σ 0.08), shift (σ 5 % of the range) and 1 % noise. Flicker "
            "is the standard deviation of the frame-to-frame change of the log-scale's error; AbsRel and δ1 are "
            "after one scale and shift a clip, TAE with depths held to the nearest true one. Bold: a row's best.",
            "",
            *table(disturbed, "camera, figure"),
            *why_not(disturbed),
            "",
            "## Rendered clips, undisturbed",
            "The forward-moving clips as they are: what smoothing costs where there is nothing to mend.",
            "",
            *table(calm, "figure"),
            *why_not(calm),
            "",
            "## A real clip",
            f"`demo/pedestrians.mp4`, {len(pictures)} frames of {pictures.shape[2]} x {pictures.shape[1]}, labelled "
            "with the embedded checkpoint. The camera stands still: scale, shift and movement are those of the depth "
            "of the pixels whose picture does not change, in units of its interquartile range; lag is how far the "
            "shape of a frame's depth is from its own labels where things move.",
            "",
            *table(real, "figure"),
            *why_not(real),
            "",
            "## The leak",
            f"Radians a frame: slower changes of scale and shift stay. The default is {LEAK:g}. A camera that goes "
            "forward changes them steadily; one that stops and goes, at once, which no leak can tell from flicker: "
            "more leak costs less there, and leaves more flicker.",
            "",
            *table(leaks, "camera, figure"),
            "",
            "## Flow and the longest edge",
            f"The defaults are {FLOW} and {SmoothConfig().max_edge}.",
            "",
            *table(chosen, "figure"),
            "",
            "## Time",
            "CPU milliseconds a frame, of all threads of one process, on the real clip: others' work is not in them.",
            "",
            "| phase | ms |",
            "| --- | --- |",
            *(f"| {phase} | {1000 * seconds:.3g} |" for phase, seconds in times.items()),
        ]
    )
    print(text)
    if not quick:
        Path(__file__).with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
