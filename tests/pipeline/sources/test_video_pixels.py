"""What the pixels of a video's frames become: turned upright, in full range, by the right matrix, all of one size."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import ExifTags, Image

from depthmill.pipeline.sources import open_source, video_pixels
from depthmill.pipeline.sources.video_pixels import to_rgb
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import read_all


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(degrees: int, tmp_path: Path) -> None:
    path = make.rotate_metadata(make.write_video(tmp_path / "clip.mp4", frames=12), degrees)
    source = open_source(path)
    probed = source.probe()
    frame = next(source.read(9, 10))
    source.close()
    expected = np.rot90(make.paint(9), k=-degrees // 90)
    assert (probed.height, probed.width) == expected.shape[:2]
    np.testing.assert_allclose(frame.image, expected.astype(float), atol=12)


def test_mirrored(tmp_path: Path) -> None:
    path = make.set_display_matrix(make.write_video(tmp_path / "clip.mp4", frames=12), -1, 0, 0, 1)
    np.testing.assert_allclose(read_all(path)[5].image, make.paint(5)[:, ::-1].astype(float), atol=12)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_jpegs_with_exif_in_a_video(orientation: int, turns: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = make.HEIGHT, make.WIDTH, "yuvj420p"
        for index in range(3):
            file = io.BytesIO()
            Image.fromarray(make.paint(index)).save(file, "JPEG", quality=95, exif=exif)
            packet = av.Packet(file.getvalue())
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), True
            packet.pts = packet.dts = index
            output.mux(packet)
    for index, frame in enumerate(read_all(path)):
        np.testing.assert_allclose(frame.image, np.rot90(make.paint(index), turns).astype(float), atol=12)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "tags"),
    [
        ("libx264", "yuv420p", {}),
        ("libx264", "yuv420p", {"color_range": 1}),
        ("libx264", "yuv420p", {"color_range": 2}),
        ("libx264", "yuv420p10le", {}),
        ("libx264", "yuv420p10le", {"color_range": 2}),
        ("libx264", "yuv444p", {}),
        ("libx264", "yuv422p", {}),
        ("libx264", "gray", {"color_range": 2}),
        ("libx264rgb", "rgb24", {}),
        ("mjpeg", "yuvj420p", {}),
        ("ffv1", "gray", {}),
        ("ffv1", "bgr0", {}),
    ],
)
def test_greys_in_every_range(codec: str, pix_fmt: str, tags: dict[str, int], tmp_path: Path) -> None:
    levels = [0, 16, 64, 128, 192, 235, 255]
    pictures = [np.full((make.HEIGHT, make.WIDTH, 3), level, dtype=np.uint8) for level in levels]
    options = {"crf": "1"} if codec.startswith("libx264") else {}
    path = tmp_path / "clip.mkv"
    make.write_video(path, codec=codec, pix_fmt=pix_fmt, tags=tags, pictures=pictures, bframes=0, options=options)
    for frame, level in zip(read_all(path), levels, strict=True):
        assert frame.image is not None
        assert abs(frame.image.astype(int) - level).max() <= 2, (level, frame.image[0, 0])


@pytest.mark.parametrize(("color_range", "black", "white"), [(1, 16, 235), (2, 0, 255)])
@pytest.mark.parametrize("pix_fmt", ["gray", "yuv420p"])
def test_tagged_range_of_a_raw_frame(pix_fmt: str, color_range: int, black: int, white: int) -> None:
    for luma, expected in ((black, 0), (white, 255)):
        frame = av.VideoFrame(64, 48, pix_fmt)
        for number, plane in enumerate(frame.planes):
            plane.update(bytes([luma if number == 0 else 128]) * plane.buffer_size)
        frame.color_range = color_range
        picture = to_rgb(frame, VideoReformatter(), codec="h264", height=48, width=64)
        assert (picture == expected).all()


@pytest.mark.parametrize("pix_fmt", sorted(video_pixels._QUICK_IN_PLANES))
@pytest.mark.parametrize("size", [(48, 64), (46, 62), (50, 61), (47, 64)])
def test_the_quick_way_changes_no_bit(pix_fmt: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    frame = av.VideoFrame.from_ndarray(noise, format="rgb24").reformat(format=pix_fmt)
    for scaled in (height, height + 2):
        quick = to_rgb(frame, VideoReformatter(), codec="h264", height=scaled, width=width)
        with monkeypatch.context() as patch:
            patch.setattr(video_pixels, "_QUICK_IN_PLANES", frozenset())
            slow = to_rgb(frame, VideoReformatter(), codec="h264", height=scaled, width=width)
        assert np.array_equal(quick, slow)


@pytest.mark.parametrize(
    ("tags", "height", "width"),
    [({"colorspace": 1}, 48, 64), ({"colorspace": 6}, 48, 64), ({"colorspace": 9}, 48, 64), ({}, 48, 64)],
)
def test_colours_by_matrix(tags: dict[str, int], height: int, width: int, tmp_path: Path) -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    pictures = [np.full((height, width, 3), colour, dtype=np.uint8) for colour in colours]
    path = make.write_video(tmp_path / "c.mkv", tags=tags, pictures=pictures, bframes=0, options={"crf": "1"})
    for frame, colour in zip(read_all(path), colours, strict=True):
        assert frame.image is not None
        assert abs(frame.image.astype(int) - colour).max() <= 3


def test_a_matrix_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mkv", frames=2, tags={"colorspace": 8})
    for frame in read_all(path):
        assert frame.image is None
        assert frame.error.startswith("yuv420p cannot be converted: its matrix is YCgCo (8); expected BT.601")
    for colorspace in (0, 2, 3, 18):  # unspecified and reserved
        raw = av.VideoFrame.from_ndarray(make.paint(5), format="rgb24").reformat(format="yuv420p")
        raw.colorspace = colorspace
        picture = to_rgb(raw, VideoReformatter(), codec="h264", height=make.HEIGHT, width=make.WIDTH)
        assert make.read_index(picture) == 5


def test_untagged_high_definition_is_bt709(tmp_path: Path) -> None:
    frame = av.VideoFrame(1280, 720, "yuv444p")
    for plane, value in zip(frame.planes, (63, 102, 240), strict=True):  # BT.709's pure red, limited range
        plane.update(bytes([value]) * plane.buffer_size)
    picture = to_rgb(frame, VideoReformatter(), codec="h264", height=720, width=1280)
    assert abs(picture.astype(int) - (255, 0, 0)).max() <= 2


def test_a_change_of_resolution_is_scaled_to_the_first(tmp_path: Path) -> None:
    small = make.write_video(tmp_path / "small.h264", frames=10)
    large = make.write_video(
        tmp_path / "large.h264", pictures=[make.paint(index, 96, 128) for index in range(10, 20)], height=96, width=128
    )
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames = read_all(both)
    assert {frame.image.shape for frame in frames if frame.image is not None} == {(make.HEIGHT, make.WIDTH, 3)}
    assert [make.read_index(frame.image) for frame in frames if frame.image is not None] == list(range(20))


def test_a_picture_that_is_far_too_large_midway_fails_alone(tmp_path: Path) -> None:
    """The decoder refuses it, rather than that it makes one to be scaled down."""
    path = tmp_path / "clip.mjpeg"
    path.write_bytes(
        b"".join(
            make.encode(i, ".jpg", **({"height": 1300} if i == 4 else {}), width=64 if i != 4 else 1000)
            for i in range(6)
        )
    )
    source = open_source(path, max_pixels=48 * 64)
    frames = list(source.read(0, source.probe().frames))
    source.close()
    assert [frame.image is None for frame in frames] == [False] * 4 + [True, False]
