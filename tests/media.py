"""Makers of good and broken videos and pictures, each frame of which says its own index.

The index is painted as eight large black or white blocks (four columns, two rows; lowest bit at the top left), which
survive any codec: `read_index` finds it again without help from the reader under test.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation
from PIL import Image

Picture = npt.NDArray[np.uint8]

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder writes its settings to stderr

HEIGHT, WIDTH = 48, 64


def paint(index: int, height: int = HEIGHT, width: int = WIDTH) -> Picture:
    """The picture of frame `index` (0 to 255): (height, width, 3) uint8."""
    bits = np.array([(index >> bit) & 1 for bit in range(8)], dtype=bool).reshape(2, 4)
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * 4 // width
    plane = np.where(bits[np.ix_(rows, columns)], 235, 20).astype(np.uint8)
    return np.repeat(plane[..., None], 3, axis=2)


def read_index(picture: Picture) -> int:
    """The index that `paint` painted, read from the middle of each block."""
    height, width = picture.shape[:2]
    index = 0
    for bit in range(8):
        row = (2 * (bit // 4) + 1) * height // 4
        column = (2 * (bit % 4) + 1) * width // 8
        index |= int(picture[row, column].mean() > 127) << bit
    return index


def write_video(
    path: Path,
    *,
    frames: int = 40,
    height: int = HEIGHT,
    width: int = WIDTH,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    gop: int = 10,
    bframes: int = 2,
    options: dict[str, str] | None = None,
    times_ms: Sequence[int] | None = None,
    pictures: Sequence[Picture] | None = None,
    tags: dict[str, int] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Write a clip in the container that the suffix of `path` says; an MP4's index goes to its front.

    Args:
        path: File to write.
        frames: Number of frames, painted with their index.
        height: Rows.
        width: Columns.
        codec: Name of libav's encoder.
        pix_fmt: Pixel format to encode.
        fps: Frames a second, where `times_ms` does not say when each frame is shown.
        gop: Frames from keyframe to keyframe.
        bframes: Most B-frames in a row.
        options: The encoder's own options.
        times_ms: When each frame is shown, in ms: a variable frame rate.
        pictures: RGB pictures to encode instead of the painted ones.
        tags: Attributes to set on the encoder and on its frames: color_range, colorspace …
        container: The muxer's own options.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    painted = pictures if pictures is not None else [paint(index, height, width) for index in range(frames)]
    defaults = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    rate = 1000 if times_ms is not None else fps
    with av.open(str(path), "w", options=container if container is not None else defaults) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=_encoder_options(codec) | (options or {}))
        stream.height, stream.width = painted[0].shape[:2]
        stream.pix_fmt = pix_fmt
        context = stream.codec_context
        context.time_base = Fraction(1, rate)
        context.gop_size = gop
        context.max_b_frames = bframes
        context.thread_count = 1
        for name, value in (tags or {}).items():
            setattr(context, name, value)
        for index, picture in enumerate(painted):
            frame = _encodable(picture, pix_fmt, tags or {})
            frame.pts = times_ms[index] if times_ms is not None else index
            frame.time_base = Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def rotate_metadata(path: Path, degrees: int) -> Path:
    """Make an MP4 or MOV say that its frames are shown turned clockwise by 0, 90, 180 or 270 degrees.

    Written into the bytes of the track header, so that nothing depends on how libav reads or writes it.
    """
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    return set_display_matrix(path, cos, sin, -sin, cos)


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Write the track header's matrix: a picture's (x, y) is shown at (a·x + c·y, b·x + d·y)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    assert data[start] == 0, "a version 1 track header keeps its matrix elsewhere"
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], dtype=">i4")
    data[start + 40 : start + 76] = matrix.tobytes()
    path.write_bytes(data)
    return path


def truncate(path: Path, fraction: float = 0.5) -> Path:
    """Keep only the first `fraction` of a file's bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def break_middle(path: Path, at: float = 0.5, length: int = 400) -> Path:
    """Overwrite `length` bytes in the middle (`at`, a fraction) of a file with noise, always the same."""
    data = bytearray(path.read_bytes())
    start = int(len(data) * at)
    noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    data[start : start + length] = noise[: len(data) - start]
    path.write_bytes(data)
    return path


