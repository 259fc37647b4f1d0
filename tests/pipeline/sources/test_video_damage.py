"""Damaged videos, and what is no damage: which frames are lost, and that the others are good."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.sources import open_source, video, video_container, video_packets
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.clips import FRAMES, indices, noisy
from depthmill.tests.pipeline.sources.contract import SourceContract, content, read_all


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


def without(path: Path, lost: Collection[int], *, retimed: bool) -> Path:
    """A copy that lacks some packets, as a camera's lost on the way; `retimed`, as if there never were any."""
    copy = path.with_name(f"lossy{path.suffix}")
    with av.open(str(path)) as reader, av.open(str(copy), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        kept = [packet for i, packet in enumerate(reader.demux(video=0)) if packet.size and i not in lost]
        for number, packet in enumerate(kept):
            if retimed:
                packet.pts = packet.dts = number * packet.duration
            packet.stream = stream
            writer.mux(packet)
    return copy


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("lost", [[13], [10], [4, 5, 6], [9]])
def test_what_is_decoded_behind_missing_packets_is_lost(lost: list[int], suffix: str, tmp_path: Path) -> None:
    """libav takes older pictures in the place of those missing, and says nothing."""
    options = {"x264-params": "scenecut=0"}
    path = make.write_video(tmp_path / f"clip{suffix}", bframes=0, pictures=noisy(), options=options)
    end = 10 * (lost[0] // 10 + 1)  # the next keyframe
    failed = [None] * (end - lost[-1] - 1)
    assert indices(without(path, lost, retimed=False)) == [*range(lost[0]), *failed, *range(end, FRAMES)]


def test_an_encoder_that_counts_wrongly_loses_nothing(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", bframes=0, pictures=noisy(), options={"x264-params": "scenecut=0"})
    assert None not in indices(without(path, [13], retimed=True))


@pytest.mark.parametrize(("gop", "lost"), [(1, [13]), (10, range(13, 20))])
def test_checksums_of_ffv1_are_heeded(gop: int, lost: Collection[int], tmp_path: Path) -> None:
    """libav shows the slice of an older picture, and says nothing."""
    path = make.write_video(tmp_path / "clip.mkv", codec="ffv1", gop=gop, bframes=0, options={"level": "3"})
    assert indices(path) == list(range(FRAMES))
    with av.open(str(path)) as container:
        packet = next(packet for number, packet in enumerate(container.demux(video=0)) if number == 13)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(packet)) + packet.size // 2] ^= 1
    path.write_bytes(data)
    assert indices(path) == [None if index in lost else index for index in range(FRAMES)]


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


def test_lost_frames_do_not_depend_on_which_thread_is_first(tmp_path: Path) -> None:
    """Of a packet that is cut off the decoder makes a picture, and says so when it has ended it."""
    path = make.truncate(make.write_video(tmp_path / "clip.ts", pictures=noisy()), 0.3)
    errors = set[tuple[str, ...]]()
    for start in 40 * (0, 8, 9, 10):
        with closing(video.VideoSource(path, MAX_PIXELS, MAX_FRAMES, threads=4)) as source:
            errors.add(tuple(frame.error for frame in source.read(start, source.probe().frames))[-2:])
    assert len(errors) == 1
    assert all(errors.pop())


def test_a_decoder_that_objects_to_whole_pictures_is_heeded_once(
    clips: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does to the first of an open group of pictures, which it cannot make after a seek, and need not."""
    judge, judged = video.VideoSource._judge, []
    monkeypatch.setattr(video.VideoSource, "_judge", lambda self, *args: judged.append(args) or judge(self, *args))
    with closing(video.VideoSource(clips("open_gop.mp4"), MAX_PIXELS, MAX_FRAMES, threads=2)) as source:
        for start in range(12, FRAMES - 1, 9):
            frames = [frame.image for frame in source.read(start, start + 2)]
            assert [None if image is None else make.read_index(image) for image in frames] == [start, start + 1]
    assert len(judged) == 1


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
