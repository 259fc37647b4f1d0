"""Folders of pictures, and single pictures: each file is a frame, its path in the folder is its key.

Every picture comes as upright 8-bit RGB: EXIF orientation applied, transparency laid over white, 16-bit and float
values scaled (not clipped), of an animation or a multi-page file the first picture. Colour profiles are not applied.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.naming import absolute, source_id
from depthmill.pipeline.types import Frame, Source

IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)

# Formats that Pillow decodes itself: no file can make it start another program, as PostScript would.
_FORMATS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

_SAMPLE_BYTES = 4096  # of the beginning and end of each file, for the fingerprint
_HEADER_THREADS = 8  # waiting for the disk more than computing
_DECODE_THREADS = 4
_MAX_PIXELS_AHEAD = 1 << 26  # decoded and not yet taken: 192 MiB

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of oddities in metadata and of damage; what matters of it comes with the frame, as its error.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class _Header:
    """What can be told of a picture without decoding it; 0 x 0 where not even that."""

    height: int
    width: int
    digest: str


class ImageSource:
    """A folder of pictures (with its subfolders, in the order of the paths, hidden files left out), or one picture."""

    def __init__(self, path: Path, max_pixels: int, threads: int = 0) -> None:
        """Name a folder or a picture, without opening it.

        Args:
            path: The folder or the file.
            max_pixels: Pictures with more are not decoded, and come as failed frames.
            threads: Threads that one read decodes with; 0 for four.
        """
        self._path = absolute(path)
        self._threads = threads or _DECODE_THREADS
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._probed: tuple[Source, list[Path], list[_Header]] | None = None

    def probe(self) -> Source:
        """Describe the pictures from their headers.

        Raises:
            SourceError: If there is no file with a picture's suffix.
        """
        return self._open()[0]

    def read(self, start: int, stop: int) -> Iterator[Frame]:
        """Yield the pictures [start, stop); one that cannot be read comes with its reason instead.

        Raises:
            SourceError: If there is no file with a picture's suffix.
        """
        source, files, headers = self._open()
        if not 0 <= start <= stop <= source.frames:
            raise ValueError(f"{source.uri}: frames [{start}, {stop}) asked for; it has [0, {source.frames})")
        pixels = [header.height * header.width for header in headers]
        return _read_ahead(files, pixels, range(start, stop), self._max_pixels, self._threads)

    def close(self) -> None:
        """Nothing is held: each read has its own threads."""

    def _open(self) -> tuple[Source, list[Path], list[_Header]]:
        with self._lock:
            if self._probed is None:
                self._probed = _probe(self._path)
            return self._probed


def decode_image(path: Path, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Decode one picture to (H, W, 3) uint8 RGB, upright.

    Raises:
        SourceError: If it cannot be read, or has more than `max_pixels`.
    """
    try:
        with _open_image(path) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise SourceError(
                    f"{image.width}x{image.height} is {pixels} pixels; at most {max_pixels} are read: scale it down"
                )
            turn = _TURNS.get(_orientation(image))
            image.load()
            rgb = _to_rgb(image)
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except SourceError:
        raise
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        what = "an empty file (0 bytes)" if size == 0 else f"{size} bytes that are no picture"
        raise SourceError(f"{what}; expected one of {', '.join(_FORMATS)}: replace it or leave it out") from error
    except Exception as error:  # Pillow's decoders raise whatever they stumble over: SyntaxError, struct.error …
        raise SourceError(f"cannot be decoded ({error or type(error).__name__}): replace it or leave it out") from error


def _probe(path: Path) -> tuple[Source, list[Path], list[_Header]]:
    root = path if path.is_dir() else path.parent
    files = _list_files(path)
    with ThreadPoolExecutor(_HEADER_THREADS, "depthmill-headers") as pool:
        headers = list(pool.map(_read_header, files))
    keys = tuple(_key(file.relative_to(root)) for file in files)
    digest = hashlib.sha256()
    for key, header in zip(keys, headers, strict=True):
        digest.update(f"{key}\0{header.digest}\0".encode())
    source = Source(
        id=source_id(path),
        uri=str(path),
        kind="images",
        frames=len(files),
        height=max(1, *(header.height for header in headers)),
        width=max(1, *(header.width for header in headers)),
        fps=None,
        fingerprint=digest.hexdigest(),
        keys=keys,
    )
    return source, files, headers


def _list_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder; expected a folder of pictures or a picture: check the path")
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if not files:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise SourceError(
            f"{path}: no pictures in this folder or below it; expected files ending in {suffixes}: check the path"
        )
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _key(path: Path) -> str:
    """A relative path with forward slashes; bytes of its name that are no UTF-8 are escaped."""
    return path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _read_header(path: Path) -> _Header:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(0, size - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
        with _open_image(path) as image:
            turned = _orientation(image) >= 5
            height, width = (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # whatever is wrong with it is said when it is read
        height = width = 0
    return _Header(height, width, digest.hexdigest())


class _WithoutPillowLimit:
    """Pillow's own limit warns, and below ours: it is off while any thread opens a picture here, then back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                Image.init()  # its formats are registered on first use: once, and not by two threads
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


_without_pillow_limit = _WithoutPillowLimit()


def _open_image(path: Path) -> Image.Image:
    """Read a picture's header."""
    with _without_pillow_limit:
        return Image.open(path, formats=_FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the header alone."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFFs itself
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # looking further would decode the picture
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF is written by anything: a broken one is none
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        paper = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(paper, colours).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale (H, W) integers or floats to 8 bits: their white is the least of the usual ones that none exceeds."""
    numbers = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (65535.0,)
    top = float(numbers.max())
    white = next((white for white in whites if top <= white), top)
    return np.rint(np.clip(numbers, 0, white) * (255.0 / white)).astype(np.uint8)


def _read_frame(index: int, path: Path, max_pixels: int) -> Frame:
    try:
        return Frame(index, decode_image(path, max_pixels))
    except (SourceError, OSError) as error:
        return Frame(index, None, str(error))


def _read_ahead(files: list[Path], pixels: list[int], indices: range, max_pixels: int, threads: int) -> Iterator[Frame]:
    """Decode in a few threads, ahead by as many pictures, or by fewer large ones."""
    running: deque[tuple[Future[Frame], int]] = deque()
    ahead = 0
    pool = ThreadPoolExecutor(threads, "depthmill-decode")
    try:
        following = iter(indices)
        for index in indices:
            while len(running) < 2 * threads and (not running or ahead < _MAX_PIXELS_AHEAD):
                new = next(following, None)
                if new is None:
                    break
                running.append((pool.submit(_read_frame, new, files[new], max_pixels), pixels[new]))
                ahead += pixels[new]
            future, size = running.popleft()
            ahead -= size
            frame = future.result()
            assert frame.index == index
            yield frame
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
