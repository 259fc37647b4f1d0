"""How much one input may hold before it is taken for damaged or hostile."""

from __future__ import annotations

from pathlib import Path

from depthmill.pipeline.errors import SourceError


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


def max_encoded_bytes(max_pixels: int) -> int:
    """Most bytes of one encoded picture that are read into memory: four a pixel, and room for what is said of it."""
    return 4 * max_pixels + (1 << 20)
