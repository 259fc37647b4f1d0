"""Opening files by name: a path, or a URL of object storage or the web, of which only the parts asked for are read."""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from depthmill.pipeline.errors import MissingError, SourceError
from depthmill.pipeline.objects import is_bucket, is_url, locate, said
from depthmill.pipeline.sources.naming import is_preview

# Of errors in reading a file, those that all others have too if it is their folder that cannot be reached.
AWAY_ERRORS = (errno.ENOENT, errno.EACCES, errno.EPERM)

# Those that a file is to blame for: it is not there or not to be read, links go in a circle, or what is asked for is in
# a place that no file has.
OWN_ERRORS = (*AWAY_ERRORS, errno.ELOOP, errno.EINVAL)

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # of a path, nothing else being wrong

_BLOCK_BYTES = 1 << 20  # fetched at once; a few are kept: indices are read here and there, pictures one after another
_BLOCKS = 8
_GLIMPSE_BYTES = 1 << 14  # likewise, of what is only glimpsed at: a header of a picture, seldom more than one block


def open_binary(uri: str | Path, *, glimpse: bool = False) -> BinaryIO:
    """Open a file for reading bytes at any place.

    Args:
        uri: Path or URL.
        glimpse: Whether little of it will be read: of a URL, little is fetched then, and nothing ahead.

    Raises:
        OSError: If it cannot be opened, locally.
        SourceError: If it cannot be, elsewhere; MissingError if it is not there.
    """
    if not is_url(uri):
        return Path(uri).open("rb")
    with translated(uri) as (files, path):
        block_bytes, cache = (_GLIMPSE_BYTES, "blockcache") if glimpse else (_BLOCK_BYTES, "background")
        options = {"cache_type": cache, "cache_options": {"maxblocks": _BLOCKS}, "block_size": block_bytes}
        file = files.open(path, "rb", **options)
        if not file.seekable():
            file.close()
            raise SourceError(f"{uri}: its server gives no parts of files; expected one that does: download it first")
        file.cache.fetcher = _whole_parts(file)
        return cast("BinaryIO", io.BufferedReader(_Reporting(str(uri), file), block_bytes))


def read_whole(uri: str) -> bytes:
    """All bytes of a URL.

    Raises:
        SourceError: If it cannot be read; MissingError if it is not there.
    """
    with translated(uri) as (files, path):
        return bytes(files.cat_file(path))


def file_size(uri: str | Path) -> int:
    """Size in bytes.

    Raises:
        OSError: If there is no such file, locally.
        SourceError: If there is none elsewhere.
    """
    if not is_url(uri):
        return Path(uri).stat().st_size
    with translated(uri) as (files, path):
        return int(files.info(path)["size"])


def details(uri: str) -> dict[str, Any]:
    """What its library says of a URL, after one request: `size`, None if unknown, and others that differ by library.

    Raises:
        SourceError: If there is no such object, or it cannot be asked for.
    """
    with translated(uri) as (files, path):
        return dict(files.info(path))


def list_files(uri: str, *, pattern: bool = False) -> list[str]:
    """URLs of all files at or below a URL but previews, sorted; of what it matches, if a pattern, prefixes with `/`.

    Raises:
        SourceError: If it cannot be listed.
    """
    with translated(uri) as (files, path):
        if not pattern:
            names = list(below(files, path))
        elif is_bucket(uri):
            names = _matching(files, path)
        else:  # servers on the web promise no listing: what their pages link to
            found = files.glob(path, detail=True).items()
            names = [name.rstrip("/") + "/" * (info.get("type") == "directory") for name, info in found]
        prefix = uri.partition("://")[0] + "://"
        return sorted(name if is_url(name) else prefix + name.lstrip("/") for name in names if not is_preview(name))


def below(files: Any, path: str) -> dict[str, dict[str, Any]]:
    """What is said of the objects at or below a path, but of those `folder/` by which S3's console shows a folder."""
    try:
        found = files.find(path, detail=True)
    except FileNotFoundError:
        return {}
    return {name: info for name, info in found.items() if info.get("type") != "directory" and not name.endswith("/")}


