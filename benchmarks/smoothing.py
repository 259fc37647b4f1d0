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
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.smoothing.edges import segment_edges, view
from depthmill.pipeline.smoothing.filter import FilterFrame, filter_frames
from depthmill.pipeline.smoothing.solve import solve
from depthmill.pipeline.training import clips

Floats = npt.NDArray[np.float32]
Pictures = npt.NDArray[np.uint8]

CAMERAS = ("static", "pan", "forward")
LEAK = SmoothConfig().leak
_ALPHA = 0.2  # of the exponential mean: how much of a frame is its own
_WINDOW, _OVERLAP = 32, 8  # of Video-Depth-Anything: frames a window, and frames that two share
_STILL = 4  # grey levels: what a pixel of a background may vary


@dataclass
class Clock:
    """CPU-bound wall seconds of each phase, and the frames they were spent on."""

    seconds: defaultdict[str, float]
    frames: int = 0

    def measure[T](self, phase: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.seconds[phase] += time.perf_counter() - started
        return result


CLOCK = Clock(defaultdict(float))


# What is compared: each takes (N, H, W, 3) pictures and (N, H, W) raw depth, and gives (N, H, W) depth.


def none(pictures: Pictures, raw: Floats) -> Floats:
    """The labels as they are."""
    return raw


def exponential(pictures: Pictures, raw: Floats) -> Floats:
    """A causal exponential mean of the depth maps, as scripts do it."""
    result = raw.copy()
    for i in range(1, len(raw)):
        result[i] = _ALPHA * raw[i] + (1 - _ALPHA) * result[i - 1]
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


def smoothed(pictures: Pictures, raw: Floats, leak: float = LEAK) -> Floats:
    """Ours: scale and shift a frame."""
    views = CLOCK.measure("edges", lambda: [view(*pair) for pair in zip(pictures, raw, strict=True)])
    edges, score = CLOCK.measure("edges", lambda: segment_edges(iter(views), 0))
    solution = CLOCK.measure("solve", lambda: solve(edges, score, np.ones(len(raw), bool), leak=leak))
    CLOCK.frames += len(raw)
    return CLOCK.measure("apply", lambda: solution.scale[:, None, None] * raw + solution.shift[:, None, None])


def filtered(pictures: Pictures, raw: Floats, leak: float = LEAK) -> Floats:
    """Ours, then the filter."""
    steady = smoothed(pictures, raw, leak)
    frames = [FilterFrame(*pair, normals=None, shot=0) for pair in zip(pictures, steady, strict=True)]
    return CLOCK.measure("filter", lambda: np.stack([one.depth for one in filter_frames(frames, 0, 0)]))


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
    x, y = of[known].astype(np.float64), to[known].astype(np.float64)
    a = float(((x - x.mean()) * (y - y.mean())).sum() / max(float(((x - x.mean()) ** 2).sum()), 1e-12))
    return a, float(y.mean() - a * x.mean())


def affine(of: Floats, to: Floats) -> Floats:
    a, b = fit(of, to)
    return (a * of + b).astype(np.float32)


def against_truth(depth: Floats, clip: clips.Clip) -> dict[str, float]:
    """Figures of a clip's depth, lower is better except δ1."""
    truth = np.where(clip.valid, clip.depth_m, np.nan)
    logs = np.log([max(fit(one, other)[0], 1e-6) for one, other in zip(depth, truth, strict=True)])
    metres = np.maximum(affine(depth, truth), 1e-3)
    known = np.isfinite(truth)
    ratio = metres[known] / truth[known]
    return {
        "flicker": float(np.diff(logs).std()),
        "AbsRel": float(np.abs(ratio - 1).mean()),
        "δ1": float((np.maximum(ratio, 1 / ratio) < 1.25).mean()),
        "TAE": 0.0,
    }


def against_the_background(depth: Floats, pictures: Pictures) -> dict[str, float]:
    """How far depth moves where the picture does not: the camera stands still.

    A frame's scale is the interquartile range of its background's depth, its shift the median; a pixel's movement is
    the standard deviation of its depth over time, after one scale a clip.
    """
    grey = np.stack([cv2.GaussianBlur(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), (0, 0), 2) for one in pictures])
    still = grey.std(0) < _STILL
    background = depth[:, still]
    low, middle, high = np.percentile(background, (25, 50, 75), axis=1)
    spread = float(np.median(high - low))
    return {
        "scale, frame to frame": float(np.diff(np.log(high - low)).std()),
        "shift, frame to frame": float(np.diff(middle).std()) / spread,
        "scale, whole clip": float(np.log(high - low).std()),
        "shift, whole clip": float(middle.std()) / spread,
        "pixels, frame to frame": float(np.diff(background, axis=0).std(0).mean()) / spread,
    }
