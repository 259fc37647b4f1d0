"""A store in object storage, through fsspec: `s3://` and `gs://`. An object appears whole, by its PUT."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.objects import is_bucket, locate, said

_PUT_BYTES = 5 << 30  # in one request, at most, by S3's limit: parts that a killed upload leaves are paid for, unseen


class ObjectDirectory:
    """A prefix of a bucket. Credentials are found by the library in the usual places, and are never part of a URL.

    Listings are never cached: what other processes write is seen.
    """

    def __init__(self, uri: str) -> None:
        """Open it; nothing is asked of the service yet.

        Raises:
            StoreError: If the URL cannot be a store's, or its library is not installed.
        """
        parts = urlsplit(uri)
        if "@" in parts.netloc:  # before anything that would repeat the URL
            raise StoreError(
                f"the store's {parts.scheme}:// URL has credentials in it: expected {parts.scheme}://bucket/prefix; "
                "give them in the environment or in the provider's own files"
            )
        matches = set(uri) & set("*[]")  # the library would remove whatever does
        if not is_bucket(uri) or not parts.netloc or parts.query or parts.fragment or matches:
            raise StoreError(
                f"{uri} cannot be a store: expected a directory, s3://bucket/prefix or gs://bucket/prefix, without any "
                "of ? # * [ ]"
            )
        self.uri = uri.rstrip("/")
        self._root = self.uri.partition("://")[2]
        self._opened = os.getpid(), locate(self.uri, StoreError)[0]

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """See `Directory`."""
        with self._translated(key, "read"):
            # From 0 on, and not as a whole, for which s3fs would ask twice: how long it is, then what it is.
            (found,) = self._fs.cat_ranges([self._path(key)], start or 0, stop, on_error="return")
            return _contents(found)

    def read_all(self, keys: Iterable[str]) -> dict[str, bytes]:
        """See `Directory`; many requests at once."""
        keys = list(keys)
        if not keys:
            return {}
        with self._translated("", "read"):
            found = self._fs.cat_ranges([self._path(key) for key in keys], 0, None, on_error="return")
            contents = zip(keys, map(_contents, found), strict=True)
            return {key: data for key, data in contents if data is not None}

    def write(self, key: str, data: bytes) -> None:
        """See `Directory`."""
        with self._translated(key, "written"):
            self._fs.pipe_file(self._path(key), data, chunksize=_PUT_BYTES)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """See `Directory`; many requests at once."""
        with self._translated("", "written"):
            self._fs.pipe({self._path(key): data for key, data in files.items()}, chunksize=_PUT_BYTES)

    def delete(self, key: str) -> None:
        """See `Directory`."""
        with self._translated(key, "removed"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def children(self, key: str = "") -> list[str]:
        """See `Directory`."""
        path = self._path(key)
        with self._translated(key, "listed"):
            try:
                entries = self._fs.ls(path, detail=True, refresh=True)
            except FileNotFoundError:
                return []
        # A marker of this very folder has its name, in gcsfs's words.
        below = (entry for entry in entries if _counts(entry) and entry["name"].rstrip("/") != path)
        named = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in below)
        return sorted(name + "/" * (kind == "directory") for name, kind in named if name)

    def sizes(self, key: str = "") -> Iterator[tuple[str, int]]:
        """See `Directory`."""
        with self._translated(key, "listed"):
            found = self._fs.find(self._path(key) + "/", detail=True)
        return ((path[len(self._root) + 1 :], entry["size"]) for path, entry in found.items() if _counts(entry))

    def remove(self, key: str) -> None:
        """See `Directory`."""
        if not key:
            raise ValueError(f"{self.uri} itself is never removed whole: give the key of a directory in it")
        with self._translated(key, "removed"), suppress(FileNotFoundError):
            self._fs.rm(self._path(key), recursive=True)

    def make_root(self) -> None:
        """See `Directory`: a prefix is there with its first object."""

    def remove_root(self) -> None:
        """See `Directory`: a prefix is gone with its last object."""

    def clear_partial(self, key: str) -> None:
        """See `Directory`: a PUT leaves nothing behind."""

    @property
    def _fs(self) -> Any:
        """The library's file system: a forked process cannot use its parent's."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), locate(self.uri, StoreError)[0]
        return self._opened[1]

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}".rstrip("/")

    @contextmanager
    def _translated(self, key: str, done: str) -> Iterator[None]:
        """Whatever the library raises, as a StoreError: it has no exception tree of its own."""
        try:
            yield
        except Exception as error:
            where = f"{self.uri}/{key}".rstrip("/")
            # Without its cause, in whose text credentials could stand.
            raise StoreError(
                f"{where} cannot be {done}: {said(error)}; check the bucket, the credentials in the environment and "
                "the endpoint, then run the same command again"
            ) from None


def _contents(found: bytes | Exception) -> bytes | None:
    """What a range of a file gave: None if there is no file, nothing if it is empty and so has no such range."""
    if isinstance(found, bytes):
        return found
    if isinstance(found, FileNotFoundError):
        return None
    if "not satisfiable" in str(found):
        return b""
    raise found


def _counts(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is more than the empty object `folder/` by which consoles show a folder."""
    return entry["type"] == "directory" or not entry["name"].endswith("/")
