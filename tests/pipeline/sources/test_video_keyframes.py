"""Packets that a file or its demuxer calls keyframes, and that are none."""

from __future__ import annotations

from collections.abc import Container
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import pytest

from depthmill.pipeline.sources import open_source, video_packets
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import content, read_all

FRAMES = 40
EVERY = range(FRAMES)


def flag(path: Path, keys: Container[int], **options: Any) -> Path:
    """A clip whose packets `keys` are called keyframes, besides those that are."""
    written = make.write_video(path.with_name(f"right{path.suffix}"), bframes=0, **options)
    with av.open(str(written)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            packet.is_keyframe = packet.is_keyframe or number in keys
            packet.stream = stream
            writer.mux(packet)
    return path


def check(path: Path) -> None:
    """See that every frame is the one painted, wherever reading starts."""
    whole = read_all(path)
    assert [None if frame.image is None else make.read_index(frame.image) for frame in whole] == list(EVERY)
    for start in (5, 15, 16, 28):
        with closing(open_source(path)) as source:
            assert content(list(source.read(start, start + 7))) == content(whole[start : start + 7])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"codec": "mpeg4"}),
        ("clip.mp4", {"codec": "libx265"}),
        ("clip.avi", {"codec": "h263p"}),
        ("clip.avi", {"codec": "cinepak", "pix_fmt": "rgb24"}),
    ],
)
def test_all_packets_are_called_keyframes(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(flag(tmp_path / name, EVERY, **options))


def test_an_avi_without_an_index(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.avi", codec="msmpeg4", bframes=0)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")])
    check(path)


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.mkv", "msmpeg4"), ("clip.avi", "flv")])
def test_some_packets_are_called_keyframes(name: str, codec: str, tmp_path: Path) -> None:
    check(flag(tmp_path / name, (15, 28), codec=codec))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"options": {"x264-params": "keyint=1"}}),
        ("clip.mkv", {"codec": "ffv1", "gop": 1}),
        ("clip.mov", {"codec": "cfhd", "pix_fmt": "yuv422p10le", "gop": 1}),  # whose decoder calls none a keyframe
    ],
)
def test_where_the_first_packets_are_keyframes_no_more_are_decoded(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.write_video(tmp_path / name, bframes=0, **options)
    decoded_order, asked = video_packets._decoded_order, []
    monkeypatch.setattr(video_packets, "_LOOKED_AT", 8)
    monkeypatch.setattr(
        video_packets, "_decoded_order", lambda *args: asked.append(len(args[1])) or decoded_order(*args)
    )
    check(path)
    assert set(asked) == {8}
