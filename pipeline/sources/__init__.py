"""Inputs. Adding a kind: one file with a FrameSource, one line in `_KINDS`, one subclass of the contract test."""

from __future__ import annotations

from collections.abc import Callable
from glob import has_magic
from importlib import import_module
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.objects import is_bucket, is_url, path_of, shown, without_secrets
from depthmill.pipeline.sources.inputs import Refused, expand_inputs
from depthmill.pipeline.sources.naming import source_id
from depthmill.pipeline.sources.opening import is_prefix, kind_of, unseen
from depthmill.pipeline.sources.prefetch import Prefetch, prefetch
from depthmill.pipeline.sources.suffixes import (
    IMAGE_SUFFIXES,
    PARQUET_SUFFIXES,
    SUFFIXES,
    TAR_SUFFIXES,
    UNREAD_TAR_SUFFIXES,
)
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS, FrameSource

__all__ = ["Prefetch", "expand_inputs", "open_source", "prefetch", "shown", "source_id"]


def _unread_tar(uri: str, *_: int) -> NoReturn:
    raise SourceError(
        f"{shown(uri)}: a tar archive that gzip has not packed, but something else; expected .tar or .tar.gz: repack it"
    )


def _reader(module: str, name: str) -> Callable[[str, int, int, int], FrameSource]:
    """What opens a kind of input: its libraries are loaded when there is one, since some take long."""

    def opened(uri: str, max_pixels: int, max_frames: int, threads: int) -> FrameSource:
        source: FrameSource = getattr(import_module(f"{__name__}.{module}"), name)(uri, max_pixels, max_frames, threads)
        return source

    return opened


_IMAGES = _reader("images", "ImageSource")
# How pictures begin: PNG, JPEG, TIFF, JPEG 2000; WebP and AVIF name themselves further on.
_HEADS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_NAMED = (b"WEBP", b"avif")
# The first kind whose test says yes opens the input; whatever is no other kind is for FFmpeg to recognise.
_KINDS: tuple[tuple[Callable[[str], bool], Callable[[str, int, int, int], FrameSource]], ...] = (
    (lambda uri: _suffix(uri) in IMAGE_SUFFIXES or _is_folder(uri) or _is_bare_picture(uri), _IMAGES),
    (lambda uri: _name(uri).endswith(TAR_SUFFIXES), _reader("webdataset", "WebDatasetSource")),
    (lambda uri: _name(uri).endswith(UNREAD_TAR_SUFFIXES), _unread_tar),
    (lambda uri: _suffix(uri) in PARQUET_SUFFIXES, _reader("parquet", "ParquetSource")),
    (lambda uri: True, _reader("video", "VideoSource")),
)


def open_source(
    uri: str | Path, *, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES, threads: int = 0
) -> FrameSource:
    """Open an input. Nothing is read yet, but a path must exist; a URL with an unknown suffix is looked up.

    Args:
        uri: Path or URL (`s3://`, `gs://`, `https://`) of a folder of pictures, a picture, a WebDataset tar, a Parquet
            file, or a video. A URL whose name has no suffix, or ends in a slash, is a folder's.
        max_pixels: Pictures with more come as failed frames; a video with more is refused when it is probed.
        max_frames: An input with more is refused when it is probed.
        threads: Threads that one read decodes with; 0 for one a core (video) or four (pictures).

    Raises:
        SourceError: If there is no such file or folder, it is a tar archive packed in a way that is not read, or a URL
            has a password in it or cannot be looked up.
    """
    plain = checked(uri)
    is_folder = is_bucket(plain) and str(uri).endswith("/")
    opens = _IMAGES if is_folder else next(opens for accepts, opens in _KINDS if accepts(plain))
    return opens(plain, max_pixels, max_frames, threads)


def checked(uri: str | Path) -> str:
    """What an input is opened by, without what is secret in it; no library that reads it is loaded.

    Raises:
        SourceError: If nothing is there, as far as that can be seen at once, or it is a URL that is not opened.
    """
    if isinstance(uri, Refused):
        raise SourceError(uri.why)
    uri = str(uri)
    if is_url(uri):
        if "@" in urlsplit(uri).netloc:
            raise SourceError(
                f"{shown(uri)} was given with credentials; expected them in the environment: leave them out"
            )
        uri = without_secrets(uri)
    elif kind_of(uri) not in ("file", "folder"):
        if why := unseen(uri):
            raise SourceError(
                f"{uri}: cannot be looked at ({why}); expected a video, a picture or a folder that can be read: let it "
                "be, or leave it out"
            )
        what = "nothing that it matches" if has_magic(uri) else "no such file or folder"
        what = "a pipe or a device" if kind_of(uri) else what
        raise SourceError(f"{uri}: {what}; expected a video, a picture or a folder: check the path")
    return uri


def _name(uri: str) -> str:
    return (path_of(uri) if is_url(uri) else uri).rpartition("/")[2].lower()


def _suffix(uri: str) -> str:
    return Path(_name(uri)).suffix


def _is_folder(uri: str) -> bool:
    if not is_url(uri):
        return kind_of(uri) == "folder"
    if _name(uri).endswith(SUFFIXES):
        return False
    return not _suffix(uri) or (is_bucket(uri) and is_prefix(uri))


def _is_bare_picture(uri: str) -> bool:
    """Whether a file without a suffix begins as a picture; FFmpeg would read it, too, without its alpha."""
    if is_url(uri) or _suffix(uri):
        return False
    try:
        with Path(uri).open("rb") as file:
            head = file.read(12)
    except OSError:  # reading it says why
        return False
    return head.startswith(_HEADS) or head[8:] in _NAMED
