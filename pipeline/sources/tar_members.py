"""The members of a tar archive, in order, whatever is broken in between. Nothing is ever written to a disk.

`tarfile.TarInfo` reads the headers (POSIX, GNU, pax). The walk from header to header is ours, because `TarFile` takes a
damaged header for the end of the archive and says nothing.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, cast

from depthmill.pipeline.sources.naming import readable
from depthmill.pipeline.sources.opening import open_binary

# What a damaged or shortened gzip stream raises. Other OSErrors are the disk's or the network's, not the archive's.
GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_MAX_HEADER_BYTES = 1 << 16  # of long names and pax records, which are read into memory
_MAX_HEADER_READS = 64  # for one member; a name, its pax records and global ones take six
_MAX_OFFSET = 1 << 60  # beyond it, seeking fails
_UNKNOWN = "what lies behind is unknown"

# An archive is filled up to a multiple of one of these: tar's own, and what people tell it.
_RECORD_BLOCKS = (20, *(1 << power for power in range(15)))


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive; or, where `name` is "", a stretch of it that is damaged.

    Attributes:
        name: With forward slashes; bytes that are no UTF-8 are escaped.
        offset: Of its data in the unpacked archive, in bytes.
        size: Of its data, in bytes.
        problem: Why it has no data that can be read, else "".
    """

    name: str
    offset: int
    size: int
    problem: str = ""


class _Unpacked(gzip.GzipFile):
    """A gzip stream that owns the file below it. Seeking back starts from the beginning again."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        super().__init__(fileobj=packed, mode="rb")

    def close(self) -> None:
        super().close()
        self._packed.close()


class _Headers:
    """What `TarInfo` may read of a file for one member: a few headers, from a block on that was looked at before."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._peeked = b""
        self._reads = 0

    def peek(self, offset: int) -> bytes:
        self._file.seek(offset)
        self._reads = 0
        self._peeked = self._file.read(_BLOCK)
        return self._peeked

    def read(self, size: int) -> bytes:
        self._reads += 1
        if not 0 <= size <= _MAX_HEADER_BYTES or self._reads > _MAX_HEADER_READS:
            raise tarfile.HeaderError(f"{self._reads} headers, the last of {size} bytes")
        block, self._peeked = self._peeked[:size], self._peeked[size:]
        return block + self._file.read(size - len(block))

    def tell(self) -> int:
        return self._file.tell() - len(self._peeked)


def open_archive(uri: str) -> tuple[BinaryIO, bool]:
    """Open a tar archive, unpacking it if it is a gzip file, whatever its name says.

    Returns:
        The unpacked bytes, and whether they can be sought in at no cost.
    """
    file = open_binary(uri)
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return (cast(BinaryIO, _Unpacked(file)), False) if packed else (file, True)


def walk(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of an archive, folders left out.

    A damaged header is skipped up to the next one that is whole; the stretch is yielded. So are zeros in a place where
    no archive ends, and what ends it early. Behind an end, the walk goes on into an archive that was appended. Between
    two members, `file` may be read anywhere if it is sought in at no cost, else within the last member.
    """
    state = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * _BLOCK)))  # an empty one: what headers inherit from each other
    headers = _Headers(file)
    state.fileobj = headers  # type: ignore[assignment]  # fromtarfile reads and tells; no more
    offset = first = 0  # of the next header, of the archive that it is in
    damage: tuple[int, Exception] | None = None
    try:
        while True:
            block = headers.peek(offset)
            if len(block) < _BLOCK:
                break
            if block == _ZEROS:
                stop, ends = _behind_zeros(file, offset)
                if ends:
                    break
                if _is_end((stop - offset) // _BLOCK, (stop - first) // _BLOCK):
                    first = stop
                else:
                    damage = damage or (offset, tarfile.HeaderError("zeros"))
                offset = stop
                continue
            state.offset = offset
            try:
                info = tarfile.TarInfo.fromtarfile(state)
                if info.size < 0 or not offset < state.offset < _MAX_OFFSET:
                    raise tarfile.HeaderError(f"a size of {info.size} bytes")
            except (*GZIP_DAMAGE, OSError):
                raise
            except Exception as error:  # a damaged header breaks tarfile in many ways: ValueError, IndexError …
                damage = damage or (offset, error)
                offset = _next_header(file, offset, headers.tell())
                continue
            if damage:
                yield _no_member(*damage, offset)
                damage = None
            offset = state.offset
            if not info.isdir():
                yield Member(readable(info.name), info.offset_data, info.size, _problem(info))
        if damage:
            yield _no_member(*damage, offset)
        elif len(block) < _BLOCK:
            whole = bool(block) or offset == 0 or _holds(file, offset - 1)
            where = "within a header" if block else "without its end mark" if whole else "within a member"
            yield Member("", offset, 0, f"the archive is cut off {where}: {_UNKNOWN}")
        elif stop - offset > _BLOCK * (max(_RECORD_BLOCKS) + 1):
            yield Member("", offset, 0, f"the archive ends in {stop - offset} zeros, too many for an end: {_UNKNOWN}")
    except GZIP_DAMAGE as error:
        yield Member("", offset, 0, f"its gzip stream is damaged before byte {offset} ({error}): {_UNKNOWN}")


def _no_member(start: int, error: Exception, stop: int) -> Member:
    return Member("", start, 0, f"from byte {start} of the archive to byte {stop} there is no member ({error})")


def _problem(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return (
            f"a link to {readable(info.linkname)}; links are not followed: write the archive with the files themselves"
        )
    if info.issparse():
        return "a sparse file, which is not read: write the archive without --sparse"
    if not info.isreg():
        return f"a device or other special member (type {info.type!r}), no file: leave it out"
    if ".." in info.name.split("/"):
        return "its name leads out of the archive: rename it"
    return ""


def _holds(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    return bool(file.read(1))


def _behind_zeros(file: BinaryIO, offset: int) -> tuple[int, bool]:
    """Where the first block from `offset` on is that is not all zeros, or where the file ends; and whether it does."""
    file.seek(offset)
    while (block := file.read(_BLOCK)) == _ZEROS:
        offset += _BLOCK
    return offset, not block.strip(b"\0")


def _is_end(zeros: int, blocks: int) -> bool:
    """Whether so many blocks of zeros, behind which something follows, end an archive of so many blocks.

    Two do, and those that fill up its last record. A hole in an archive rarely has just that length.
    """
    return zeros >= 2 and any(zeros <= record + 1 and blocks % record == 0 for record in _RECORD_BLOCKS)


def _next_header(file: BinaryIO, offset: int, reached: int) -> int:
    """Where the next whole header is, by its magic and checksum; the archive's end if there is none.

    Args:
        file: The archive.
        offset: Of a damaged header.
        reached: How far has been read of it: what it takes along is not looked at twice.
    """
    offset += max(1, (reached - offset) // _BLOCK) * _BLOCK
    file.seek(offset)
    while len(block := file.read(_BLOCK)) == _BLOCK:
        if block[257:262] == b"ustar":
            with suppress(tarfile.HeaderError, ValueError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return offset
        offset += _BLOCK
    return offset
