"""Broken inputs of many kinds among good ones, the same for the same seed; and what became of them, at a run's end.

Whatever is painted says its own index (`media.paint`): frame of a video, row of a Parquet file, key of a sample.
"""

from __future__ import annotations

import gzip
import io
import random
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from depthmill.tests import media

MAX_PIXELS = 10_000_000  # that the huge ones are huge by
PICTURES = "pictures"  # the folder that is one source; every other file is one by itself
_FRAMES = 12
_MUXER = {"fflags": "bitexact", "movflags": "+faststart"}  # no random ids
_BOMB_BYTES = 1 << 30


@dataclass(frozen=True)
class Item:
    """A file.

    Attributes:
        name: Path below the root.
        kind: What is wrong with it: the format and the damage. "good" if nothing is.
        listed: Whether a reason must be given for it, or for a frame of it; None where the damage may be invisible.
        exact: Whether what is read of it must be what was painted.
    """

    name: str
    kind: str
    listed: bool | None
    exact: bool = True


def write(root: Path, seed: int = 0) -> list[Item]:
    """Write all files below `root`; returns what they are."""
    items = []
    for name, kind, listed, exact, data in _files(random.Random(seed)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(data):
            data(path)
        else:
            path.write_bytes(data)
        items.append(Item(name, kind, listed, exact))
    return items


def inputs(root: Path) -> list[Path]:
    """The sources below `root`."""
    return [root / PICTURES, *sorted(path for path in root.iterdir() if path.is_file())]


_File = tuple[str, str, bool | None, bool, bytes | Callable[[Path], object]]


def _files(rng: random.Random) -> Iterator[_File]:
    number = 0
    for kind, suffix, listed, exact, data in _pictures(rng):
        yield f"{PICTURES}/{number:03d}{suffix}", kind, listed, exact, data
        number += 1
        if number % 5 == 0:
            yield f"{PICTURES}/{number:03d}.png", "good", False, True, media.encode(number)
            number += 1
    for makes in (_videos, _archives, _tables):
        for count, (kind, suffix, listed, exact, data) in enumerate(makes(rng)):
            yield f"{makes.__name__[1:]}-{count:03d}{suffix}", kind, listed, exact, data


_Made = tuple[str, str, bool | None, bool, bytes | Callable[[Path], object]]


def _cuts(kind: str, suffix: str, whole: bytes, count: int, *, listed: bool | None, exact: bool = True) -> list[_Made]:
    """Truncations at `count` places, the first at 0 bytes, the last at 90 %."""
    sizes = [len(whole) * 9 * cut // (10 * (count - 1)) for cut in range(count)]
    return [(f"{kind}, truncated", suffix, True if size < 8 else listed, exact, whole[:size]) for size in sizes]


def _flips(kind: str, suffix: str, whole: bytes, count: int, rng: random.Random) -> Iterator[_Made]:
    """Runs of 1 to 16 bytes overwritten, one in each of `count` stretches of the file."""
    for flip in range(count):
        data = bytearray(whole)
        at = len(data) * flip // count + rng.randrange(max(1, len(data) // count - 16))
        for place in range(at, min(len(data), at + rng.choice((1, 4, 16)))):
            data[place] ^= rng.randrange(1, 256)
        yield f"{kind}, flipped bytes", suffix, None, False, bytes(data)


def _pictures(rng: random.Random) -> Iterator[_Made]:
    for suffix in (".jpg", ".png", ".webp", ".tif"):
        whole = media.encode(77, suffix, height=96, width=128)
        yield from _cuts(suffix[1:], suffix, whole, 9, listed=True)
        yield from _flips(suffix[1:], suffix, whole, 8, rng)
    for suffix, data in (
        (".png", b"a text"),
        (".jpg", b"<html><body>404</body></html>"),
        (".webp", rng.randbytes(5000)),
        (".tif", _packed(b"packed" * 99)),
        (".bmp", b"%PDF-1.7\n"),
        (".jp2", bytes(4096)),
        (".avif", b"\0\0\0\x1cftypavif" + rng.randbytes(500)),
    ):
        yield "no picture, wrong extension", suffix, True, True, data
    for header in (b"P6 99999999 99999999 255\n", b"P6 0 0 255\n", b"P6 64 -48 255\n"):
        yield "absurd header", ".ppm", True, True, header + bytes(100)
    yield "absurd header", ".png", True, True, _png(2**31 - 1, 1, bytes(10))
    yield "absurd header", ".png", True, True, _png(0, 0, b"")
    yield "absurd header", ".png", True, True, _png(65_536, 100, bytes(10))
    yield (
        "absurd header",
        ".bmp",
        True,
        True,
        _patched(media.encode(1, ".bmp"), 18, struct.pack("<ii", 2**31 - 1, -(2**31))),
    )
    jpeg = media.encode(1, ".jpg")
    sof = jpeg.index(b"\xff\xc0") + 5
    yield "absurd header", ".jpg", True, True, _patched(jpeg, sof, b"\xff\xff\xff\xff")
    yield "absurd header", ".jpg", True, True, _patched(jpeg, sof, b"\x0c\x00\x0c\x00")
    yield "absurd header", ".jpg", True, True, _patched(jpeg, sof, b"\0\0\0\0")
    webp = media.encode(1, ".webp")
    yield "absurd header", ".webp", True, True, _patched(webp, webp.index(b"\x9d\x01\x2a") + 3, b"\xff\x3f\xff\x3f")
    yield "huge dimensions", ".png", True, True, _png(20_000, 20_000, bytes(20_000 * 2501), depth=1)
    yield "huge dimensions", ".jpg", True, True, _grey("JPEG", 4000, 3000)
    yield "huge dimensions", ".tif", True, True, _tiff_flood(60_000, 60_000)
    yield "huge dimensions", ".tif", None, False, _tiff_flood(3_000, 3_000)
    bomb = b"\x78\x01" + _deflated_zeros(_BOMB_BYTES)
    yield "bomb", ".png", None, False, _png(16, 16, None, idat=bomb)
    yield "bomb", ".png", None, False, _png(16, 16, bytes(17 * 16), extra=_chunk(b"iCCP", b"x\0\0" + bomb))
    yield "bomb", ".png", None, False, _png(16, 16, bytes(17 * 16), extra=_chunk(b"zTXt", b"x\0\0" + bomb))


def _videos(rng: random.Random) -> Iterator[_Made]:
    for suffix, codec in ((".mp4", "libx264"), (".mkv", "libx264"), (".avi", "mpeg4")):
        whole = _video(suffix, codec)
        yield "good", suffix, False, True, whole
        yield from _cuts(suffix[1:], suffix, whole, 9, listed=None)
        yield from _flips(suffix[1:], suffix, whole, 7, rng)
        yield "zero frames", suffix, True, True, _video(suffix, codec, frames=0)
    yield "no video, wrong extension", ".mp4", True, True, b"a text, no film"
    yield "no video, wrong extension", ".mkv", True, True, rng.randbytes(20_000)
    yield "no video, wrong extension", ".avi", None, False, media.encode(5, ".jpg")
    yield "no video, wrong extension", ".mov", True, True, bytes(8192)


def _archives(rng: random.Random) -> Iterator[_Made]:
    samples = media.samples(_FRAMES)
    for suffix in (".tar", ".tar.gz"):
        whole = _tar(samples) if suffix == ".tar" else _packed(_tar(samples))
        yield "good", suffix, False, True, whole
        yield from _cuts(suffix[1:], suffix, whole, 11, listed=True)
        yield from _flips(suffix[1:], suffix, whole, 10, rng)
    yield "no archive, wrong extension", ".tar", True, True, media.encode(5)
    yield "no archive, wrong extension", ".tgz", True, True, b"a text"
    yield "no archive, wrong extension", ".tar", True, True, rng.randbytes(5000)
    yield "no pictures", ".tar", True, True, _tar([("a.json", b"{}"), ("b.txt", b"text")])
    yield "no pictures", ".tar.gz", True, True, _packed(_tar([]))
    for name in ("../../etc/90.png", "a/../../91.png", ".." + "/.." * 40 + "/92.png"):
        yield "member with ../", ".tar", True, True, _tar([*samples, (name, media.encode(1))])
    yield "member with an absolute name", ".tar", False, True, _tar([*samples, ("/99.png", media.encode(99))])
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo("90.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        yield "member that is a link or a device", ".tar", True, True, _tar([*samples, (info, b"")])
    sparse = _patched(_tar([("90.png", bytes(512))]), 156, b"S")
    yield "sparse member", ".tar", True, True, _tar(samples)[: -_end(samples)] + _summed(sparse)
    for size in (b"99999999999\0", b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12, b"notanumber!!"):
        header = _summed(_patched(_tar([("90.png", bytes(512))]), 124, size))
        yield "member with an absurd size", ".tar", True, True, _tar(samples)[: -_end(samples)] + header
    for kind in (b"x", b"g", b"L", b"K"):
        header = _summed(_patched(_patched(_tar([("90.png", bytes(512))]), 124, b"77777777777\0"), 156, kind))
        yield "member with an absurd header", ".tar", True, True, _tar(samples)[: -_end(samples)] + header
    chain = _summed(_patched(_tar([("90.png", b"")]), 156, b"L"))[:512]
    yield "member with an absurd header", ".tar", True, True, _tar(samples)[: -_end(samples)] + chain * 5000
    zeros = tarfile.TarInfo("50.json")
    zeros.size = _BOMB_BYTES // 4
    packed = [
        _packed(zeros.tobuf()),
        _gzip_zeros(zeros.size),
        _packed(_tar([("77.png", media.encode(77))])),
    ]
    yield "bomb", ".tar.gz", False, True, b"".join(packed)


def _tables(rng: random.Random) -> Iterator[_Made]:
    pictures = [media.encode(index, (".jpg", ".png")[index % 2]) for index in range(_FRAMES)]

    def table(**columns: object) -> Callable[[Path], object]:
        return lambda path: media.write_parquet(path, columns, rows_in_group=4)

    whole = _written(table(image=[{"bytes": data, "path": None} for data in pictures]))
    yield "good", ".parquet", False, True, whole
    yield from _cuts("parquet", ".parquet", whole, 11, listed=True)
    yield from _flips("parquet", ".parquet", whole, 12, rng)
    yield "no table, wrong extension", ".parquet", True, True, b"a text, no table"
    yield "no table, wrong extension", ".parquet", True, True, b"PAR1" + rng.randbytes(3000) + b"\x40\0\0\0PAR1"
    yield "missing column", ".parquet", True, True, table(label=[1, 2, 3])
    yield "missing column", ".parquet", True, True, table(image=["a.jpg", "b.jpg"])
    yield "missing column", ".parquet", True, True, table(blob=pictures)
    yield "more than one column", ".parquet", True, True, table(image=pictures, jpg=pictures)
    yield "cells without pictures", ".parquet", True, True, table(image=[*pictures, None])
    yield "cells without pictures", ".parquet", True, True, table(image=[*pictures, b""])
    yield "cells without pictures", ".parquet", True, True, table(image=[{"bytes": None, "path": "a.jpg"}])
    yield "cells without pictures", ".parquet", True, True, table(image=[*pictures, pictures[0][:99]])


def _written(writes: Callable[[Path], object]) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        writes(Path(folder, "file"))
        return Path(folder, "file").read_bytes()


def _video(suffix: str, codec: str, frames: int = _FRAMES) -> bytes:
    import av

    def writes(target: Path) -> None:
        path = target.with_suffix(suffix)
        if frames:
            media.write_video(path, frames=frames, codec=codec, gop=5, bframes=0, container=_MUXER)
        else:
            with av.open(str(path), "w", options=_MUXER) as output:
                stream = output.add_stream(codec, rate=25)
                stream.width, stream.height, stream.pix_fmt = media.WIDTH, media.HEIGHT, "yuv420p"
                output.start_encoding()
        path.rename(target)

    return _written(writes)


def _packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _tar(members: list[tuple[str, bytes]] | list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    return _written(lambda path: media.write_tar(path, members))


def _end(members: list[tuple[str, bytes]]) -> int:
    """How many bytes of an archive are behind its last member."""
    return len(_tar(members)) - sum(512 + (len(data) + 511) // 512 * 512 for _, data in members)


def _summed(archive: bytes) -> bytes:
    """An archive whose first header has been changed, with a checksum that fits."""
    blank = _patched(archive, 148, b" " * 8)
    return _patched(archive, 148, b"%06o\0 " % sum(blank[:512]))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(
    width: int, height: int, rows: bytes | None, *, depth: int = 8, idat: bytes = b"", extra: bytes = b""
) -> bytes:
    """A grey PNG with this header, whatever is in its rows (filtered) or in its IDAT chunk (packed)."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    data = _chunk(b"IDAT", idat if rows is None else zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + _chunk(b"IEND", b"")


def _grey(kind: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, kind)
    return file.getvalue()


def _tiff_flood(width: int, height: int) -> bytes:
    """A TIFF with a small strip of zeros that packs to nothing, which it names as each of its strips."""
    strips = (height + 15) // 16
    strip = zlib.compress(bytes(16 * width * 3))
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 2),
        (273, 4, strips, 0), (277, 3, 1, 3), (278, 4, 1, 16), (279, 4, strips, 0),
    ]  # fmt: skip
    behind = 8 + 2 + 12 * len(tags) + 4
    offsets, counts = behind, behind + 4 * strips
    data = counts + 4 * strips
    values = {273: offsets, 279: counts}
    entries = b"".join(struct.pack("<HHII", tag, kind, n, values.get(tag, value)) for tag, kind, n, value in tags)
    return (
        struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
        + struct.pack("<I", data) * strips + struct.pack("<I", len(strip)) * strips + strip
    )  # fmt: skip


def _deflated_zeros(size: int) -> bytes:
    """A raw deflate stream of zeros: one block over and over, since each is packed without looking back."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 22)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * (size >> 22) + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def _gzip_zeros(size: int) -> bytes:
    checksum = 0
    for _ in range(size >> 22):
        checksum = zlib.crc32(bytes(1 << 22), checksum)
    return b"\x1f\x8b\x08" + bytes(5) + b"\0\xff" + _deflated_zeros(size) + struct.pack("<II", checksum, size)


def read_all(root: Path) -> dict[str, object]:
    """Probe and read every source below `root`.

    Returns:
        `peak_growth`: most bytes of memory beyond those before; `outcomes`: for each file, or frame of a file in
        PICTURES, the reasons given, and the index and key of each frame that was read with what is painted on it.
    """
    from depthmill.pipeline.errors import SourceError
    from depthmill.pipeline.sources import open_source

    open_source(root / PICTURES).probe()  # whatever is imported late is no growth
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: dict[str, dict[str, list[object]]] = {}
    for path in inputs(root):
        name = path.relative_to(root).as_posix()
        try:
            source = open_source(path, max_pixels=MAX_PIXELS, threads=2)
            try:
                probed = source.probe()
                keys = probed.keys or [str(index) for index in range(probed.frames)]
                for frame in source.read(0, probed.frames):
                    key = keys[frame.index]
                    outcome = outcomes.setdefault(
                        f"{name}/{key}" if path.is_dir() else name, {"errors": [], "read": []}
                    )
                    if frame.image is None:
                        outcome["errors"].append(frame.error)
                    else:
                        fits = frame.image.shape[0] <= probed.height and frame.image.shape[1] <= probed.width
                        outcome["read"].append([key, media.read_index(frame.image), fits])
            finally:
                source.close()
        except SourceError as error:
            outcomes.setdefault(name, {"errors": [], "read": []})["errors"].append(str(error))
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"peak_growth": growth << 10, "outcomes": outcomes}
