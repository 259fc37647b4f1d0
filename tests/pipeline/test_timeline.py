import numpy as np
import pytest
from PIL import ImageDraw

from depthmill.pipeline.timeline import Timeline, _nice, _number, draw_timeline

N, H, WIDTH, MARGIN = 40, 60, 400, 72
RAW, SMOOTHED = slice(18, 168), slice(174, 324)
CURVES = slice(330, 420), slice(426, 516)


def grey(depth: np.ndarray) -> np.ndarray:
    shown = np.nan_to_num(depth * 200 + 40).astype(np.uint8)
    return np.repeat(shown[..., None], 3, -1)


def timeline(scale: np.ndarray, shot: np.ndarray, times_s: np.ndarray | None = None) -> Timeline:
    truth = np.broadcast_to(np.linspace(0.8, 0.2, H, dtype=np.float32)[:, None], (H, N))
    return Timeline(truth / scale, truth, scale, np.zeros(N, np.float32), shot, times_s, "column 3 of 6")


def drawn(one: Timeline) -> np.ndarray:
    return np.asarray(draw_timeline(one, WIDTH, MARGIN, grey, 0.1))[:, MARGIN:]


def blue(panel: np.ndarray) -> np.ndarray:
    return panel[..., 2].astype(int) - panel[..., 0] > 60


def test_flicker_shows_above_and_not_below():
    scale = np.where(np.arange(N) % 2, 0.8, 1.2).astype(np.float32)
    sheet = drawn(timeline(scale, np.zeros(N, np.int32)))
    changes = np.abs(np.diff(sheet[..., 0].astype(int), axis=1)) > 10
    assert changes[RAW].sum(1).mean() > 0.9 * (N - 1)
    assert not changes[SMOOTHED].any()


def test_the_curve_goes_through_the_values():
    scale = np.linspace(0.9, 1.1, N, dtype=np.float32)
    sheet = drawn(timeline(scale, np.zeros(N, np.int32), np.arange(N) / 10))
    line = blue(sheet[CURVES[0]])
    height = [np.flatnonzero(line[:, x]).mean() for x in range(6, WIDTH - 6)]
    assert (np.diff(height) <= 0).all(), "rising values rise on the page"
    assert height[0] - height[-1] == pytest.approx(90 / 1.16 * (WIDTH - 12) / WIDTH, abs=4)
    flat = np.flatnonzero(blue(sheet[CURVES[1]]).any(1))
    assert np.ptp(flat) <= 3, "a constant one is level"


def test_cuts_and_frames_without_labels_part_the_curves():
    scale = np.ones(N, np.float32)
    scale[10:20] = np.nan
    sheet = drawn(timeline(scale, (np.arange(N) >= 30).astype(np.int32), np.arange(N) / 10))
    covered = blue(sheet[CURVES[0]]).any(0)
    assert covered[8:90].all()
    assert not covered[104:196].any()
    assert not covered[297:303].any()
    assert covered[310:390].all()
    assert (sheet[RAW, 300] == 255).all(), "the cut crosses the pictures too"
    assert (sheet[RAW, 110:190] == 0).mean() > 0.99, "what has no depth has its colour, and no contour"


def test_the_axis_is_of_times_if_there_are_any(monkeypatch):
    text, said = ImageDraw.ImageDraw.text, {}

    def noted(draw, at, words, *more, **how):
        said[words] = at[0]
        text(draw, at, words, *more, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noted)
    times_s = np.append(np.arange(20) / 10, np.arange(100, 120) / 10)
    for times, unit, ten in ((times_s, "time, s", 20), (None, "frame", 10)):
        said.clear()
        drawn(timeline(np.ones(N, np.float32), np.zeros(N, np.int32), times))
        assert said.keys() & {"time, s", "frame"} == {unit}
        assert said["10"] == MARGIN + (ten + 0.5) * WIDTH / N, "in the middle of the frame of that time"


def test_cuts_that_would_hide_the_pictures_are_not_drawn():
    many = drawn(timeline(np.ones(N, np.float32), np.arange(N, dtype=np.int32)))
    none = drawn(timeline(np.ones(N, np.float32), np.zeros(N, np.int32)))
    assert (many[RAW] == none[RAW]).all()


def test_one_frame_and_no_times():
    one = Timeline(
        np.full((H, 1), 0.5, np.float32),
        np.full((H, 1), 0.5, np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
        np.zeros(1, np.int32),
        None,
        "column 1 of 1",
    )
    assert blue(drawn(one)[CURVES[0]]).any(), "a dot"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 6, "0 2 4 6"), (0.93, 1.11, "0.95 1 1.05 1.1"), (-0.02, 0.031, "-0.02 0 0.02"), (3, 3, "3")],
)
def test_ticks_are_round(low, high, expected):
    ticks = _nice(low, high, 3)
    assert " ".join(_number(tick, high - low) for tick in ticks) == expected
