"""Encoded pictures: what their headers say, and their decoding.

Every picture comes as upright 8-bit RGB: EXIF orientation applied, transparency laid over white, grey of more bits or
of floats scaled, of an animation or a multi-page file the first picture. Colour profiles are not applied.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401 (a plugin registers its format when it is imported, here by one thread)
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from depthmill.pipeline.errors import MissingError, SourceError, check_memory
from depthmill.pipeline.sources.limits import refusal
from depthmill.pipeline.sources.naming import source_id
from depthmill.pipeline.sources.opening import AWAY_ERRORS, OWN_ERRORS, open_binary, read_whole, unanswered
from depthmill.pipeline.sources.versions import changed, is_another, sample
from depthmill.pipeline.types import Frame, Source, SourceKind

Picture = Path | str | BinaryIO  # a file, a URL, or an open one

# Formats that Pillow decodes itself: no file can make it start another program, as PostScript would.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_DECODE_THREADS = 4
_MAX_BYTES_AHEAD = 192 << 20  # encoded and decoded, not yet taken

_MAX_METADATA_BYTES = 16 << 20  # of a PNG's colour profile or text; those of displays may have several MB

_MAX_CANVAS = 2  # times the pixels that a picture may have; a tall one and a wide one could make it far larger

_OWN_ERRORS = (None, *OWN_ERRORS)  # what Pillow says has no number

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PNG_EXIF = ("exif", "Raw profile type exif")  # its own chunk, or the text that was usual before there was one
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of a TIFF
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how one begins

# Pillow warns of oddities in metadata and of damage; what matters of it comes with the frame, as its error.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)  # of each picture there is one
class Header:
    """What can be told of a picture without decoding it.

    Attributes:
        height: Rows in pixels, upright; 0 where that cannot be told, or the picture will not be decoded.
        width: Columns in pixels, likewise.
        digest: Hash of its size in bytes, and of its first and last bytes.
        error: Why it is not read, by where it lies, or by the others in its source; else "".
    """

    height: int
    width: int
    digest: str
    error: str = ""


NO_HEADER = Header(0, 0, "")


@dataclass(frozen=True)
class Encoded:
    """A frame that is still to be decoded.

    Attributes:
        index: Position in its source.
        picture: The encoded picture, a file or what one would hold; None if there is none.
        size_bytes: What it takes in memory, encoded and decoded, as far as is known.
        error: Why `picture` is None, else "".
        away: Asked where `picture` is not there or may not be read: whether it is its folder that cannot be.
        digest: Of its header when it was probed: with another it is another picture; "" where that is seen to.
    """

    index: int
    picture: Picture | None
    size_bytes: int = 0
    error: str = ""
    away: Callable[[], bool] = lambda: False
    digest: str = ""


def on_one_canvas(headers: Sequence[Header], max_pixels: int) -> list[Header]:
    """The same, without the longest pictures where the canvas, as high and as wide as any, would else be too large."""
    kept, most = list(headers), _MAX_CANVAS * max_pixels
    by_length = sorted(range(len(headers)), key=lambda i: max(headers[i].height, headers[i].width))
    height = width = 0
    for place, i in enumerate(by_length):
        height, width = max(height, headers[i].height), max(width, headers[i].width)
        if height * width > most:
            for far in by_length[place:]:
                one = headers[far]
                error = (
                    f"{one.width}x{one.height} pixels: with the others of its source, each row would take {width}x"
                    f"{height} or more; at most {most} pixels are stored: label it by itself, or raise max_pixels"
                )
                kept[far] = Header(0, 0, one.digest, error)
            break
    return kept


def describe(uri: str, kind: SourceKind, keys: tuple[str, ...], headers: Sequence[Header], fingerprint: str) -> Source:
    """The source of these pictures."""
    return Source(
        id=source_id(uri),
        uri=uri,
        kind=kind,
        frames=len(keys),
        height=max(header.height for header in headers) or 1,
        width=max(header.width for header in headers) or 1,
        fps=None,
        fingerprint=fingerprint,
        keys=keys,
    )


def decode_image(picture: Path | BinaryIO, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode one picture, a file or what one would hold, to (H, W, 3) uint8 RGB, upright.

    Raises:
        SourceError: If it cannot be read, or has more than `max_pixels`, or more than its bytes can hold.
        OSError: If a file cannot be read for a reason that is not its own: on another try it may be.
        MemoryError: If memory does not suffice, which is not the picture's fault either.
    """
    try:
        with _open_image(picture) as image:
            refused = refusal(image.height, image.width, _kind(image), _size_bytes(picture), max_pixels)
            refused = refused or _misread(image)
            if refused:
                raise SourceError(refused)
            turn = _TURNS.get(_orientation(image))
            _scale_transparency(image)
            image.load()
            rgb = _to_rgb(image)
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except SourceError:
        raise
    except UnidentifiedImageError as error:
        size = _size_bytes(picture)
        what = "an empty file (0 bytes)" if size == 0 else f"{size} bytes that are no picture"
        if _head(picture) in _TIFF:
            what = "a TIFF that is damaged, or whose pixels are of a kind that is not read (as RGB in floats)"
        raise SourceError(f"{what}; expected one of {', '.join(_FORMATS)}: replace it or leave it out") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over: SyntaxError, struct.error …
        check_memory(error)
        if isinstance(error, OSError) and error.errno not in _OWN_ERRORS:
            raise
        raise SourceError(f"cannot be decoded ({error or type(error).__name__}): replace it or leave it out") from error


