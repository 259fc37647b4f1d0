from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from depthmill.pipeline.sources import open_source, video_packets
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.clips import FRAMES, GOOD, TIMES_MS, indices, noisy
from depthmill.tests.pipeline.sources.contract import SourceContract, read_all

ROOT = Path(__file__).parents[3]
# A P-VOP's type, modulo, marker, time in 1/25 s, marker, vop_coded of 0, and stuffing.
UNCODED = b"\0\0\1\xb6" + int("0101011011001111", 2).to_bytes(2, "big")


class TestGoodVideo(SourceContract):
    @pytest.fixture(params=GOOD)
    def media(self, request: pytest.FixtureRequest, clips: Callable[[str], Path]) -> Path:
        return clips(request.param)

    def test_every_frame_is_the_one_painted(self, media: Path) -> None:
        assert indices(media) == list(range(FRAMES))

    def test_times(self, media: Path) -> None:
        source = open_source(media).probe()
        expected = np.array(TIMES_MS) / 1000 if media.stem == "variable_rate" else np.arange(FRAMES) / 25
        np.testing.assert_allclose(source.time_s, expected, atol=6e-4)
        assert source.fps == pytest.approx((FRAMES - 1) / expected[-1], rel=1e-3)


@pytest.mark.parametrize("bframes", [0, 2])
def test_a_gap_in_an_avi_stays(bframes: int, tmp_path: Path) -> None:
    times_ms = [40 * index + 1000 * (index > 12) for index in range(FRAMES)]
    path = make.write_video(tmp_path / "gap.avi", times_ms=times_ms, bframes=bframes)
    assert indices(path) == list(range(FRAMES))
    apart_s = np.diff(open_source(path).probe().time_s)
    assert apart_s.max() == pytest.approx(1.04)
    assert abs(int(apart_s.argmax()) - 12) <= 2, "an AVI's times are those of decoding"
    assert apart_s.sum() == pytest.approx(2.56, abs=0.05)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
@pytest.mark.parametrize(
    "frames",
    [(), range(0, 76, 2), range(70), [index for index in range(76) if index % 12]],
    ids=["none", "half", "the first 70", "all but each twelfth"],
)
def test_two_packets_that_are_fields_are_one_frame(frames: Sequence[int], suffix: str, tmp_path: Path) -> None:
    path = make.write_fields(tmp_path / f"fields{suffix}", pictures=76, frames=frames)
    np.testing.assert_allclose(open_source(path).probe().time_s, np.arange(76) / 25, atol=1e-6)
    greys = [frame.image is not None and float(frame.image.mean()) for frame in read_all(path)]
    assert np.allclose(greys, (4 + 10 * (np.arange(76) % 20)) * 255 / 219, atol=1)


def test_interlaced_pictures_in_one_packet_are_counted_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.write_video(tmp_path / "a.mp4", frames=12, options={"x264-params": "interlaced=1"})
    monkeypatch.setattr(video_packets, "_decoded_order", lambda *_: pytest.fail("not needed"))
    assert indices(path) == list(range(12))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_times_of_decoding_do_not_say_the_order(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    with (
        av.open(str(make.write_video(tmp_path / "right.mp4", bframes=3))) as reader,
        av.open(str(path), "w") as writer,
    ):
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 25), number, number
            writer.mux(packet)
    assert indices(path) == list(range(FRAMES))
    np.testing.assert_allclose(open_source(path).probe().time_s, np.arange(FRAMES) / 25, atol=6e-4)


def test_where_the_first_packets_are_not_reordered_no_more_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make.write_video(tmp_path / "clip.mkv", codec="mpeg2video", bframes=0)  # its header announces B-frames
    decoded_order, asked = video_packets._decoded_order, []
    monkeypatch.setattr(video_packets, "_LOOKED_AT", 8)
    monkeypatch.setattr(
        video_packets, "_decoded_order", lambda *args: asked.append(len(args[1])) or decoded_order(*args)
    )
    assert indices(path) == list(range(FRAMES))
    assert asked == [8]


@pytest.mark.parametrize("suffix", [".m1v", ".m2v"])
def test_bare_mpeg_streams_are_in_order(suffix: str, tmp_path: Path) -> None:
    codec = "mpeg1video" if suffix == ".m1v" else "mpeg2video"
    assert indices(make.write_video(tmp_path / f"clip{suffix}", codec=codec)) == list(range(FRAMES))


def test_edit_lists_cut_frames_off(tmp_path: Path) -> None:
    path = make.write_video(
        tmp_path / "clip.mp4",
        times_ms=[40 * (index - 7) for index in range(FRAMES)],
        options={"x264-params": "keyint=20"},
    )
    assert indices(path) == list(range(7, FRAMES))
    source = open_source(path)
    assert [make.read_index(frame.image) for frame in source.read(3, 20)] == list(range(10, 27))
    source.close()


