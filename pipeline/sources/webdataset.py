"""WebDataset shards: tar archives whose members `000.jpg`, `000.json`, `000.txt` are one sample with the key `000`.

A frame is a sample with a picture: its first member with a picture's plain extension (`jpg`); else the only one with a
longer extension (`cam.png`), or the one called `rgb`, `image` or the like; where that does not decide, the frame fails.
Nothing is unpacked to a disk. A picture that is a link, a sparse file or a device, or whose name leads out of the
archive, is a failed frame; so is every stretch of the archive that is damaged, since pictures may have been in it.

In a plain archive, pictures are read where they lie. In a gzip stream, what is before has to be passed over: a read
goes on where the last one ended, so that segments in order pass over it once.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.base import BaseSource
from depthmill.pipeline.sources.limits import check_frames, check_range, too_large
from depthmill.pipeline.sources.naming import unique_names
from depthmill.pipeline.sources.pictures import (
    NO_HEADER,
    Encoded,
    Header,
    decode_ahead,
    describe,
    on_one_canvas,
    read_header,
)
from depthmill.pipeline.sources.suffixes import IMAGE_SUFFIXES
from depthmill.pipeline.sources.tar_members import GZIP_DAMAGE, Member, open_archive, walk
from depthmill.pipeline.sources.versions import Version, changed, check_unchanged, is_another, settled, version_of
from depthmill.pipeline.types import Frame, Source

# Key and extension: from the first dot of the last part on; a leading slash is no part of the key.
_NAME = re.compile(r"/*((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)

# Of a sample's pictures with longer extensions, what the one to label is called.
_USUAL = ("rgb", "image", "img", "color", "colour")

_WINDOW_BYTES = 4096  # read of a picture at a time, for its header
_PASSED_BYTES = 1 << 22  # in one step: far less than a second to unpack


@dataclass(frozen=True, slots=True)
class _Picture:
    """A frame: where its picture lies in the unpacked archive, or why there is none. A damaged stretch has no key."""

    key: str
    offset: int
    size: int
    header: Header


class WebDatasetSource(BaseSource[tuple[Source, list[_Picture]], BinaryIO]):
    """A WebDataset shard: `.tar`, or `.tar.gz`."""

    def probe(self) -> Source:
        """Describe the shard from the headers of its members and of their pictures.

        Raises:
            SourceError: If it cannot be read, is no tar archive, or holds no picture, or more than `max_frames`.
            SourceChangedError: If it changes meanwhile.
        """
        return self._open()[0]

    def read(self, start: int, stop: int, on_passed: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Yield the pictures [start, stop); one that cannot be read comes with its reason instead.

        `on_passed` is told of each few MiB that are passed over.

        Raises:
            SourceError: If the archive cannot be read.
            SourceChangedError: If it, or a picture in it, is another than when it was probed.
        """
        source, pictures = self._open()
        check_range(source, start, stop)
        return decode_ahead(self._encoded(pictures, start, stop, on_passed), self._max_pixels, self._threads)

    def _probe(self) -> tuple[Source, list[_Picture]]:
        try:
            self._version, probed = settled(self._uri, self._walked)
        except OSError as error:
            raise _unreadable(self._uri, error) from error
        return probed

    def _walked(self) -> tuple[Version, tuple[Source, list[_Picture]]]:
        version = version_of(self._uri)
        digest = hashlib.sha256(f"{version.size}\0".encode())
        pictures: list[_Picture] = []
        file, seekable = open_archive(self._uri)
        with closing(file):
            for picture in _pictures(file, version.size if seekable else None, self._max_pixels):
                pictures.append(picture)
                check_frames(self._uri, len(pictures), self._max_frames)
                digest.update(f"{picture.key}\0{picture.offset}\0{picture.size}\0{picture.header.digest}\0".encode())
        if not any(picture.key for picture in pictures):
            damage = "; ".join(picture.header.error for picture in pictures[:3])
            raise SourceError(
                f"{self._uri}: no pictures in this archive{damage and f' ({damage})'}; expected a tar archive with "
                f"members ending in {' '.join(sorted(IMAGE_SUFFIXES))}: replace it or leave it out"
            )
        keys = unique_names(picture.key or f"@{picture.offset}" for picture in pictures)
        headers = on_one_canvas([picture.header for picture in pictures], self._max_pixels)
        pictures = [replace(picture, header=header) for picture, header in zip(pictures, headers, strict=True)]
        return version, (describe(self._uri, "webdataset", keys, headers, digest.hexdigest()), pictures)

    def _encoded(
        self, pictures: list[_Picture], start: int, stop: int, on_passed: Callable[[], None]
    ) -> Generator[Encoded, None, None]:
        try:
            with self._parked.lent(lambda: open_archive(self._uri)[0]) as archive:
                for index in range(start, stop):
                    picture = pictures[index]
                    if picture.header.error:
                        yield Encoded(index, None, error=picture.header.error)
                        continue
                    data, problem = _read(archive(), picture.offset, picture.size, on_passed)
                    if problem or is_another(io.BytesIO(data), picture.header.digest):
                        raise changed(self._uri, f"{picture.key} in it, {problem or 'which is another'}")
                    size_bytes = len(data) + 3 * picture.header.height * picture.header.width
                    yield Encoded(index, io.BytesIO(data), size_bytes)
        except OSError as error:
            check_unchanged(self._uri, self._version)
            raise _unreadable(self._uri, error) from error


