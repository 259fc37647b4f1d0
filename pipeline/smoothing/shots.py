"""Shots: where a video is cut, decided once for the whole of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from depthmill.pipeline.smoothing.edges import FIELDS, GAPS

Floats = npt.NDArray[np.floating[Any]]

_COVERAGE = FIELDS.index("coverage")
_DIFFERENT = 0.1  # score of a cut at least
_UNUSUAL = 2.5  # and so many times the median of the scores around it
_AROUND = 12  # frames to either side
_BLOCK = 4096  # frames whose surroundings are in memory at a time
_BRIDGED = 0.25  # two frames that share this much of their pixels show the same scene,
_FOLLOWED = 0.5  # and two neighbours that flow leads between with ease this much
_FLASH = 8  # edges as long as this lead across a flash; longer ones also across a shot, behind which the view is back


def find_shots(score: Floats, edges: Floats, labelled: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Number the shots.

    A cut needs two witnesses. One is that no flow leads from any frame after it to any frame before it: it does across
    a flash. The other tells it from a pan that is too fast for flow: greys that changed more than they do around it, or
    flow that leads with ease up to it and from it on; then flow over more frames than a flash has does not count, for
    the view may have come back. Where a frame is missing there is no score, and flow decides
    alone. A dissolve is no cut.

    Args:
        score: (N,) of `segment_edges`.
        edges: (N, gaps, FIELDS) of `segment_edges`.
        labelled: (N,) whether a frame has a label.

    Returns:
        (N,) int32, from 0, rising by 1 at every cut. A frame without a label, or of which nothing was seen since it
        could not be read again, belongs to the shot before it.
    """
    frames = len(score)
    seen = labelled & _paired(edges[..., _COVERAGE])
    padded = np.pad(score.astype(np.float32), _AROUND, constant_values=np.nan)
    around = sliding_window_view(padded, 2 * _AROUND + 1)
    usual = np.empty(frames, np.float32)
    for start in range(0, frames, _BLOCK):
        window = around[start : start + _BLOCK].copy()
        window[:, _AROUND] = 0.0  # not the frame's own; and some number in every row
        usual[start : start + _BLOCK] = np.nanmedian(window, axis=1)
    unknown = np.isnan(score)
    changed = unknown | (score >= np.maximum(_DIFFERENT, _UNUSUAL * usual))
    followed = np.nan_to_num(edges[:, 0, _COVERAGE]) >= _FOLLOWED
    settled = np.zeros(frames, bool)
    settled[2:-1] = followed[1:-2] & followed[3:]
    coverage = np.nan_to_num(edges[..., _COVERAGE])
    bridge = np.where(settled, _bridges(coverage[:, : GAPS.index(_FLASH) + 1]), _bridges(coverage))
    cut = (changed | settled) & (bridge < _BRIDGED) & seen
    cut[: seen.argmax() + 1] = False
    return np.cumsum(cut, dtype=np.int32)


def _paired(coverage: Floats) -> npt.NDArray[np.bool_]:
    """Whether a frame was compared with any other: (N,)."""
    pairs = coverage >= 0  # neither NaN nor unread
    paired: npt.NDArray[np.bool_] = np.any(pairs, axis=1)
    for row, gap in enumerate(GAPS[: coverage.shape[1]]):
        paired[:-gap] |= pairs[gap:, row]
    return paired


def _bridges(coverage: Floats) -> npt.NDArray[np.float64]:
    """The best coverage of any edge that leads from t or later to before t, for every t: (N,)."""
    frames = len(coverage)
    bridge = np.zeros(frames)
    for row, gap in enumerate(GAPS[: coverage.shape[1]]):
        for ahead in range(min(gap, frames)):  # the edge of frame t + ahead leads to t + ahead - gap < t
            np.maximum(bridge[: frames - ahead], coverage[ahead:, row], out=bridge[: frames - ahead])
    return bridge