def _matching(files: Any, pattern: str) -> list[str]:
    """What a pattern matches in a bucket, prefixes with `/`: level by level and, from the first `**` on, of all below.

    Not by `files.glob`, which leaves out what it is refused, and an object of the same name as a prefix.
    """
    from fsspec.utils import glob_translate

    bucket, *parts = pattern.rstrip("/").split("/")
    places, found = [bucket], list[str]()
    for number, part in enumerate(parts, 1):
        if part == "**":
            found = [name for place in places for name in _with_prefixes(below(files, place), place)]
            break
        if number < len(parts) and not glob.has_magic(part):
            places = [f"{place}/{part}" for place in places]
            continue
        fits = re.compile(glob_translate(part)).match
        entries = (name for place in places for name in _entries(files, place))
        found = [name for name in entries if fits(name.removesuffix("/").rpartition("/")[2])]
        places = [name[:-1] for name in found if name.endswith("/")]
    matches, slash = re.compile(glob_translate(pattern)).match, pattern.endswith(("/", "/**"))
    return [name for name in found if matches(name if slash else name.removesuffix("/"))]


def _entries(files: Any, place: str) -> list[str]:
    """What lies directly below a prefix."""
    try:
        listed = files.ls(place, detail=True, refresh=True)
    except FileNotFoundError:
        return []
    below = [entry for entry in listed if entry["name"].startswith(f"{place}/") and not entry["name"].endswith("/")]
    return [entry["name"] + "/" * (entry["type"] == "directory") for entry in below]


def _with_prefixes(names: Iterable[str], place: str) -> set[str]:
    """Objects, and the prefixes that they lie in, from a place on."""
    slashes = ((name, slash.end()) for name in names for slash in re.finditer("/", name))
    return {*names, *(name[:end] for name, end in slashes if end > len(place))}


def kind_of(path: str | Path) -> Literal["file", "folder", "other", ""]:
    """What is at a path; "" if nothing is, or nothing can be, as behind a name that is too long."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (a Path asked whether it exists raises some of what this does)
    except (OSError, ValueError):
        return ""
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def unseen(path: str | Path) -> str:
    """Why it cannot be seen what is at a path; "" if it can be, or nothing is."""
    try:
        os.stat(path)  # noqa: PTH116 (as above)
    except OSError as error:
        return "" if error.errno in NOT_THERE else str(error.strerror or error)
    except ValueError:
        pass
    return ""


def files_below(folder: Path) -> tuple[list[Path], OSError | None]:
    """All that is no folder in a folder and below it, hidden names, previews and linked folders left out.

    Returns:
        The paths, in no order, and why one of the folders could not be listed: then there may be more.
    """
    errors: list[OSError] = []
    files: list[Path] = []
    for parent, subfolders, names in os.walk(folder, onerror=errors.append):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not (name.startswith(".") or is_preview(name))]
    return files, errors[0] if errors else None


def unanswered(name: object, error: OSError) -> SourceError:
    """What to raise where a file could not be read for a reason that is not its own: on another try it may be."""
    return SourceError(
        f"{name}: cannot be read ({error.strerror or error}); expected a disk or network that answers: run the same "
        "command again, or leave it out"
    )


def is_prefix(uri: str) -> bool:
    """Whether a URL is a folder's: that there is something below it.

    Raises:
        SourceError: If that cannot be told.
    """
    with translated(uri) as (files, path):
        return bool(files.isdir(path))


@contextmanager
def translated(uri: str | Path) -> Iterator[tuple[Any, str]]:
    """The file system of a URL, and the path there; whatever its library raises comes as a SourceError."""
    try:
        yield locate(str(uri), SourceError)
    except SourceError:
        raise
    except Exception as error:  # they have no exception tree in common; without the cause, which may hold credentials
        cause: Any = error
        if isinstance(error, FileNotFoundError) and str(uri).startswith("http"):  # raised for whatever goes wrong there
            cause = error.__cause__ or error
        status = getattr(cause, "status", None)  # of a response, with the whole URL in the error's words
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise MissingError(f"{uri}: no such object; expected one that can be read: check the URL") from None
        why = said(cause) if status is None else f"{status} {cause.message}"
        raise SourceError(
            f"{uri}: cannot be read ({why}); check the URL, the credentials in the environment and the endpoint"
        ) from None


def _whole_parts(file: Any) -> Callable[[int, int], bytes]:
    """What fetches parts of a remote file, whole: a server may give less than it is asked for (RFC 9110, 15.3.7).

    fsspec's caches join parts without looking at their lengths, so all behind a short one would be shifted.
    """
    fetch: Callable[[int, int], bytes] = file.cache.fetcher

    def fetched(start: int, stop: int) -> bytes:
        data, wanted = fetch(start, stop), min(stop, file.size) - start
        if len(data) != wanted:
            raise OSError(errno.EIO, f"its server gave {len(data):,} bytes of {wanted:,} asked for")
        return data

    return fetched


class _Reporting(io.RawIOBase):
    """A remote file whose troubles are OSErrors, as those who read files expect, with nothing secret in them."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file = uri, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise OSError(errno.EIO, said(error), self._uri) from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
