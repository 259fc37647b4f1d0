"""How much one input may hold before it is taken for damaged or hostile."""

from __future__ import annotations

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.types import Source

_MAX_SIDE = 65_535  # what JPEG can say; the store's rows are as high as the highest picture and as wide as the widest

# A header that promises more than its file can hold is damaged, and must not size a store. Deflate packs at most 1032
# bytes into one, of eight 1-bit pixels each, LZW 2560, PackBits 64; JPEG spends at least one bit on a block of 8 x 8,
# lossy WebP three on one of 16 x 16; a run in a BMP, of 255 pixels at most, takes two bytes, and one of 4096 in a GIF
# more than one. Of the others, blank pictures that Pillow wrote had up to 104,000 (AVIF), 124,000 (Zstandard) and
# 196,000 (fax, whose blank lines take a bit). In JPEG 2000, 226 bytes are a grey of any size: up to 88 megapixels.
_MAX_PIXELS_PER_BYTE = {
    "PNG": 8 * 1032,
    "JPEG": 8 * 64,
    "BMP": 128,
    "PPM": 8,
    "GIF": 4096,
    "VP8": 1024,
    "AVIF": 1 << 18,
    "JPEG2000": 3 << 17,
    "TIFF raw": 8,
    "TIFF packbits": 8 * 64,
    "TIFF jpeg": 8 * 64,
    "TIFF tiff_lzw": 8 * 2560,
    "TIFF tiff_deflate": 8 * 1032,
    "TIFF tiff_adobe_deflate": 8 * 1032,
    "TIFF": 1 << 18,  # compressed in other ways
}


def check_frames(uri: str, frames: int, max_frames: int) -> None:
    """Refuse a source with too many frames.

    Raises:
        SourceError: If it has more than `max_frames`.
    """
    if frames > max_frames:
        raise SourceError(
            f"{uri}: more than {max_frames} frames; expected at most that many in one source: split it, or raise "
            "max_frames"
        )


def check_range(source: Source, start: int, stop: int) -> None:
    """Refuse to read what is no half-open run of a source's frames.

    Raises:
        ValueError: If [start, stop) is none.
    """
    if not 0 <= start <= stop <= source.frames:
        raise ValueError(f"{source.uri}: frames [{start}, {stop}) asked for; it has [0, {source.frames})")


def too_large(size_bytes: int, max_pixels: int) -> str:
    """Why an encoded picture is not read into memory; "" if it is.

    At most four bytes a pixel are, and room for what is said of it.
    """
    most = 4 * max_pixels + (1 << 20)
    return f"{size_bytes} bytes; at most {most} are read of a picture: scale it down" if size_bytes > most else ""


def refusal(height: int, width: int, kind: str | None, size_bytes: int, max_pixels: int) -> str:
    """Why a picture is not decoded, going by its header; "" if it is.

    Args:
        height: Rows in pixels.
        width: Columns in pixels.
        kind: Pillow's name of its format, with a TIFF's compression behind it; `VP8` of a lossy WebP picture.
        size_bytes: Of the file.
        max_pixels: What it may have.
    """
    pixels = height * width
    if pixels > max_pixels:
        return f"{width}x{height} is {pixels} pixels; at most {max_pixels} are read: scale it down"
    if max(height, width) > _MAX_SIDE:
        return f"{width}x{height} pixels; at most {_MAX_SIDE} a side are read: cut it into pieces"
    densest = _MAX_PIXELS_PER_BYTE.get(kind or "") or _MAX_PIXELS_PER_BYTE.get((kind or "").partition(" ")[0])
    if densest and pixels > size_bytes * densest:
        return f"its header promises {width}x{height} pixels, which {size_bytes} bytes cannot hold: replace it"
    return ""
