from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.sources import open_source, video, video_container, video_packets
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import SourceContract, content, read_all

ROOT = Path(__file__).parents[3]
FRAMES = 40

OPEN_GOP = {"x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:scenecut=0"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good", "cpu-used": "5"}
# A P-VOP's type, modulo, marker, time in 1/25 s, marker, vop_coded of 0, and stuffing.
UNCODED = b"\0\0\1\xb6" + int("0101011011001111", 2).to_bytes(2, "big")
TIMES_MS = [40 * index + 13 * (index % 3) for index in range(FRAMES)]

GOOD = {
    "b_frames.mp4": {},
    "no_b_frames.mp4": {"bframes": 0},
    "open_gop.mp4": {"bframes": 3, "options": OPEN_GOP},
    "intra_refresh.mp4": {"gop": 12, "options": INTRA_REFRESH},
    "ten_bit.mkv": {"pix_fmt": "yuv420p10le"},
    "variable_rate.mp4": {"times_ms": TIMES_MS},
    "transport.ts": {},
    "open_gop.ts": {"codec": "mpeg2video"},
    "program.mpg": {"codec": "mpeg2video"},
    "no_pts.avi": {},
    "reordered.avi": {"codec": "mpeg4"},
    "intra.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "bframes": 0},
    "raw.h264": {},
    "hevc.mp4": {"codec": "libx265"},
    "hidden_frames.webm": {"codec": "libvpx", "options": ALT_REF},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
}


def cut_head(path: Path) -> Path:
    """Cut the first third off a transport stream, as a recording that was joined midway."""
    data = path.read_bytes()
    path.write_bytes(data[188 * (len(data) // 188 // 3) :])
    return path


BROKEN: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "truncated mp4": ("b_frames.mp4", make.truncate),
    "truncated avi": ("no_pts.avi", make.truncate),
    "broken mp4 without B-frames": ("no_b_frames.mp4", lambda path: make.break_middle(path, 0.6, 3000)),
    "broken mp4": ("b_frames.mp4", lambda path: make.break_middle(path, 0.6, 3000)),
    "broken open gop": ("open_gop.mp4", lambda path: make.break_middle(path, 0.6, 3000)),
    "broken intra refresh": ("intra_refresh.mp4", lambda path: make.break_middle(path, 0.7, 3000)),
    "broken ts": ("open_gop.ts", make.break_middle),
    "broken h264 ts": ("transport.ts", lambda path: make.break_middle(path, 0.6, 3000)),
    "broken mpg": ("program.mpg", lambda path: make.break_middle(path, 0.6, 2000)),
    "first keyframe cut off, mpeg2": ("open_gop.ts", cut_head),
    "first keyframe cut off, h264": ("transport.ts", cut_head),
    "broken mjpeg": ("intra.avi", make.break_middle),
}


def noisy(frames: int = FRAMES) -> list[make.Picture]:
    """Painted frames with enough noise that every frame has bytes worth breaking."""
    random = np.random.default_rng(1)
    return [
        np.clip(make.paint(index) + random.integers(-20, 20, (make.HEIGHT, make.WIDTH, 1)), 0, 255).astype(np.uint8)
        for index in range(frames)
    ]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("clips")

    def clip(name: str) -> Path:
        path = folder / name
        return path if path.exists() else make.write_video(path, pictures=noisy(), **GOOD[name])

    return clip


def indices(path: Path) -> list[int | None]:
    return [None if frame.image is None else make.read_index(frame.image) for frame in read_all(path)]


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


class TestBrokenVideo(SourceContract):
    @pytest.fixture(params=BROKEN)
    def media(self, request: pytest.FixtureRequest, clips: Callable[[str], Path]) -> Path:
        name, damage = BROKEN[request.param]
        whole = clips(name)
        path = whole.with_name(f"{request.param}{whole.suffix}")
        if not path.exists():
            path.write_bytes(whole.read_bytes())
            damage(path)
        return path


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_found_and_the_rest_is_good(name: str, clips: Callable[[str], Path], tmp_path: Path) -> None:
    clip, damage = BROKEN[name]
    path = tmp_path / clip
    path.write_bytes(clips(clip).read_bytes())
    found = indices(damage(path))
    good = [index for index in found if index is not None]
    assert len(good) < len(found)
    assert len(good) >= 10
    assert good == sorted(good)


@pytest.mark.parametrize("inside", [False, True])
def test_a_video_that_is_cut_off_says_so(inside: bool, tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", bframes=0, pictures=noisy())
    with av.open(str(path)) as container:
        packet = next(packet for packet in container.demux(video=0) if packet.dts == packet.duration * 25)
    assert packet.pos is not None
    path.write_bytes(path.read_bytes()[: packet.pos + packet.size // 2 * inside])
    frames = read_all(path)
    assert [frame.image is None for frame in frames] == [False] * 25 + [True] * (1 + inside)
    there = 25 + inside
    assert frames[-1].error == f"cannot be decoded: the file is cut off: of 40 packets in its index {there} are there"
    assert (np.diff(open_source(path).probe().time_s) > 0).all()


def test_samples_without_bytes_do_not_make_a_video_cut_off(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", bframes=0)
    data = bytearray(path.read_bytes())
    sizes = data.index(b"stsz") + 16
    data[sizes + 4 * (FRAMES - 1) : sizes + 4 * FRAMES] = bytes(4)
    path.write_bytes(data)
    assert indices(path) == list(range(FRAMES - 1))


def test_a_damaged_video_that_is_another_by_now_is_to_be_started_again(
    clips: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from depthmill.pipeline.sources.video_decode import Decoder

    path = tmp_path / "clip.mp4"
    path.write_bytes(clips("b_frames.mp4").read_bytes())
    with closing(open_source(make.break_middle(path, 0.6, 3000))) as source:
        assert any(frame.image is None for frame in source.read(0, FRAMES))
        monkeypatch.setattr(Decoder, "decode", lambda *args, **options: iter(()))
        with pytest.raises(SourceChangedError, match=r"changed since .* \(its packets are others\)"):
            list(source.read(0, FRAMES))


@pytest.mark.parametrize(
    ("name", "said"), [("broken mp4", "the decoder rejects it"), ("broken mpg", "the decoder met errors in it")]
)
def test_the_frame_before_one_that_the_decoder_objects_to_is_lost_too(
    name: str, said: str, clips: Callable[[str], Path], tmp_path: Path
) -> None:
    clip, damage = BROKEN[name]
    path = tmp_path / clip
    path.write_bytes(clips(clip).read_bytes())
    errors = [frame.error for frame in read_all(damage(path))]
    assert any("may be damaged" in error and said in error for error in errors)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_lost_frames_do_not_depend_on_threads(threads: int, clips: Callable[[str], Path], tmp_path: Path) -> None:
    from depthmill.pipeline.sources.video import VideoSource

    path = tmp_path / "clip.mp4"
    path.write_bytes(clips("open_gop.mp4").read_bytes())
    make.break_middle(path, 0.6, 3000)
    source = VideoSource(path, MAX_PIXELS, MAX_FRAMES, threads)
    frames = list(source.read(0, source.probe().frames))
    source.close()
    assert [frame.error for frame in frames] == [frame.error for frame in read_all(path)]


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


class FailingDisk(io.BytesIO):
    """A file whose disk does not answer for what lies behind byte `limit`."""

    limit: int | None = None

    def read(self, size: int | None = -1) -> bytes:
        if self.limit is not None and self.tell() + (size or 0) > self.limit:
            raise OSError(errno.EIO, "Input/output error", "on/a/disk.mp4")
        return super().read(size)


@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.ts", "vp9.webm", "no_pts.avi"])
def test_a_disk_that_fails_does_not_shorten_a_video(
    name: str, clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips(name)
    monkeypatch.setattr(video_container, "is_url", lambda uri: True)  # what is read through Python can be made to fail
    for module in (video_container, video_packets):
        monkeypatch.setattr(module, "open_binary", lambda uri: FailingDisk(Path(uri).read_bytes()))
    whole = list((source := open_source(path)).read(0, source.probe().frames))
    for middle in (0, 20):
        again = open_source(path)
        with monkeypatch.context() as patch:
            patch.setattr(FailingDisk, "limit", path.stat().st_size * 2 // 3)
            with pytest.raises(SourceError, match=r"cannot be (read|opened as a video) \(Input/output error\)"):
                again.probe()
        again.probe()
        with monkeypatch.context() as patch:
            patch.setattr(FailingDisk, "limit", path.stat().st_size * 2 // 3)
            with pytest.raises(SourceError, match=r"Input/output error"):
                list(again.read(middle, FRAMES))
        assert content(list(again.read(middle, FRAMES))) == content(whole[middle:])
        again.close()
    source.close()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
def test_too_few_threads_or_too_little_memory_are_no_frames_fault(
    code: int, clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = av.error.err_check  # what libav's own codes are made into

    def convert(*frame: object, **how: object) -> None:
        error(-code)

    with closing(open_source(clips("b_frames.mp4"))) as source, monkeypatch.context() as patch:
        source.probe()
        patch.setattr(video, "to_rgb", convert)
        with pytest.raises(RuntimeError, match=rf"no memory left \({os.strerror(code)}\): raise the limits"):
            list(source.read(0, 3))


def test_broken_video_is_quiet(clips: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clip.ts"
    path.write_bytes(clips("open_gop.ts").read_bytes())
    read_all(make.break_middle(path))
    assert capfd.readouterr().err == ""


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
