"""What counts as a video, and which of its streams; how much one may hold."""

from __future__ import annotations

import errno
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import open_source, video_container
from depthmill.pipeline.sources.video_decode import Decoder
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import read_all


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_the_system_says_of_a_disk_is_no_damage(code: int) -> None:
    container = SimpleNamespace(name="clip.mp4", demux=lambda stream: av.error.err_check(-code, "clip.mp4"))
    with pytest.raises(SourceError, match=r"clip\.mp4: cannot be read.*same command again"):
        list(video_container.demux(container, None))  # type: ignore[arg-type]


def test_cover_pictures_are_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mkv"
    cover = make.write_image(tmp_path / "cover.png").read_bytes()
    with av.open(str(path), "w") as output:
        sound = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        output.add_attachment("cover.png", "image/png", cover)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    with pytest.raises(SourceError, match="no video stream"):
        open_source(path).probe()


@pytest.mark.parametrize("of_two", [0, 1])
def test_of_two_video_streams_the_default_one_counts(of_two: int, tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("mpeg4", rate=25) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = make.HEIGHT, make.WIDTH, "yuv420p"
        streams[of_two].disposition = av.stream.Disposition.default
        for index in range(4):
            for number, stream in enumerate(streams):
                frame = av.VideoFrame.from_ndarray(make.paint(10 * number + index), format="rgb24")
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode())
    assert [make.read_index(frame.image) for frame in read_all(path)] == [10 * of_two + index for index in range(4)]


def test_text_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for lines in (2, 400):
        path.write_text("clip-1.mp4\nclip-2.mp4\n" * lines)
        with pytest.raises(SourceError, match=r"list\.txt: .*expected.*give a list of inputs as @list\.txt"):
            open_source(path).probe()
    (tmp_path / "art").write_bytes(b"XBIN\x1a" + bytes([80, 0, 25, 0, 16, 0]) + b"A\x07" * 2000)
    with pytest.raises(SourceError, match="text or other bytes"):
        open_source(tmp_path / "art").probe()
    make.write_video(tmp_path / "other.mp4", frames=3)
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(SourceError, match=r"clip\.mp4: a list of other files"):
        open_source(tmp_path / "clip.mp4").probe()


@pytest.mark.parametrize(
    ("brands", "refused"),
    [((b"heic", b"mif1heic"), True), ((b"mif1", b"mif1heix"), True), ((b"mif1", b"mif1avif"), False)],
)
def test_heif_pictures_are_no_videos(brands: tuple[bytes, bytes], refused: bool, tmp_path: Path) -> None:
    avif = make.encode(3, ".avif")  # the boxes of both are the same
    assert avif[4:28] == b"ftypavif\0\0\0\0avifmif1miaf"
    path = tmp_path / "photo"
    path.write_bytes(avif[:8] + brands[0] + bytes(4) + brands[1] + avif[24:])
    if refused:
        with pytest.raises(SourceError, match=r"photo: a HEIF picture.*convert it to JPEG, PNG or AVIF"):
            open_source(path).probe()
    else:
        assert open_source(path).probe().frames == 1


def test_no_video_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, empty, cut = tmp_path / "text.mp4", tmp_path / "empty.mp4", tmp_path / "cut.mp4"
    text.write_text("this is no video\n" * 100)
    empty.write_bytes(b"")
    make.truncate(make.write_video(cut, container={}))  # its index was at the end
    for path in (text, empty, cut):
        with pytest.raises(SourceError, match=f"{path.name}.*expected"):
            open_source(path).probe()
    with pytest.raises(SourceError, match="no such file"):
        open_source(tmp_path / "missing.mp4")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])  # with an index that counts the packets, and without
def test_too_many_frames(suffix: str, tmp_path: Path) -> None:
    path = make.write_video(tmp_path / f"clip{suffix}", frames=9)
    assert open_source(path, max_frames=9).probe().frames == 9
    with pytest.raises(SourceError, match=r"more than 8 frames.*max_frames"):
        open_source(path, max_frames=8).probe()


@pytest.mark.parametrize("sized", [True, False], ids=["by its header", "by its first picture"])
def test_too_many_pixels(sized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.write_video(tmp_path / "clip.mp4", frames=3)
    if not sized:
        monkeypatch.setattr(Decoder, "describe", lambda self: (0, 0, "h264", 25.0))
    assert open_source(path, max_pixels=48 * 64).probe().frames == 3
    with pytest.raises(SourceError, match=r"64x48 is 3072 pixels a frame; at most 3071 are read.*max_pixels"):
        open_source(path, max_pixels=48 * 64 - 1).probe()


@pytest.mark.parametrize("max_pixels", [2**31, 10**12])
def test_as_many_pixels_as_one_likes(max_pixels: int, tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", frames=3)
    with closing(open_source(path, max_pixels=max_pixels)) as source:
        assert [make.read_index(frame.image) for frame in source.read(0, 3)] == [0, 1, 2]
