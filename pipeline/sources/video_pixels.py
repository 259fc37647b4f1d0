"""From a decoded video frame to upright 8-bit sRGB.

What the frame's tags say is used. Where they say nothing, the matrix is BT.709 from 1280 columns or 577 rows on and
BT.601 below (what players do), and the range is limited, but full for the formats that are full by definition (RGB,
yuvj) and for grey outside the broadcast codecs. BT.2020 is converted by its matrix; high dynamic range is not tone
mapped. Frames whose matrix swscale lacks are refused.
"""

from __future__ import annotations

import math
from typing import Any

import av
import av.video.frame
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

# Chroma interpolated and rounding exact: ten times the work of swscale's quick way, which repeats chroma; without
# FULL_CHR_H_INT, ACCURATE_RND alone turns white into 253.
_QUALITY = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Of these, in pictures that are not scaled and have an even height, planes of green, blue and red have to the bit the
# values that packed pixels have, and in swscale only planes are made by vector instructions, in half the time.
_QUICK_IN_PLANES = frozenset(
    [
        *("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12"),
        *("yuv420p10le", "yuv422p10le", "p010le"),
    ]
)

# AVColorSpace (ITU-T H.273 MatrixCoefficients), as the frame is tagged -> swscale's matrix.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.SMPTE170M,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
# Those that swscale lacks. What is left is unspecified or reserved.
_UNKNOWN_MATRICES = {
    8: "YCgCo",
    11: "YDzDx",
    12: "chroma-derived",
    13: "chroma-derived, of constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}

_GREY_IS_LIMITED = ("h264", "hevc", "av1", "libdav1d", "vp9", "libvpx-vp9")
_EXPANDED = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)


def display_matrix(frame: av.video.frame.VideoFrame) -> tuple[int, int, int, int]:
    """How the frame is to be shown: (a, b, c, d), each -1, 0 or 1, takes (x, y) to (a·x + c·y, b·x + d·y).

    Turns that are no multiple of 90 degrees are left out: nothing sensible writes them.
    """
    for matrix in _matrices_of(frame):
        a, b, c, d = (int(np.sign(round(value))) for value in matrix)
        if abs(a * d - b * c) == 1 and abs(a) + abs(b) == 1:
            return a, b, c, d
    return 1, 0, 0, 1


def upright_size(frame: av.video.frame.VideoFrame) -> tuple[int, int]:
    """Height and width of the frame as shown."""
    return (frame.height, frame.width) if display_matrix(frame)[0] else (frame.width, frame.height)


def to_rgb(
    frame: av.video.frame.VideoFrame,
    reformatter: VideoReformatter,
    *,
    codec: str,
    height: int,
    width: int,
    threads: int = 1,
) -> npt.NDArray[np.uint8]:
    """Convert a frame to (height, width, 3) uint8 sRGB, upright.

    Args:
        frame: As decoded. Where its size differs from the video's (the resolution changes midway), it is scaled.
        reformatter: Keeps swscale's tables from frame to frame; one for each thread.
        codec: Name of the codec, which says what an untagged grey frame's range is.
        height: Rows of the video, upright.
        width: Columns of the video, upright.
        threads: Threads that swscale may use.

    Raises:
        ValueError: If its matrix is none that swscale knows.
    """
    a, b, c, d = display_matrix(frame)
    turned = a == 0
    size = (height, width) if turned else (width, height)
    in_planes = frame.format.name in _QUICK_IN_PLANES and size == (frame.width, frame.height) and not size[1] % 2
    rgb = reformatter.reformat(
        frame,
        width=size[0],
        height=size[1],
        format="gbrp" if in_planes else "rgb24",
        src_colorspace=_matrix(frame),
        src_color_range=None if frame.format.is_rgb or _is_grey(frame) else _range(frame),
        dst_color_range=ColorRange.JPEG,
        interpolation=_QUALITY,
        threads=threads,
    )
    picture = _interleaved(rgb) if in_planes else rgb.to_ndarray().astype(np.uint8, copy=False)
    if _is_grey(frame) and _grey_is_limited(frame, codec):
        picture = _EXPANDED[picture]  # swscale takes any grey for full range, whatever its tag says
    if turned:
        picture = picture.transpose(1, 0, 2)
    picture = picture[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]
    return np.ascontiguousarray(picture)


def _interleaved(frame: av.video.frame.VideoFrame) -> npt.NDArray[np.uint8]:
    import cv2  # which a finished job does not need

    green, blue, red = (
        np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)[:, : frame.width]
        for plane in frame.planes
    )
    return np.asarray(cv2.merge([red, green, blue]), np.uint8)


def _matrices_of(frame: av.video.frame.VideoFrame) -> list[list[float]]:
    """The frame's display matrices, as (a, b, c, d)."""
    try:
        side_data: Any = frame.side_data
    except ValueError:  # PyAV does not know all kinds (EXIF); then it tells how the frame is turned, not if mirrored
        turn = math.radians(-frame.rotation)
        return [[math.cos(turn), math.sin(turn), -math.sin(turn), math.cos(turn)]]
    kept = [side_data[i] for i in range(len(side_data))]  # iterated, PyAV 19's are their types alone
    found = [np.frombuffer(bytes(data), np.int32) for data in kept if data.type.name == "DISPLAYMATRIX"]
    return [[values[i] / 65536 for i in (0, 1, 3, 4)] for values in found if len(values) == 9]


def _matrix(frame: av.video.frame.VideoFrame) -> Colorspace | None:
    if frame.format.is_rgb:
        return None
    unknown = _UNKNOWN_MATRICES.get(frame.colorspace)
    if unknown and not _is_grey(frame):
        raise ValueError(
            f"its matrix is {unknown} ({frame.colorspace}); expected BT.601, BT.709, BT.2020, FCC or SMPTE 240M: "
            "convert it with ffmpeg -vf zscale=matrix=709"
        )
    return _MATRICES.get(
        frame.colorspace, Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
    )


def _range(frame: av.video.frame.VideoFrame) -> ColorRange:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG


def _is_grey(frame: av.video.frame.VideoFrame) -> bool:
    return frame.format.name.startswith(("gray", "ya"))


def _grey_is_limited(frame: av.video.frame.VideoFrame, codec: str) -> bool:
    untagged = frame.color_range not in (ColorRange.MPEG, ColorRange.JPEG)
    return codec in _GREY_IS_LIMITED if untagged else frame.color_range == ColorRange.MPEG
