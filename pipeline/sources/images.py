"""Folders of pictures, and single pictures: each file is a frame, its path in the folder is its key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.file_state import holds_files
from depthmill.pipeline.objects import is_url, path_of
from depthmill.pipeline.sources.base import BaseSource
from depthmill.pipeline.sources.limits import check_frames, check_range
from depthmill.pipeline.sources.naming import natural_key, readable, unique_names
from depthmill.pipeline.sources.opening import file_size, files_below, kind_of, list_files, unanswered
from depthmill.pipeline.sources.pictures import (
    Encoded,
    Header,
    Picture,
    decode_ahead,
    describe,
    on_one_canvas,
    read_header,
)
from depthmill.pipeline.sources.suffixes import IMAGE_SUFFIXES, is_picture
from depthmill.pipeline.types import Frame, Source

_HEADER_THREADS = 8  # waiting for the disk more than computing
_HEADERS_AT_ONCE = 1024  # asked for: what is asked for takes more memory than the answer
_OTHERS = 8  # that are looked at where a picture is gone


class ImageSource(BaseSource[tuple[Source, list[Picture], list[Header]], Any]):
    """A folder of pictures, or one picture.

    A folder's subfolders belong to it, but for hidden and linked ones; its order is natural, `2.jpg` before `10.jpg`,
    without hidden files.
    """

    def probe(self) -> Source:
        """Describe the pictures from their headers.

        Raises:
            SourceError: If there is no file with a picture's suffix, or more than `max_frames`; a subfolder cannot be
                listed; or a file cannot be read for a reason that is not its own: a disk or network fails, a mount is
                away.
        """
        return self._open()[0]

    def read(self, start: int, stop: int, on_passed: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Yield the pictures [start, stop); one that cannot be decoded comes with its reason instead.

        Raises:
            SourceError: If there is no file with a picture's suffix, or one cannot be read for a reason that is not its
                own.
            SourceChangedError: If one is another than when it was probed.
        """
        source, files, headers = self._open()
        check_range(source, start, stop)
        pictures = _encoded(files, headers, start, stop, self._max_pixels)
        return _fitting(source, decode_ahead(pictures, self._max_pixels, self._threads))

    def _probe(self) -> tuple[Source, list[Picture], list[Header]]:
        names = _list_urls(self._uri) if is_url(self._uri) else _list_files(Path(self._uri))
        check_frames(self._uri, len(names), self._max_frames)
        files = list(names.values())
        headers = _headers(files, self._max_pixels)
        for index in [index for index, header in enumerate(headers) if not header.height][-1:]:
            if _is_away(files, headers, index, self._max_pixels):
                raise unanswered(files[index], OSError("nor can others that could be before"))
        keys = tuple(names)
        digest = hashlib.sha256()
        for key, header in zip(keys, headers, strict=True):
            digest.update(f"{key}\0{header.digest}\0".encode())
        headers = on_one_canvas(headers, self._max_pixels)
        return describe(self._uri, "images", keys, headers, digest.hexdigest()), files, headers


def _headers(files: Sequence[Picture], max_pixels: int) -> list[Header]:
    if len(files) == 1:  # a thread would take longer than the header, and there may be very many such sources
        return [read_header(files[0], max_pixels)]
    headers: list[Header] = []
    with ThreadPoolExecutor(_HEADER_THREADS, "depthmill-headers") as pool:
        for start in range(0, len(files), _HEADERS_AT_ONCE):
            headers += pool.map(lambda file: read_header(file, max_pixels), files[start : start + _HEADERS_AT_ONCE])
    return headers


def _list_files(path: Path) -> dict[str, Picture]:
    """Key -> picture, in order."""
    if kind_of(path) == "file":
        return {readable(path.name): path}
    if kind_of(path) != "folder":
        raise SourceError(f"{path}: no such file or folder; expected a folder of pictures or a picture: check the path")
    found, error = files_below(path)
    if error:
        raise SourceError(
            f"{error.filename}: cannot be listed ({error.strerror}); expected all of {path}, with its subfolders: "
            "let it be read, or give the others by themselves"
        ) from error
    files = [file for file in found if is_picture(file.name) and kind_of(file) != "other"]  # a pipe would never end
    if not files:
        raise _nothing(path)
    named = {file.relative_to(path).as_posix(): file for file in files}
    names = sorted(named, key=natural_key)
    return dict(zip(unique_names(map(readable, names)), (named[name] for name in names), strict=True))


def _list_urls(uri: str) -> dict[str, Picture]:
    """Key -> picture, in order."""
    name = path_of(uri).rpartition("/")[2]
    if is_picture(name):
        file_size(uri)  # that it is there
        return {name: uri}
    found = {url.removeprefix(f"{uri}/"): url for url in list_files(uri)}  # `a/b.png` is another key than `a//b.png`
    keys = [key for key in found if is_picture(key) and "/." not in f"/{key}"]
    if not keys:
        raise _nothing(uri)
    return {key: found[key] for key in sorted(keys, key=natural_key)}


def _nothing(where: object) -> SourceError:
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    return SourceError(
        f"{where}: no pictures, videos or shards in it or below it; expected files ending in {suffixes}, or as "
        "videos and shards do: check the path, or name files of other suffixes themselves"
    )


def _encoded(
    files: Sequence[Picture], headers: Sequence[Header], start: int, stop: int, max_pixels: int
) -> Generator[Encoded, None, None]:
    for index in range(start, stop):
        header = headers[index]
        if header.error:
            yield Encoded(index, None, error=header.error)
            continue
        size_bytes = 3 * header.height * header.width
        away = partial(_is_away, files, headers, index, max_pixels) if size_bytes else lambda: False
        yield Encoded(index, files[index], size_bytes, away=away, digest=header.digest)


def _fitting(source: Source, frames: Generator[Frame, None, None]) -> Iterator[Frame]:
    """The frames; a picture for which no row of the source has room was another one when that was probed."""
    with closing(frames):
        for frame in frames:
            height, width = (0, 0) if frame.image is None else frame.image.shape[:2]
            if height > source.height or width > source.width:
                assert source.keys is not None
                raise SourceChangedError(
                    f"{source.uri}: {source.keys[frame.index]} is larger ({width}x{height}) than any of its pictures "
                    "was when they were probed; expected files that do not change while they are read: start again"
                )
            yield frame


def _is_away(files: Sequence[Picture], headers: Sequence[Header], index: int, max_pixels: int) -> bool:
    """Whether a picture that is not there, or may not be read, went with its folder: a mount, rights that expired.

    That is so if the folder is gone, or empty, or not to be listed; or if of some others in the source, here and there,
    whose headers could be read, none can be any more.
    """
    file = files[index]
    if isinstance(file, Path) and not holds_files(file.parent):
        return True
    step = -(-len(files) // _OTHERS)
    parts = (range(start, min(start + step, len(files))) for start in range(0, len(files), step))
    others = {next((i for i in part if headers[i].height and i != index), index) for part in parts} - {index}
    return bool(others) and not any(_can_be_read(files[i], max_pixels) for i in others)


def _can_be_read(file: Picture, max_pixels: int) -> bool:
    try:
        return read_header(file, max_pixels).height > 0
    except SourceError:
        return False
