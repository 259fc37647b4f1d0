"""Edges: what two frames of a video say about the scale and shift between their depths.

Optical flow (DIS: Kroeger et al., ECCV 2016, in OpenCV's implementation) pairs the pixels of two frames; a line through
the paired depths is the edge. Flow goes both ways and the pairs of both directions are pooled, so that exchanging the
frames gives exactly the reciprocal line.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import Preset
from depthmill.pipeline.smoothing.flow import dense_flow
from depthmill.pipeline.store.layout import DEPTH_STEP

Floats = npt.NDArray[np.floating[Any]]

GAPS = (1, 2, 4, 8, 16, 32)
FIELDS = ("log_scale", "later", "earlier", "scale_weight", "shift_weight", "coverage")

_STEP = 0.3  # of the spread of depth in 3x3 pixels: more is a depth edge
_FLAT = 0.02  # of the whole range of depth: less never is an edge
_GREY_LEVELS = 20.0  # two pixels that differ by more, after the frames' median difference, show different things
_BLANK = 5.0  # standard deviation of the greys: less is no picture that flow could know again
_BLACK, _DIM = 1.5, 7.5  # standard deviations: between them, there are too few greys for a histogram
_WOBBLE = 4.0  # grey levels from frame to frame; a fade takes more
_CAUCHY = 2.385  # 95 % efficient on normal residuals
_ROUNDS = 8
_LEAST_PAIRS = 64
_CORRELATED = 16.0  # neighbouring pairs share flow errors: so many count as one
_SLOPE_ERROR = 0.002  # of a line between real frames, a frame of gap: perspective and flow drift, however many pairs
_NOISE_BIAS = 0.1  # log-scale that a line loses where depth is all noise
_BINS = 32
_LONGEST = 512  # of a view: flow of larger pictures takes longer and finds nothing more
_SAMPLES = 8192  # of a view's pixels, on a grid, are paired: neighbours say the same


@dataclass(frozen=True, eq=False)
class View:
    """A frame as the edges see it.

    Attributes:
        grey: (h, w) uint8, half the labels' resolution, or less: 512 pixels on the longer side at most.
        depth: (h, w) float32 in (0, 1); NaN where invalid, saturated or at a depth edge.
    """

    grey: npt.NDArray[np.uint8]
    depth: npt.NDArray[np.float32]


def view(image: npt.NDArray[np.uint8], depth: npt.NDArray[np.float32]) -> View:
    """Halve a frame and leave out the depth that says nothing about scale and shift.

    Left out are depths at 0 or 1, which were clipped, and the surroundings of depth edges, where a flow that is off by
    a pixel pairs two surfaces.

    Args:
        image: (H, W, 3) RGB; resized to the size of the view.
        depth: (H, W) in [0, 1], NaN where invalid.
    """
    height, width = depth.shape
    shrink = max(2, max(height, width) / _LONGEST)
    size = (max(round(width / shrink), 1), max(round(height / shrink), 1))
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA)
    inside = (depth > DEPTH_STEP / 2) & (depth < 1 - DEPTH_STEP / 2)  # NaN is not
    half = cv2.resize(np.where(inside, depth, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    usable = cv2.resize(inside.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 1 - 1e-4
    if usable.any():
        low, high = np.percentile(half[usable], (5, 95))
        block = np.ones((3, 3), np.uint8)
        step = cv2.dilate(half, block) - cv2.erode(half, block)
        usable &= step <= max(_STEP * (high - low), _FLAT)
    return View(np.asarray(grey, np.uint8), np.where(usable, half, np.nan).astype(np.float32))


def segment_edges(
    views: Iterable[View | None], halo: int, *, max_edge: int = 32, flow: Preset = "fast"
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Edges of a run of frames, each with the frames before it.

    An edge belongs to its later frame and depends on its two frames alone: runs of any length give the same bytes. At
    most `max_edge` + 1 views are kept.

    Args:
        views: Of frames [start - halo, stop) in order; None for a frame that has no label.
        halo: Frames that come before the run; `max_edge`, fewer at the start of a video.
        max_edge: Frames between the two of an edge at most.
        flow: Preset of DIS.

    Returns:
        edges: (stop - start, gaps, FIELDS) float32, for each gap of GAPS up to `max_edge`; NaN where there is no edge.
            The line of frame t and the earlier t - g is depth[t - g] - earlier = exp(log_scale) * (depth[t] - later),
            with `earlier` and `later` the middles of the paired depths: a shift there does not depend on the scale.
            scale_weight is the inverse variance of log_scale, near 0 where depth is flat and has no scale to tell;
            shift_weight that of earlier - later; coverage the share of pixels that flow pairs, 0 where a frame is
            blank.
        score: (stop - start,) float32 in [0, 1], how different the greys are from the frame before's; NaN where either
            is missing.
    """
    gaps = [gap for gap in GAPS if gap <= max_edge]
    views = iter(views)
    past: deque[View | None] = deque(islice(views, halo), maxlen=max_edge)
    edges, scores = [], []
    for later in views:
        rows = np.full((len(gaps), len(FIELDS)), np.nan, np.float32)
        score = np.nan
        for row, gap in zip(rows, gaps, strict=True):
            earlier = past[-gap] if gap <= len(past) else None
            if later is not None and earlier is not None:
                row[:] = _edge(flow, later, earlier, _SLOPE_ERROR * gap)
        if later is not None and past and past[-1] is not None:
            score = _difference(later.grey, past[-1].grey)
        edges.append(rows)
        scores.append(score)
        past.append(later)
    return np.array(edges, np.float32).reshape(-1, len(gaps), len(FIELDS)), np.array(scores, np.float32)