def _pictures(file: BinaryIO, size: int | None, max_pixels: int) -> Iterator[_Picture]:
    """Yield the picture of each sample, and each damaged stretch.

    A sample is a run of members with one key; an extension that it has already begins the next.

    Args:
        file: The archive, unpacked.
        size: Of the archive in bytes, where it is plain; None for a gzip stream, which is passed over once.
        max_pixels: Pictures with more do not count towards the size of the source.
    """
    key, extensions = "", set[str]()
    found: dict[str, _Picture] = {}  # by extension
    for member in walk(file):
        named = _NAME.fullmatch(member.name)
        if member.name and not named:
            continue  # hidden, or without an extension: no part of a sample
        member_key, extension = named.groups() if named else ("", "")
        if member_key != key or extension in extensions:
            yield from _chosen(found)
            key, extensions, found = member_key, set(), {}
        extensions.add(extension)
        if not member.name:
            yield _Picture("", member.offset, 0, replace(NO_HEADER, error=member.problem))
        elif "." + extension.lower().rpartition(".")[2] in (*IMAGE_SUFFIXES, ".gif"):  # of which the first picture
            found[extension], is_last = _describe(member, key, file, size, max_pixels)
            if is_last:
                break
    yield from _chosen(found)


def _chosen(found: dict[str, _Picture]) -> Iterator[_Picture]:
    """The one of a sample's pictures that is labelled, if it has any."""
    names = {extension: extension.lower().rpartition(".")[0] for extension in found}  # "" of a plain one
    for wanted in ([""], _USUAL, names.values()):
        candidates = [extension for extension, name in names.items() if name in wanted]
        if len({names[extension] for extension in candidates}) == 1:
            yield found[candidates[0]]
            return
    if found:
        key = next(iter(found.values())).key
        some = ", ".join(f"{key}.{extension}" for extension in list(found)[:3]) + ", …" * (len(found) > 3)
        error = (
            f"{len(found)} pictures in one sample ({some}); expected one to be told by its name, {key}.jpg or "
            f"{key}.rgb.jpg: rename it, or all (a sample's key ends at the first dot)"
        )
        yield _Picture(key, 0, 0, replace(NO_HEADER, error=error))


def _describe(member: Member, key: str, file: BinaryIO, size: int | None, max_pixels: int) -> tuple[_Picture, bool]:
    """The picture in a member, and whether the archive ends within it."""
    header, is_last = NO_HEADER, False
    problem = member.problem or too_large(member.size, max_pixels)
    if not problem and size is None:
        data, problem = _read(file, member.offset, member.size)
        is_last = bool(problem)
        header = read_header(io.BytesIO(data), max_pixels)
    elif not problem and size is not None:
        there = size - member.offset
        if there < member.size:
            problem, is_last = _cut_off(there, member.size), True
        else:
            window = io.BufferedReader(_Window(file, member.offset, member.size), _WINDOW_BYTES)
            header = read_header(cast(BinaryIO, window), max_pixels)
    return _Picture(key, member.offset, member.size, replace(header, error=problem)), is_last


def _read(file: BinaryIO, offset: int, size: int, on_passed: Callable[[], None] = lambda: None) -> tuple[bytes, str]:
    """The bytes of a member, or why they cannot be had; what is before is passed over in steps."""
    try:
        at = file.tell() if file.tell() <= offset else file.seek(0)
        while at < offset:
            at = file.seek(min(at + _PASSED_BYTES, offset))
            on_passed()
        data = file.read(size)
    except GZIP_DAMAGE as error:
        return b"", f"the gzip stream is damaged within it ({error}): what lies behind is unknown"
    return (data, "") if len(data) == size else (b"", _cut_off(len(data), size))


def _cut_off(there: int, size: int) -> str:
    return f"the archive is cut off within it, {there} of {size} bytes are there: what lies behind is unknown"


def _unreadable(uri: str, error: OSError) -> SourceError:
    return SourceError(f"{uri}: cannot be read ({error}); expected a tar archive: check the path and the permissions")


class _Window(io.RawIOBase):
    """A member as a file of its own, while nothing else reads the archive."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size = file, offset, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._position)
        data = self._file.read(min(len(buffer), max(0, self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
