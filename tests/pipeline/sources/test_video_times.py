"""When the frames of a video are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.sources import open_source, video_packets
from depthmill.tests import media as make

FRAMES = 40


@pytest.mark.parametrize(("codec", "name"), [("libx264", "raw.h264"), ("libx265", "raw.hevc")])
def test_a_raw_stream_has_the_rate_that_its_header_says(codec: str, name: str, tmp_path: Path) -> None:
    source = open_source(make.write_video(tmp_path / name, frames=12, codec=codec, fps=60)).probe()
    assert source.fps == pytest.approx(60)
    np.testing.assert_allclose(source.time_s, np.arange(12) / 60, atol=1e-6)


def test_one_frame_has_the_rate_of_its_header(tmp_path: Path) -> None:
    assert open_source(make.write_video(tmp_path / "clip.mkv", frames=1, fps=30)).probe().fps == pytest.approx(30)


def strip_times(path: Path, kept: Sequence[int]) -> Path:
    """Take the timestamps out of a transport stream, but for those of the packets `kept`."""
    data, at, number = bytearray(path.read_bytes()), 0, 0
    while (at := data.find(b"\0\0\1\xe0", at)) >= 0:
        if number not in kept:
            data[at + 7] &= 0x3F  # neither PTS nor DTS; in their place, stuffing
            data[at + 9 : at + 9 + data[at + 8]] = b"\xff" * data[at + 8]
        at, number = at + 9, number + 1
    assert number == FRAMES
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("kept", [range(FRAMES - 12), range(12, FRAMES), range(12, 28), range(0, FRAMES, 3), [0]])
def test_frames_without_a_timestamp_come_at_the_rate_of_the_others(
    kept: Sequence[int], bframes: int, tmp_path: Path
) -> None:
    path = make.write_video(tmp_path / "clip.ts", bframes=bframes)
    times_s = open_source(strip_times(path, kept)).probe().time_s
    np.testing.assert_allclose(times_s, np.arange(FRAMES) / 25, atol=6e-4)


def test_timestamps_of_centuries_are_damaged(tmp_path: Path) -> None:
    """The last of them is too far from the first for the difference of two int64."""
    decades_s = 90 * 365 * 86_400
    path = make.write_video(tmp_path / "a.mkv", frames=2, times_ms=[0, 1000 * decades_s])
    np.testing.assert_allclose(open_source(path).probe().time_s, [0, decades_s])
    ends = np.array([-(2**62), 0, 2**62 + 2**61], np.int64)
    for pts in (ends, ends // 2**8):
        ticks, tick_s = video_packets._times(pts, 1e-3, rate=25.0)
        np.testing.assert_allclose(ticks * tick_s, np.arange(3) / 25)


def test_columns_of_packets_take_half_the_bytes_where_that_holds_them(tmp_path: Path) -> None:
    for end, dtype in ((2**31 - 1, np.int32), (2**31, np.int64), (video_packets.NO_VALUE, np.int64)):
        column = np.array([3, end], np.int64)
        compact = video_packets._compact(column)
        assert compact.dtype == dtype
        assert (compact == column).all()
    table = video_packets.scan(str(make.write_video(tmp_path / "clip.mp4", frames=5)), 10, 1 << 20)
    assert {column.dtype for column in (table.pts, table.pos, table.size, table.ticks)} == {np.dtype(np.int32)}
    assert table.find(int(table.pts[2]), int(table.pos[2]), int(table.size[2])) == 2
    assert table.find(video_packets.NO_VALUE, 2**40, 1) is None


def test_joined_clocks_follow_each_other_as_shown() -> None:
    """Of reordered packets neither the first of a file need be shown first, nor the last last."""
    none = video_packets.NO_VALUE
    pts, dts = np.array([0, 3, 1, none, 2, 12, 10, none, 11]), np.array([-1, 0, 1, none, 2, -1, 0, none, 1])
    clock = video_packets._one_clock(pts, dts, 1.0, rate=1.0)
    assert clock.tolist() == [0, 3, 1, none, 2, 6, 4, none, 5]


def test_times_between_coarse_timestamps_are_not_rounded() -> None:
    ticks, tick_s = video_packets._times(np.array([0, video_packets.NO_VALUE, 1]), 1.0, rate=2.0)
    np.testing.assert_array_equal(ticks * tick_s, [0, 0.5, 1])