def _difference(grey: npt.NDArray[np.uint8], before: npt.NDArray[np.uint8]) -> float:
    """Half the L1 distance of the grey histograms: no motion inside the frame counts, a new scene does.

    Two dim frames of almost the same grey do not differ: at night, a wobble of the exposure fills other bins.
    """
    spread, other = float(grey.std()), float(before.std())
    dim = min(spread, other) > _BLACK and max(spread, other) <= _DIM
    if dim and abs(float(grey.mean()) - float(before.mean())) <= _WOBBLE:
        return 0.0
    counts = [np.bincount(picture.ravel() >> 3, minlength=_BINS) / picture.size for picture in (grey, before)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2)


def _edge(flow: Preset, later: View, earlier: View, floor: float) -> tuple[float, ...]:
    """The fields of one edge; the line's are NaN, and its weights 0, where too few pairs are left."""
    there = dense_flow(later.grey, earlier.grey, flow)
    back = dense_flow(earlier.grey, later.grey, flow)
    x0, y0, share0 = _pairs(later, earlier, there, back)
    y1, x1, share1 = _pairs(earlier, later, back, there)
    coverage = (share0 + share1) / 2 * (min(later.grey.std(), earlier.grey.std()) > _BLANK)
    x, y = np.concatenate([x0, x1]), np.concatenate([y0, y1])
    if len(x) < _LEAST_PAIRS:
        return np.nan, np.nan, np.nan, 0.0, 0.0, coverage
    return *_fit(x.astype(np.float64), y.astype(np.float64), floor), coverage


