"""Where a store's files are: a local directory, or a prefix of an object store. A file is whole or absent.

Keys are relative, with slashes. Everything that the store reads or writes goes through a `Directory`, Zarr's chunks
included (`zarr_files.py`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreForbiddenError, StoreFullError
from depthmill.pipeline.file_state import holds_files

_PARTIAL = "partial"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_RACED = (errno.ENOENT, errno.EEXIST, errno.ESTALE)  # another writer of the same file removed the folder
_TRIES = 100


class Directory(Protocol):
    """A tree of files that are whole or absent. Errors are of the `StoreError` kind, and hold no credentials."""

    uri: str

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Read a file, or its bytes [start, stop), from its end where `start` is negative; None if there is none."""
        ...

    def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Read those of many files that exist."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Write one file atomically: from then on it survives the death of its writer.

        Raises:
            StoreFullError: If there is no space left.
            StoreForbiddenError: If this user may not write there, or nobody, as on a disk that is mounted read-only.
            StoreError: If this directory is not there, or folders would have to be made in it and it is empty: that is
                what a mount that is away leaves.
        """
        ...

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Write many files, in any order."""
        ...

    def delete(self, key: str) -> None:
        """Remove one file, if it is there."""
        ...

    def children(self, key: str = "") -> list[str]:
        """What is directly in a directory: names, those of directories with a slash at their end; none if absent."""
        ...

    def sizes(self, key: str = "") -> Iterator[tuple[str, int]]:
        """Key and bytes of every file at any depth below a directory, in no order: there may be millions."""
        ...

    def remove(self, key: str) -> None:
        """Remove a directory below this one with all that is in it, if it is there."""
        ...

    def make_root(self) -> None:
        """Make this directory itself, if it is not there; a bucket never. No other call does."""
        ...

    def remove_root(self) -> None:
        """Remove this directory itself, if it is there and empty; a bucket never."""
        ...

    def clear_partial(self, key: str) -> None:
        """Remove what killed writes of this one file left behind."""
        ...


def open_directory(uri: str | Path) -> Directory:
    """The directory at a path or a URL: `s3://bucket/prefix`, `gs://bucket/prefix`. Nothing is read or made.

    Raises:
        StoreError: If the URL is of another kind, or what opens it is not installed.
    """
    if not str(uri):
        raise StoreError("the store's path is empty, as a variable is that a shell does not know: give its path or URL")
    if "://" in str(uri):
        from depthmill.pipeline.store.objects import ObjectDirectory

        return ObjectDirectory(str(uri))
    return LocalDirectory(Path(uri))


def located(uri: str) -> str:
    """The same store in another working directory."""
    return uri if not uri or "://" in uri else str(Path(uri).absolute())


class LocalDirectory:
    """A directory of this machine or of a mounted file system.

    Names of files are put together as strings: `pathlib` keeps each part that it has seen of any path, so that a run's
    memory would grow by the names of what it writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = str(path)

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """See `Directory`."""
        try:
            with open(self._at(key), "rb") as file:
                if start is not None and start < 0:
                    file.seek(max(start, -os.fstat(file.fileno()).st_size), os.SEEK_END)
                    return file.read()
                file.seek(start or 0)
                return file.read() if stop is None else file.read(stop - (start or 0))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self._at(key)} cannot be read: {error.strerror}; check it, and try again") from error

    def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
        """See `Directory`."""
        found = ((key, self.read(key)) for key in keys)
        return {key: data for key, data in found if data is not None}

    def write(self, key: str, data: bytes) -> None:
        """See `Directory`."""
        path = self._at(key)
        try:
            write_atomically(path, data, self.uri)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not holds_files(self.uri):
                raise store_away(self.uri) from error
            if error.errno in FULL:
                limited = "a file may not be as long: raise that limit (`ulimit -f`)"
                full = f"{_free(path):,} are free there: make space"
                raise StoreFullError(
                    f"{path} cannot be written: {error.strerror}; it takes {len(data):,} bytes and "
                    f"{limited if error.errno == errno.EFBIG else full}, and run the same command again; what is "
                    "committed stays"
                ) from error
            kind = StoreForbiddenError if error.errno in _FORBIDDEN else StoreError
            raise kind(
                f"{path} cannot be written: {error.strerror}; check the disk and its permissions, then run the same "
                "command again"
            ) from error

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """See `Directory`."""
        for key, data in files.items():
            self.write(key, data)

    def delete(self, key: str) -> None:
        """See `Directory`."""
        try:
            os.unlink(self._at(key))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise _cannot_remove(self._at(key), error) from error

    def children(self, key: str = "") -> list[str]:
        """See `Directory`; links count as files, so that nothing behind them is ever removed."""
        path = self._at(key)
        try:
            with os.scandir(path) as entries:
                return sorted(
                    entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")
                    for entry in entries
                    if not _is_partial(entry.name)
                )
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise StoreError(f"{path} is a file: a store is a directory; give another path") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be listed: {error.strerror}; check its permissions") from error

    def sizes(self, key: str = "") -> Iterator[tuple[str, int]]:
        """See `Directory`."""
        return _sizes(self._at(key), key and f"{key}/")

    def remove(self, key: str) -> None:
        """See `Directory`."""
        if not key:
            raise ValueError(f"{self.uri} itself is never removed whole: give the key of a directory in it")
        try:
            shutil.rmtree(self._at(key))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _cannot_remove(self._at(key), error) from error

    def make_root(self) -> None:
        """See `Directory`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be made: {error.strerror}; give another path") from error

    def remove_root(self) -> None:
        """See `Directory`."""
        with suppress(OSError):  # something is in it, or it is mounted there
            self.path.rmdir()

    def clear_partial(self, key: str) -> None:
        """See `Directory`."""
        folder = _partials(self._at(key))
        with suppress(OSError):  # there is none, or another is writing the same file
            for name in os.listdir(folder):
                os.unlink(os.path.join(folder, name))
            os.rmdir(folder)

    def _at(self, key: str) -> str:
        return os.path.join(self.uri, key)