def read_header(picture: Picture, max_pixels: int) -> Header:
    """Tell a picture's size from its first bytes, 0 x 0 where `decode_image` would refuse it or they say nothing.

    Raises:
        SourceError: If a file or URL cannot be read for a reason that is not its own: on another try it may be.
        OSError: Likewise, of an open file.
    """
    digest = hashlib.sha256()
    height = width = 0
    try:
        with open_binary(picture, glimpse=True) if isinstance(picture, (str, Path)) else nullcontext(picture) as file:
            size, head = sample(file, digest)
            kind, shape = _webp_header(head, size) or _kind_and_shape(file)
        if not refusal(*shape, kind, size, max_pixels):
            height, width = shape
    except MissingError:
        pass
    except SourceError:
        raise
    except Exception as error:  # whatever is wrong with it is said when it is read
        if isinstance(error, OSError) and not isinstance(picture, (str, Path)) and error.errno is not None:
            raise  # it is not the picture that is wrong, but the file that it lies in
        if isinstance(error, OSError) and error.errno not in _OWN_ERRORS:
            raise unanswered(picture, error) from error
    return Header(height, width, digest.hexdigest())


def decode_ahead(
    pictures: Generator[Encoded, None, None], max_pixels: int, threads: int
) -> Generator[Frame, None, None]:
    """Decode in a few threads, ahead by two pictures a thread, or by fewer large ones.

    Args:
        pictures: Made in the caller's thread as there is room for them; closed at the end.
        max_pixels: Pictures with more come as failed frames.
        threads: How many; 0 for four.

    Raises:
        SourceError: If a picture cannot be read for a reason that is not its own: on another try it may be.
        SourceChangedError: If one is another than when it was probed.
    """
    threads = threads or _DECODE_THREADS
    running: deque[tuple[Future[Frame], int]] = deque()
    ahead = 0
    pool = ThreadPoolExecutor(threads, "depthmill-decode")
    try:
        with closing(pictures):
            while True:
                while len(running) < 2 * threads and (not running or ahead < _MAX_BYTES_AHEAD):
                    new = next(pictures, None)
                    if new is None:
                        break
                    running.append((pool.submit(_read_frame, new, max_pixels), new.size_bytes))
                    ahead += new.size_bytes
                if not running:
                    return
                future, size_bytes = running.popleft()
                ahead -= size_bytes
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _size_bytes(picture: Path | BinaryIO) -> int:
    return picture.stat().st_size if isinstance(picture, Path) else picture.seek(0, os.SEEK_END)


def _head(picture: Path | BinaryIO) -> bytes:
    with picture.open("rb") if isinstance(picture, Path) else nullcontext(picture) as file:
        file.seek(0)
        return file.read(4)


def _kind_and_shape(file: BinaryIO) -> tuple[str | None, tuple[int, int]]:
    """Kind (see `limits`), height and width of a picture, upright, by its header."""
    file.seek(0)
    with _open_image(file) as image:
        upright = _orientation(image) < 5
        return _kind(image), (image.height, image.width) if upright else (image.width, image.height)


def _kind(image: Image.Image) -> str | None:
    return f"TIFF {image.info.get('compression')}" if image.format == "TIFF" else image.format