def _pairs(one: View, other: View, flow: Floats, back: Floats) -> tuple[Floats, Floats, float]:
    """Depths of the one view and, along the flow, of the other; and the share of pixels that flow pairs.

    A pair is left out where going there and back ends more than |there + back|² > 0.01 (|there|² + |back|²) + 0.5 away
    (Sundaram et al., ECCV 2010, equation 5) or the greys differ.
    """
    height, width = one.grey.shape
    every = math.ceil(math.sqrt(height * width / _SAMPLES))
    grid = slice(every // 2, None, every), slice(every // 2, None, every)
    flow, grey, own = flow[grid], one.grey[grid], one.depth[grid]
    columns, rows = (np.arange(side, dtype=np.float32)[part] for side, part in zip((width, height), grid, strict=True))
    to_x, to_y = columns + flow[..., 0], rows[:, None] + flow[..., 1]
    returned = cv2.remap(back, to_x, to_y, cv2.INTER_LINEAR)
    inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    missed = np.square(flow + returned).sum(-1)
    inside &= missed <= 0.01 * (np.square(flow).sum(-1) + np.square(returned).sum(-1)) + 0.5
    if not inside.any():
        return np.empty(0, np.float32), np.empty(0, np.float32), 0.0
    change = cv2.remap(other.grey, to_x, to_y, cv2.INTER_LINEAR).astype(np.float32) - grey
    inside &= np.abs(change - np.median(change[inside])) <= _GREY_LEVELS
    depth = cv2.remap(other.depth, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=np.nan)
    both = inside & np.isfinite(depth) & np.isfinite(own)
    return own[both], depth[both], float(inside.mean())


def _fit(x: Floats, y: Floats, floor: float) -> tuple[float, float, float, float, float]:
    """The line of geometric-mean regression, reweighted, with its weights.

    Least squares of y on x takes the noise of x for signal and flattens the line by the squared correlation r²; of x on
    y, steepens it. Their geometric mean has the slope sd(y) / sd(x): exchanging x and y gives the reciprocal, and an
    affine change of either changes the line by exactly that. (Ricker, J. Fish. Res. Board Can. 30, 1973; variances of
    the slopes in Isobe et al., ApJ 364, 1990: of ln slope, (1 - r²) / n.) Residuals (y - mean) / sd - (x - mean) / sd
    are weighted from medians on, as Cauchy's distribution weights them (Holland & Welsch, Comm. Statist. A6, 1977). A
    model's labels do not differ by a line alone: parts of a frame move on their own. A weight that falls to 0, like
    Tukey's, takes the largest part for the whole and lets the others flicker more.

    Args:
        x: (N,) depths of the later frame.
        y: (N,) of the earlier.
        floor: Error of log_scale, and of the shift over the spread of depth, at least.

    Returns:
        log_scale, middle of x, middle of y, scale_weight, shift_weight.
    """
    mx, my = float(np.median(x)), float(np.median(y))
    sx, sy = 1.4826 * float(np.median(np.abs(x - mx))), 1.4826 * float(np.median(np.abs(y - my)))
    weight = np.ones_like(x)
    spread = correlation = 0.0
    for _ in range(_ROUNDS):
        if min(sx, sy) <= DEPTH_STEP / 4:
            break
        residual = (y - my) / sy - (x - mx) / sx
        spread = 1.4826 * float(np.median(np.abs(residual)))
        if spread > 1e-9:
            weight = 1 / (1 + np.square(residual / (_CAUCHY * spread)))
        total = weight.sum()
        # Not `weight @ x`: what BLAS gives depends on its number of threads.
        mx, my = float((weight * x).sum() / total), float((weight * y).sum() / total)
        dx, dy = x - mx, y - my
        sx, sy = math.sqrt((weight * dx * dx).sum() / total), math.sqrt((weight * dy * dy).sum() / total)
        correlation = float((weight * dx * dy).sum() / total) / (sx * sy) if min(sx, sy) > 0 else 0.0
    count = float(weight.sum()) / _CORRELATED
    level = sx * sy * (spread**2 / count + floor**2) + DEPTH_STEP**2
    if min(sx, sy) <= DEPTH_STEP / 4 or correlation <= 0:
        return 0.0, mx, my, 0.0, 1 / level
    # A line through noise alone has r = 0 and says sd(noise) / sd(noise): the nearer to that, the less it is believed.
    squared = min(correlation, 1.0) ** 2
    slope = (1 - squared) / (squared * count) + (_NOISE_BIAS * (1 - correlation)) ** 2 + floor**2
    return float(np.log(sy / sx)), mx, my, 1 / slope, 1 / level
