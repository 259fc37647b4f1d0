"""Inputs. Adding a kind: one file with a FrameSource, one line in `_KINDS`, one subclass of the contract test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.images import IMAGE_SUFFIXES, ImageSource
from depthmill.pipeline.sources.inputs import expand_inputs
from depthmill.pipeline.sources.naming import source_id
from depthmill.pipeline.sources.prefetch import prefetch
from depthmill.pipeline.sources.video import VideoSource
from depthmill.pipeline.types import FrameSource

__all__ = ["MAX_PIXELS", "expand_inputs", "open_source", "prefetch", "source_id"]

MAX_PIXELS = 1 << 27  # 134 megapixels

# The first kind whose test says yes opens the path; whatever is no other kind is for FFmpeg to recognise.
_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path, int, int], FrameSource]], ...] = (
    (lambda path: path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES, ImageSource),
    (lambda path: True, lambda path, max_pixels, threads: VideoSource(path, threads)),
)


def open_source(uri: str | Path, *, max_pixels: int = MAX_PIXELS, threads: int = 0) -> FrameSource:
    """Open an input: a folder of pictures, a picture, or a video. Nothing is read yet, but the path must exist.

    Args:
        uri: Path of the file or folder.
        max_pixels: Pictures with more come as failed frames.
        threads: Threads that one read decodes with; 0 for one a core (video) or four (pictures).

    Raises:
        SourceError: If there is no such file or folder.
    """
    path = Path(uri)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder; expected a video, a picture or a folder: check the path")
    opens = next(opens for accepts, opens in _KINDS if accepts(path))
    return opens(path, max_pixels, threads)
