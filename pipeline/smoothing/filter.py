"""What is left of flicker after scale and shift, pixel by pixel: a mean over five frames along the optical flow.

Each frame's labels become a weighted mean of its own and those of up to two frames on either side, fetched along the
flow. A neighbour's pixel counts for as much as three things agree: the flow there and back (it is the same point), the
pictures (it looks the same), and the labels themselves (it lies at the same depth, it faces the same way). The last is
what keeps edges: a bilateral filter along trajectories, after Tomasi & Manduchi (ICCV 1998), in time alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import Preset
from depthmill.pipeline.smoothing.flow import dense_flow

Floats = npt.NDArray[np.float32]

REACH = 2  # frames on either side
_TIME = (1.0, 0.9, 0.6)  # weight of a neighbour as many frames away
_FLOW_PX = 0.5  # sigmas: the flow there and back, in pixels of the half resolution, and as a share of its length,
_FLOW_SHARE = 0.05
_GREY = 10.0  # of 255,
_DEPTH = 0.03  # of the range of depth,
_NORMAL_RAD = 0.35


@dataclass(frozen=True, eq=False)
class FilterFrame:
    """A frame to be filtered.

    Attributes:
        image: (H, W, 3) uint8.
        depth: (H, W) float32, after scale and shift, NaN where invalid; or None.
        normals: (H, W, 3) float32 unit vectors, (0, 0, 0) where invalid; or None.
        shot: Its shot's number: frames of other shots do not touch it.
    """

    image: npt.NDArray[np.uint8]
    depth: Floats | None
    normals: Floats | None
    shot: int


@dataclass(frozen=True, eq=False)
class Filtered:
    """Filtered labels of one frame: shapes, units and invalid pixels as in the `FilterFrame` they come from."""

    depth: Floats | None
    normals: Floats | None


@dataclass(frozen=True, eq=False)
class _Held:
    """A frame in the window, and its picture in grey at half resolution, (h, w) uint8."""

    frame: FilterFrame
    grey: npt.NDArray[np.uint8]


_Flows = dict[tuple[_Held, _Held], Floats]


def filter_frames(
    frames: Iterable[FilterFrame | None], before: int, after: int, *, flow: Preset = "fast"
) -> Iterator[Filtered | None]:
    """Filter a run of frames, of which five are held at a time.

    A frame's result depends on the `REACH` frames on either side, and on nothing else: not on where the run starts.

    Args:
        frames: The run's frames in order, with neighbours on both sides; None: a failed frame, which counts for
            nothing.
        before: How many of the first are only neighbours: `REACH`, or as many as the video has there.
        after: How many of the last are.
        flow: Preset of the optical flow.

    Yields:
        For each frame but the first `before` and the last `after` its labels, None where it failed.
    """
    held = (None if frame is None else _Held(frame, _half_grey(frame.image)) for frame in frames)
    padded: Iterator[_Held | None] = chain(repeat(None, REACH - before), held, repeat(None, REACH - after))
    window = deque(islice(padded, 2 * REACH), maxlen=2 * REACH + 1)
    flows: _Flows = {}
    for newest in padded:
        window.append(newest)
        flows = {pair: one for pair, one in flows.items() if pair[0] in window and pair[1] in window}
        yield _filtered(list(window), flows, flow)


def _half_grey(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = image.shape[:2]
    half = (width + 1) // 2, (height + 1) // 2
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), half, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def _filtered(window: list[_Held | None], flows: _Flows, preset: Preset) -> Filtered | None:
    """The labels of the frame in the middle; flows that are computed for it are left for the next."""
    own = window[REACH]
    if own is None:
        return None
    height, width = own.frame.image.shape[:2]
    depth, normals = own.frame.depth, own.frame.normals
    weights = [np.ones((height, width), np.float32) for _ in range(2)]
    depth_sum, normals_sum = np.zeros((height, width), np.float32), np.zeros((height, width, 3), np.float32)
    # Outwards, both sides of a distance together: the same whichever way time runs.
    for distance in range(1, REACH + 1):
        for other in (window[REACH - distance], window[REACH + distance]):
            if other is None or other.frame.shot != own.frame.shot or other.frame.image.shape != own.frame.image.shape:
                continue
            at, weight = _correspondence(own, other, flows, preset)
            weight *= _TIME[distance]
            if depth is not None and other.frame.depth is not None:
                difference = _fetched(other.frame.depth, at) - depth
                weight *= _agreement(difference / _DEPTH)
                np.nan_to_num(difference, copy=False)
                depth_sum += weight * difference
                weights[0] += weight
            if normals is not None and other.frame.normals is not None:
                fetched = _fetched(other.frame.normals, at)
                # 1 - cos is half the angle's square. Against a (0, 0, 0) it is 1: some 81 degrees away, or nothing.
                apart = np.maximum(1 - _dot(fetched, normals), 0)
                weight = weight * _agreement(np.sqrt(2 * apart) / np.float32(_NORMAL_RAD))
                normals_sum += weight[..., None] * (fetched - normals)
                weights[1] += weight
    return Filtered(
        None if depth is None else depth + depth_sum / weights[0],
        None if normals is None else _unit(normals + normals_sum / weights[1][..., None], normals),
    )


def _correspondence(own: _Held, other: _Held, flows: _Flows, preset: Preset) -> tuple[Floats, Floats]:
    """Where the pixels of a frame are in another, (H, W, 2) float32 x and y, and how sure that is, (H, W) float32."""
    for a, b in ((own, other), (other, own)):
        if (a, b) not in flows:
            flows[a, b] = dense_flow(a.grey, b.grey, preset)
    there, back = flows[own, other], flows[other, own]
    h, w = own.grey.shape
    at = _moved(there)
    back = _fetched(back, at)
    tolerated = _FLOW_PX**2 + _FLOW_SHARE**2 * (_dot(there, there) + _dot(back, back))
    there_and_back = there + back
    weight = np.exp(_dot(there_and_back, there_and_back) / (-2 * tolerated))
    weight *= _agreement((_fetched(other.grey.astype(np.float32), at) - own.grey) / _GREY)
    # What left the picture is not in the other; half a pixel is the picture's own border.
    x, y = at[..., 0], at[..., 1]
    weight *= (x >= -0.5) & (x <= w - 0.5) & (y >= -0.5) & (y <= h - 0.5)
    height, width = own.frame.image.shape[:2]
    stretched = np.asarray(
        cv2.resize(there, (width, height)) * np.array((width / w, height / h), np.float32), np.float32
    )
    return _moved(stretched), np.asarray(cv2.resize(weight, (width, height)), np.float32)


def _moved(flow: Floats) -> Floats:
    """(H, W, 2) float32: where each pixel comes to lie, x and y."""
    at = flow.copy()
    at[..., 0] += np.arange(flow.shape[1], dtype=np.float32)
    at[..., 1] += np.arange(flow.shape[0], dtype=np.float32)[:, None]
    return at


def _fetched(values: Floats, at: Floats) -> Floats:
    """The values at (x, y), between pixels, and those of the border outside."""
    return np.asarray(cv2.remap(values, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)  # type: ignore[call-overload]


def _agreement(sigmas: Floats) -> Floats:
    """exp(-x²/2), 0 for NaN."""
    return np.asarray(np.nan_to_num(np.exp(-0.5 * sigmas**2)), np.float32)


def _dot(a: Floats, b: Floats) -> Floats:
    """(H, W) dot products of vectors (H, W, C)."""
    return np.asarray(np.einsum("yxc,yxc->yx", a, b), np.float32)


def _unit(vectors: Floats, raw: Floats) -> Floats:
    """The vectors at unit length; (0, 0, 0) where `raw` is."""
    shrink = (_dot(raw, raw) > 0) / np.sqrt(np.maximum(_dot(vectors, vectors), np.float32(1e-12)))
    return np.asarray(vectors * shrink[..., None], np.float32)
