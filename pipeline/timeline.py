"""Smoothing seen over time: one column of every frame, raw above smoothed, above the curves of scale and shift."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Floats = npt.NDArray[np.float32]

_SLICE, _CURVE, _GAP, _LINE = 150, 90, 6, 18  # heights in pixels
_CUT_EVERY = 16  # pixels at least, on average: more lines would hide what is between them
_FINE = 3  # lines are drawn this much larger, then shrunk: Pillow's own have steps
_INK, _FAINT, _CUT, _CURVE_COLOUR = "black", (215, 215, 215), (120, 120, 120), (31, 90, 160)


@dataclass(frozen=True, eq=False)
class Timeline:
    """What smoothing did to one source.

    Attributes:
        raw: (H, F) float32, depth along one column of F frames spread evenly over the source's N, first and last
            included where F > 1; NaN where invalid.
        smoothed: The same after smoothing.
        scale: (N,) float32, NaN where a frame has no labels.
        shift: (N,) float32, in units of depth, NaN likewise.
        shot: (N,) int32.
        times_s: (N,) float64, rising; None where frames have no times.
        column: Which column of how many, as text.
    """

    raw: Floats
    smoothed: Floats
    scale: Floats
    shift: Floats
    shot: npt.NDArray[np.int32]
    times_s: npt.NDArray[np.float64] | None
    column: str


def draw_timeline(
    timeline: Timeline, width: int, margin: int, colours: Callable[[Floats], npt.NDArray[np.uint8]], step: float
) -> Image.Image:
    """Draw it: x is time, the same for all four panels; vertical lines are cuts, unless they are too many.

    Args:
        timeline: What to draw.
        width: Of the panels, in pixels.
        margin: On their left, for names and numbers.
        colours: (H, F) depth to (H, F, 3) uint8, the same for raw and smoothed.
        step: Depth from one contour line to the next. A contour shows a flicker of a fraction of it, where the eye
            misses the change of colour.
    """
    heights = (_SLICE, _SLICE, _CURVE, _CURVE)
    tops = [_LINE + sum(heights[:i]) + i * _GAP for i in range(len(heights))]
    sheet = Image.new("RGB", (margin + width, tops[-1] + heights[-1] + 2 * _LINE + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    x = (np.arange(timeline.shot.size) + 0.5) * width / timeline.shot.size
    cuts = [width * int(i) / timeline.shot.size for i in np.flatnonzero(np.diff(timeline.shot)) + 1]
    ticks = _ticks_of_time(timeline, x)
    title = f"{timeline.column} over time; dark lines are of equal depth"
    if len(cuts) > width / _CUT_EVERY:
        title += f"; {len(cuts)} cuts, too many to draw"
        cuts = []
    draw.text((margin, 2), title, _INK, font)

    for name, depth, top in (("depth", timeline.raw, tops[0]), ("smoothed", timeline.smoothed, tops[1])):
        panel = _slice(depth, (width, _SLICE), colours, step)
        _verticals(panel, cuts, "white")
        sheet.paste(panel, (margin, top))
        draw.text((4, top + _SLICE // 2), name, _INK, font, anchor="lm")
    for name, values, neutral, top in (
        ("scale", timeline.scale, 1.0, tops[2]),
        ("shift", timeline.shift, 0.0, tops[3]),
    ):
        low, high = _range(values, neutral)
        panel = Image.new("RGB", (width * _FINE, _CURVE * _FINE), "white")
        lines = ImageDraw.Draw(panel)

        def at(value: float, low: float = low, high: float = high) -> float:
            return (high - value) / (high - low) * (_CURVE - 1)

        for position, _ in ticks:
            lines.line((position * _FINE, 0, position * _FINE, _CURVE * _FINE), _FAINT, _FINE)
        for tick in _nice(low, high, 3):
            lines.line((0, at(tick) * _FINE, width * _FINE, at(tick) * _FINE), _FAINT, _FINE)
            draw.text((margin - 5, top + at(tick)), _number(tick, high - low), _INK, font, anchor="rm")
        for run in _runs(values, timeline.shot):
            points = [(float(x[i]) * _FINE, at(float(values[i])) * _FINE) for i in run]
            lines.line(points, _CURVE_COLOUR, round(1.6 * _FINE), joint="curve")
            if len(points) == 1:
                lines.circle(points[0], 1.5 * _FINE, _CURVE_COLOUR)
        panel = panel.resize((width, _CURVE), Image.Resampling.BOX)
        _verticals(panel, cuts, _CUT)
        sheet.paste(panel, (margin, top))
        draw.rectangle((margin, top, margin + width - 1, top + _CURVE - 1), outline=_CUT)
        draw.text((4, top + _CURVE // 2), name, _INK, font, anchor="lm")

    bottom = tops[-1] + _CURVE
    for position, text in ticks:
        draw.line((margin + position, bottom, margin + position, bottom + 4), _INK)
        half = font.getlength(text) / 2
        draw.text((margin + min(max(position, half), width - half), bottom + 6), text, _INK, font, anchor="ma")
    unit = "frame" if timeline.times_s is None else "time, s"
    draw.text((margin + width / 2, bottom + 6 + _LINE - 2), unit, _INK, font, anchor="ma")
    return sheet


def _slice(
    depth: Floats, size: tuple[int, int], colours: Callable[[Floats], npt.NDArray[np.uint8]], step: float
) -> Image.Image:
    """The colours of a column over time, and its contours, which are found at the panel's own height."""
    height = size[1]
    rows = (np.arange(height) + 0.5) * len(depth) / height - 0.5
    below = np.clip(np.floor(rows).astype(int), 0, len(depth) - 1)
    above = np.minimum(below + 1, len(depth) - 1)
    share = np.clip(rows - below, 0, 1).astype(np.float32)[:, None]
    fitted = (1 - share) * depth[below] + share * depth[above]
    shown = colours(fitted)
    with np.errstate(invalid="ignore"):
        band = np.floor(fitted / step)
        contour = np.abs(np.diff(band, axis=0, prepend=band[:1])) > 0  # False next to NaN
    shown[contour] = shown[contour] // 3
    return Image.fromarray(shown).resize(size, Image.Resampling.NEAREST)