def write_atomically(path: str | Path, data: bytes, root: str | None = None) -> None:
    """Write a file that appears whole or not at all, and make the folders that it lies in.

    Where `root` is one of those, it is not made, nor any other in it while it is empty.

    A power cut leaves no part of one, but it may take the files of the last seconds, whose names are not on the disk
    yet: a sync of the folder for each would cost as much again. What is lost of a store so is labelled again; a commit
    that outlived its labels, where the file system keeps no order, is found by `depthmill verify`.

    A killed write leaves `.<name>.partial/.<random>.partial` beside it, which `Directory.clear_partial` clears: a
    folder for each file, lest every segment list the files of all others. The name is random because a worker that was
    given up for dead may still be writing the same file as its successor. The folder goes when its last writer is done,
    perhaps between two steps of another's write: that one begins again.
    """
    path = str(path)
    for _ in range(_TRIES):
        try:
            _write_once(path, data, root)
            return
        except OSError as error:
            if error.errno not in _RACED:
                raise
    _write_once(path, data, root)


def _write_once(path: str, data: bytes, root: str | None) -> None:
    folder = _partials(path)
    partial = os.path.join(folder, f".{uuid.uuid4().hex}.{_PARTIAL}")
    _make_folder(folder, root)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):  # it has become the file
            os.unlink(partial)
        with suppress(OSError):  # another is writing the same file
            os.rmdir(folder)


def _make_folder(folder: str, root: str | None) -> None:
    try:
        _mkdir(folder)
    except FileNotFoundError:
        above = os.path.dirname(folder)
        if above in (root, folder) or (os.path.dirname(above) == root and not holds_files(root)):
            raise
        _make_folder(above, root)
        _mkdir(folder)


def _mkdir(folder: str) -> None:
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise


def _sizes(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Key and bytes of every file below a folder, which may go while this looks, as they may."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _sizes(entry.path, f"{prefix}{entry.name}/")
        elif not _is_partial(entry.name):
            with suppress(FileNotFoundError):
                yield prefix + entry.name, entry.stat().st_size


def _partials(path: str) -> str:
    """The folder of unfinished writes of one file."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{_PARTIAL}")


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON document as a file; the same document always gives the same bytes."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def _is_partial(name: str) -> bool:
    """Whether this is the leftover of a killed `write_atomically`."""
    return name.startswith(".") and name.endswith(f".{_PARTIAL}")


def _free(path: str) -> int:
    """Bytes that an ordinary user can still write where a path is to be."""
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    return shutil.disk_usage(folder).free


def store_away(uri: str) -> StoreError:
    """What to raise where a store was, and is not."""
    return StoreError(
        f"{uri} is gone, or there is nothing in it: it is no store any more; expected it as it was made, on a mount "
        "that is there: see to that, then run the same command again"
    )


@contextmanager
def decoding(uri: str, path: str, what: str = "") -> Iterator[None]:
    """What is read within, of an array of the store at `uri`, is damaged if it cannot be decoded.

    Raises:
        StoreDamagedError: Then; `what`, such as a frame, is named.
    """
    try:
        yield
    except (StoreError, MemoryError):
        raise
    except Exception as error:  # whatever codecs raise of broken bytes
        raise damaged(uri, path, f"{what}{type(error).__name__}: {error}") from error


def damaged(uri: str, path: str, why: str) -> StoreDamagedError:
    """What to raise of a file or an array of the store at `uri` that is not as it was written."""
    return StoreDamagedError(
        f"{uri}/{path} is damaged ({why}): run `depthmill verify {quote(uri)} --repair`, which mends it or says what "
        "does not, then the same command again"
    )


def _cannot_remove(path: str, error: OSError) -> StoreError:
    kind = StoreForbiddenError if error.errno in _FORBIDDEN else StoreError
    return kind(f"{path} cannot be removed: {error.strerror}; check its permissions, then try again")