def _misread(image: Image.Image) -> str:
    """Why a picture is not left to Pillow, which takes bare planes of 16 bits for planes of 8; "" if it is."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if _kind(image) != "TIFF raw" or tags.get(_PLANES) != 2 or tags.get(_BITS_PER_SAMPLE, (8,))[0] != 16:
        return ""
    return "a TIFF of 16 bits whose colours lie in planes, uncompressed, which is not read: compress it, or join them"


def _webp_header(head: bytes, size_bytes: int) -> tuple[str | None, tuple[int, int]] | None:
    """The same of a WebP picture without EXIF and XMP (RFC 9649), for which Pillow would read all of it.

    Of one that is cut off, or all header, nothing is decoded: 0 x 0. Lossy ones alone have a kind: of a lossless one
    that is blank, a larger one takes no more bytes.
    """
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    if size_bytes < 8 + int.from_bytes(head[4:8], "little") or (head[12:16] == b"VP8X" and size_bytes == 30):
        return None, (0, 0)
    kind = "VP8" if b"VP8 " in (head[12:16], head[30:34]) else None
    if head[12:16] == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        return kind, (int.from_bytes(head[28:30], "little") & 0x3FFF, int.from_bytes(head[26:28], "little") & 0x3FFF)
    if head[12:16] == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return kind, ((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if head[12:16] == b"VP8X" and not head[20] & 0x0C:  # either may turn it
        return kind, (int.from_bytes(head[27:30], "little") + 1, int.from_bytes(head[24:27], "little") + 1)
    return None


class _WithOurLimits:
    """Pillow's own limits are below ours: they are others while any thread opens a picture here, then back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: tuple[int | None, int] = None, 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, _MAX_METADATA_BYTES
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = self._limits


_with_our_limits = _WithOurLimits()


def _open_image(picture: Path | BinaryIO) -> Image.Image:
    """Read a picture's header."""
    with _with_our_limits:
        return Image.open(picture, formats=_FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the header alone."""
    if image.format == "TIFF" or (image.format == "PNG" and image.info.keys().isdisjoint(_PNG_EXIF)):
        return 1  # Pillow turns TIFFs itself
    try:
        value = Image.Image.getexif(image).get(0x0112, 1)  # a PNG's own would decode the picture to look behind it
    except Exception:  # EXIF is written by anything: a broken one is none
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _scale_transparency(image: Image.Image) -> None:
    """Give the transparent value of a PNG the 8 bits that Pillow gives pixels of 2, 4 or, in colour, 16 bits alone."""
    stored = [tile[3] for tile in getattr(image, "tile", []) if "transparency" in image.info]
    if stored in (["L;2"], ["L;4"]):
        image.info["transparency"] *= 85 if stored == ["L;2"] else 17
    elif stored == ["RGB;16B"]:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        grey = _to_8_bit(image)
        if "transparency" in image.info:  # of a PNG: the one value that is
            grey[np.asarray(image) == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no shorter way
        paper = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(paper, colours).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale (H, W) integers or floats to 8 bits.

    White of floats is the least of the usual ones of which none is more than twice: a few are brighter than white. That
    of integers is the greatest that their bits can say, but of 32 bits at most the brightest.

    Raises:
        SourceError: If none of the floats is finite.
    """
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, unsigned = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 1
    if values.dtype == np.int32 and unsigned and bits == 32:
        values = values.view(np.uint32)
    if values.dtype.kind == "f" and not np.isfinite(values).any():
        raise SourceError("no pixel of it is a finite number; expected grey in floats: replace it or leave it out")
    numbers = np.nan_to_num(values.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    top = float(numbers.max())
    if values.dtype.kind == "f":
        white = next((white for white in (1.0, 255.0, 65535.0) if top <= 2 * white), top)
    else:
        white = float(2 ** (bits if unsigned else bits - 1) - 1) if bits <= 16 else max(65535.0, top)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        np.subtract(white, numbers, out=numbers)
    np.clip(numbers, 0, white, out=numbers)
    numbers *= 255.0 / white
    return np.rint(numbers, out=numbers).astype(np.uint8)


def _read_frame(encoded: Encoded, max_pixels: int) -> Frame:
    picture = encoded.picture
    if picture is None:
        return Frame(encoded.index, None, encoded.error)
    try:
        if isinstance(picture, str):
            picture = BytesIO(read_whole(picture))
    except MissingError as error:  # with other errors, it is not the picture that is wrong
        if encoded.away():
            raise unanswered(picture, OSError("no such object")) from error
        return Frame(encoded.index, None, str(error))
    try:
        frame = Frame(encoded.index, decode_image(picture, max_pixels))
    except SourceError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in AWAY_ERRORS and encoded.away():
            raise unanswered(picture, cause) from error
        # Once it is mended, its source has another fingerprint, and is no longer the one that was labelled.
        frame = Frame(encoded.index, None, f"{error}, and label its input anew")
    except OSError as error:
        raise unanswered(picture, error) from error
    if encoded.digest and is_another(picture, encoded.digest):  # last: it may have been written over meanwhile
        raise changed(str(encoded.picture))
    return frame