def _verticals(panel: Image.Image, positions: list[float], colour: str | tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(panel)
    for position in positions:
        draw.line((position, 0, position, panel.height), colour, 2)


def _runs(values: Floats, shot: npt.NDArray[np.int32]) -> Iterator[range]:
    """Frames that one line joins: of one shot, and with values."""
    ends = np.flatnonzero(np.diff(shot) | np.diff(np.isnan(values))) + 1
    for start, stop in pairwise([0, *ends.tolist(), values.size]):
        if not np.isnan(values[start]):
            yield range(start, stop)


def _range(values: Floats, neutral: float) -> tuple[float, float]:
    """What a curve's panel spans: all values and the one that changes nothing, and some room."""
    known = [neutral, *values[np.isfinite(values)].tolist()]
    low, high = min(known), max(known)
    room = max(0.08 * (high - low), 0.005)
    return low - room, high + room


def _ticks_of_time(timeline: Timeline, x: npt.NDArray[np.float64]) -> list[tuple[float, str]]:
    """Where on the axis which times are written; frame numbers where there are no times."""
    times = np.arange(x.size, dtype=np.float64) if timeline.times_s is None else timeline.times_s
    first, last = float(times[0]), float(times[-1])
    return [(float(np.interp(t, times, x)), _number(t, last - first)) for t in _nice(first, last, 10)]


def _nice(low: float, high: float, count: int) -> list[float]:
    """Round values in [low, high], about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * unit / rough)))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float, span: float) -> str:
    """With as many decimals as tell ticks over `span` apart."""
    decimals = max(0, 1 - math.floor(math.log10(span))) if span > 0 else 2
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