def test_packets_that_are_not_shown_are_no_frames(tmp_path: Path) -> None:
    """Alternate references of VP8, which a libvpx that is run once makes none of: one is written by hand."""
    path = make.write_video(tmp_path / "clip.webm", codec="libvpx", bframes=0)
    with av.open(str(path)) as container:
        packet = next(packet for number, packet in enumerate(container.demux(video=0)) if number == 7)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(packet))] &= ~0x10
    path.write_bytes(data)
    assert indices(path) == [index for index in range(FRAMES) if index != 7]


def test_a_seek_that_finds_nothing_falls_back_to_the_start(
    clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from depthmill.pipeline.sources.video_decode import Decoder

    path = clips("b_frames.mp4")
    monkeypatch.setattr(Decoder, "_landing_places", lambda self, first: [FRAMES - 1])  # always late
    source = open_source(path)
    assert [make.read_index(frame.image) for frame in source.read(20, 30)] == list(range(20, 30))
    source.close()


def test_packets_that_are_others_after_a_seek_are_read_from_the_start(
    clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from depthmill.pipeline.sources.video_decode import Decoder, LostPlaceError

    numbered = Decoder._numbered

    def lost(self: Decoder, packets: Iterator[av.Packet], start: int, first: int) -> Iterator[tuple[int, av.Packet]]:
        if start:
            raise LostPlaceError
        return numbered(self, packets, start, first)

    monkeypatch.setattr(Decoder, "_numbered", lost)
    with closing(open_source(clips("b_frames.mp4"))) as source:
        assert [make.read_index(frame.image) for frame in source.read(20, 30)] == list(range(20, 30))


def test_packets_that_are_passed_over_are_told_of(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", gop=1000)
    source, passed = open_source(path), []
    frames = source.read(FRAMES - 1, FRAMES, lambda: passed.append(1))
    assert make.read_index(next(frames).image) == FRAMES - 1
    assert len(passed) == FRAMES
    source.close()
    make.break_middle(path, 0.6, 3000)
    source, passed = open_source(path), []
    assert next(source.read(FRAMES - 1, FRAMES, lambda: passed.append(1))).image is None
    assert len(passed) > FRAMES  # once more, to see what is lost
    source.close()


@pytest.mark.parametrize(
    ("offsets_s", "second_s"),
    [((3, 1.013), 0.8), ((100, 0), 0.8), ((0, 90_000), 0.8), ((3, 603), 600)],  # the last have one clock, and a gap
)
@pytest.mark.parametrize("suffix", [".mpg", ".ts"])
def test_files_joined_with_a_clock_each_follow_each_other(
    suffix: str, offsets_s: tuple[float, float], second_s: float, tmp_path: Path
) -> None:
    pictures, joined = noisy(), tmp_path / f"joined{suffix}"
    with joined.open("wb") as file:
        for number, offset_s in enumerate(offsets_s):
            part = pictures[20 * number : 20 * number + 20]
            clock = {"output_ts_offset": str(offset_s)}
            path = make.write_video(tmp_path / f"part{suffix}", codec="mpeg2video", pictures=part, container=clock)
            file.write(path.read_bytes())
    found = indices(joined)
    lost = (17, 19) if suffix == ".ts" else ()  # counters that jump at a seam look like missing bytes
    assert found == [None if index in lost else index for index in range(FRAMES)]
    source = open_source(joined)
    time_s = np.arange(FRAMES) / 25
    time_s[20:] += second_s - time_s[20]
    np.testing.assert_allclose(source.probe().time_s, time_s, atol=6e-4)
    part = [None if frame.image is None else make.read_index(frame.image) for frame in source.read(15, 30)]
    assert part == found[15:30]
    source.close()


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
def test_pictures_that_are_not_coded_are_no_damage(suffix: str, tmp_path: Path) -> None:
    pictures = noisy()
    pictures[13] = pictures[12]
    coded = make.write_video(tmp_path / f"coded{suffix}", pictures=pictures, codec="mpeg4", bframes=0)
    path = tmp_path / f"clip{suffix}"
    with av.open(str(coded)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(reader.demux(reader.streams.video[0])):
            if not packet.size:
                continue
            uncoded = av.Packet(UNCODED)
            uncoded.pts, uncoded.dts, uncoded.time_base = packet.pts, packet.dts, packet.time_base
            written = uncoded if number == 13 else packet
            written.stream = stream
            writer.mux(written)
    assert indices(path) == [index for index in range(FRAMES) if index != 13]


def test_the_real_clip() -> None:
    source = open_source(ROOT / "demo" / "pedestrians.mp4")
    probed = source.probe()
    assert (probed.frames, probed.height, probed.width) == (60, 576, 768)
    assert probed.fps == pytest.approx(10)
    middle = list(source.read(25, 33))
    whole = list(source.read(0, 60))
    source.close()
    for frame, same in zip(middle, whole[25:33], strict=True):
        assert frame.image is not None
        np.testing.assert_array_equal(frame.image, same.image)
