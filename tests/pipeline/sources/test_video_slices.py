from __future__ import annotations

from pathlib import Path

import av
import pytest

from depthmill.pipeline.sources.video_slices import slice_reader
from depthmill.tests import media as make


def opened(path: Path) -> tuple[bytes | None, list[bytes]]:
    """A video's header and its packets."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.codec_context.extradata, [bytes(packet) for packet in container.demux(stream) if packet.size]


def packed(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_packet_with_both_fields_is_not_one_field(suffix: str, tmp_path: Path) -> None:
    header, packets = opened(make.write_fields(tmp_path / f"fields{suffix}", pictures=3, frames=[1]))
    read = slice_reader(header)
    assert read is not None
    assert [read(packet, False) for packet in packets] == [(one, False) for one in (True, True, False, True, True)]
    for packet in (packets[3] + packets[4], b"", packets[0][:6]):
        assert read(packet, False) == (False, False)


def test_a_stream_that_goes_on_with_another_header_lacks_nothing(tmp_path: Path) -> None:
    """Frames' numbers take more bits where more of them are kept."""
    parts = [
        opened(make.write_video(tmp_path / f"{references}.ts", gop=1000, options={"x264-params": params}))
        for references in (16, 1)
        for params in [f"scenecut=0:ref={references}:b-pyramid=normal"]
    ]
    read = slice_reader(parts[0][0])
    assert read is not None
    assert not any(read(packet, number == 0)[1] for _, packets in parts for number, packet in enumerate(packets))


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
@pytest.mark.parametrize(
    ("pix_fmt", "options"), [("yuv420p", "tff=1"), ("yuv444p", "tff=1:cqm=jvt"), ("yuv422p10le", "bff=1")]
)
def test_headers_of_every_profile(pix_fmt: str, options: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    for interlaced in (True, False):
        params = {"x264-params": options if interlaced else "cqm=jvt"}
        header, packets = opened(make.write_video(path, frames=6, pix_fmt=pix_fmt, options=params))
        read = slice_reader(header)
        assert read is not None
        assert {read(packet, False) for packet in packets} == {(False, False)}
        read = slice_reader(header)
        assert {read(packet, False) for packet in packets[:2] + packets[4:]} == {(False, False), (False, True)}


def test_a_header_with_scaling_lists_and_cycles() -> None:
    """Of which no encoder at hand writes any."""
    header = ["01100100", "00000000", "00011110", "1", "010", "1", "1", "0"]  # profile, level, colours
    header += ["1", "1" + "1" * 16, "1" + "000010001", "0" * 6]  # scaling lists: a whole one, an empty one
    header += ["010", "010", "0", "1", "1", "010", "1"]  # frame numbers of 5 bits; order by a cycle of one
    header += ["010", "0", "1", "1", "0", "01001"]  # references, size, not frames only
    read = slice_reader(b"\0\0\1\x67" + packed("".join(header)))
    assert read is not None
    for flags, expected in (("10", True), ("11", True), ("01", False)):
        packet = b"\0\0\1\x21" + packed("1" + "00110" + "1" + "00000" + flags)
        assert read(packet, False) == (expected, False)


@pytest.mark.parametrize("header", [None, b"", b"\1", b"\0\0\1", b"\0\0\1\x67\x4d", b"\0\0\1\x68\xee"])
def test_without_a_header_that_can_be_read_there_are_no_fields(header: bytes | None) -> None:
    assert slice_reader(header) is None