def write_fields(path: Path, pictures: int = 12, frames: Collection[int] = ()) -> Path:
    """Write interlaced H.264 of 32x32, 25 pictures a second, each field in a packet of its own; greys say which.

    Encoders at hand put both fields into one, so bits are written here (ITU-T H.264, 7.3): raw macroblocks alone.

    Args:
        path: File to write.
        pictures: Number of pictures; picture i has the luma 20 + 10 (i % 20).
        frames: Pictures that are coded as frames, both fields together.
    """

    def ue(number: int) -> str:
        bits = f"{number + 1:b}"
        return "0" * (len(bits) - 1) + bits

    def nal(kind: int, *bits: str, block: bytes = b"") -> bytes:
        parts = [text + "0" * (-len(text) % 8) for text in (*bits[:-1], bits[-1] + "1")]
        return b"\0\0\0\1" + bytes([kind]) + block.join(int(text, 2).to_bytes(len(text) // 8, "big") for text in parts)

    def coded(number: int, bottom: int) -> bytes:
        first = number == bottom == 0
        start = (
            ue(0) + ue(7 if first else 5) + ue(0) + f"{number % 16:04b}" + ("0" if number in frames else f"1{bottom}")
        )
        start += (ue(0) + "00" if first else "000") + ue(0) + ue(1)
        macroblock = ue(25) if first else ue(0) + ue(30)
        more = [macroblock] * (3 if number in frames else 1)
        block = bytes([20 + 10 * (number % 20)]) * 256 + b"\x80" * 128
        return nal(0x25 if first else 0x21, start + macroblock, *more, "", block=block)

    size = ue(2) + ue(1) + "0" + ue(1) + ue(0) + "00100"
    data = nal(0x67, f"{77:08b}{0:08b}{30:08b}" + ue(0) + ue(0) + size)
    data += nal(0x68, ue(0) + ue(0) + "00" + ue(0) * 3 + "000" + ue(0) * 3 + "100")
    times = [2 * number + bottom for number in range(pictures) for bottom in ((0,) if number in frames else (0, 1))]
    data += b"".join(coded(*divmod(time, 2)) for time in times)
    with av.open(io.BytesIO(data), format="h264") as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for time, packet in zip(times, (packet for packet in source.demux(video=0) if packet.size), strict=True):
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.pts = packet.dts = time
            output.mux(packet)
    return path


def write_image(path: Path, index: int = 0, *, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """Write the painted picture `index` in the format that the suffix of `path` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(paint(index, height, width)).save(path)
    return path


def write_image_folder(
    path: Path,
    *,
    count: int = 6,
    sizes: Sequence[tuple[int, int]] = ((HEIGHT, WIDTH),),
    suffixes: Sequence[str] = (".png",),
) -> list[Path]:
    """Write `count` painted pictures, named in order, their (height, width) and suffix taking turns."""
    return [
        write_image(
            path / f"{index:03d}{suffixes[index % len(suffixes)]}",
            index,
            height=sizes[index % len(sizes)][0],
            width=sizes[index % len(sizes)][1],
        )
        for index in range(count)
    ]


def encode(index: int, suffix: str = ".png", *, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """The painted picture `index` as the bytes of a file with this suffix."""
    file = io.BytesIO()
    Image.fromarray(paint(index, height, width)).save(file, Image.registered_extensions()[suffix])
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    """Write an archive of these members, with gzip if the name of `path` says so, the same each time."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    packed = path.suffix in (".gz", ".tgz")
    path.write_bytes(gzip.compress(file.getvalue(), mtime=0) if packed else file.getvalue())
    return path


def samples(count: int, *, suffixes: Sequence[str] = (".jpg", ".png", ".webp")) -> list[tuple[str, bytes]]:
    """The members that img2dataset would write of `count` painted pictures: picture, caption and metadata of each."""
    return [
        member
        for index in range(count)
        for member in (
            (f"{index:05d}{suffixes[index % len(suffixes)]}", encode(index, suffixes[index % len(suffixes)])),
            (f"{index:05d}.json", b'{"width": 64}'),
            (f"{index:05d}.txt", b"a caption"),
        )
    ]


def _encoder_options(codec: str) -> dict[str, str]:
    return {
        "libx264": {"preset": "veryfast", "crf": "12"},
        "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none:pools=none:frame-threads=1"},
        "libvpx": {"deadline": "realtime", "crf": "10", "b": "1000000"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"},
        "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
        "mpeg2video": {"qmin": "2", "qmax": "4"},
        "mpeg4": {"qmin": "2", "qmax": "4"},
        "mjpeg": {"qmin": "2", "qmax": "4"},
    }.get(codec, {})


def _encodable(picture: Picture, pix_fmt: str, tags: dict[str, int]) -> av.VideoFrame:
    """An RGB picture in the encoder's pixel format, in the range and with the matrix that `tags` name."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    full = pix_fmt.startswith("yuvj") or tags.get("color_range") == 2
    matrix = {1: 1, 9: 9}.get(tags.get("colorspace", 0), 5)  # AVCOL_SPC_* -> SWS_CS_*: BT.709, BT.2020, else BT.601
    converted = frame.reformat(
        format=pix_fmt,
        dst_colorspace=matrix,
        dst_color_range=2 if full else 1,
        interpolation=Interpolation.BILINEAR | Interpolation.ACCURATE_RND,
    )
    for name, value in tags.items():
        setattr(converted, name, value)
    return converted


def write_parquet(path: Path, columns: dict[str, Any], *, rows_in_group: int = 10, metadata: Any = None) -> Path:
    """Write columns (values, or a pyarrow array) to a Parquet file; `metadata` is Hugging Face's, as a dict."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    parquet.write_table(table, path, row_group_size=rows_in_group, write_page_checksum=True)
    return path


def noise(*shape: int, seed: int = 0) -> Picture:
    """Pictures of nothing, (B, H, W, 3) or one of them."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
