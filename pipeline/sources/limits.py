"""How much one input may hold before it is taken for damaged or hostile."""

from __future__ import annotations

from pathlib import Path

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.types import Source


def check_frames(uri: str | Path, frames: int, max_frames: int) -> None:
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
