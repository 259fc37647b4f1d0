"""Zarr on a `Directory`: what zarr-python asks of a store, answered by our own files.

Imported only where an array is opened: the rerun of a finished job opens none, and Zarr's import takes long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.array_spec import ArrayConfigParams
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import StorePath

from depthmill.pipeline.store.files import Directory
from depthmill.pipeline.store.layout import Document


class ZarrFiles(Store):
    """A directory as a Zarr store.

    Zarr 3.1's own directory store happens to write through a temporary file too, but without fsync, under a name that
    only it could clean up, and without promising it; its own store of objects lets the library's errors through.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(self, directory: Directory, *, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.directory = directory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrFiles) and self.directory.uri == other.directory.uri

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ZarrFiles({self.directory.uri!r})"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a file, or a part of it."""
        start, stop = _bounds(byte_range)
        data = await asyncio.to_thread(self.directory.read, key, start, stop)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read parts of files."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return await asyncio.to_thread(self.directory.read, key, 0, 1) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Write a file."""
        self._check_writable()
        await asyncio.to_thread(self.directory.write, key, value.to_bytes())

    async def delete(self, key: str) -> None:
        """Remove a file, if it is there."""
        self._check_writable()
        await asyncio.to_thread(self.directory.delete, key)

    async def list(self) -> AsyncIterator[str]:
        """Every key."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Every key below a directory."""
        for key in await asyncio.to_thread(lambda: dict(self.directory.sizes(prefix.rstrip("/")))):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names in a directory."""
        for name in await asyncio.to_thread(self.directory.children, prefix.rstrip("/")):
            yield name.rstrip("/")


def open_array(store: Store, path: str, document: Document) -> zarr.Array[Any]:
    """An array whose zarr.json is known, without reading it.

    A chunk of nothing but fill is no file, whatever the user set in zarr.config.
    """
    config: ArrayConfigParams = {"write_empty_chunks": False, "order": "C"}
    return zarr.Array(zarr.AsyncArray(ArrayV3Metadata.from_dict(document), StorePath(store, path), config))


def _bounds(byte_range: ByteRequest | None) -> tuple[int | None, int | None]:
    match byte_range:
        case RangeByteRequest(start, end):
            return start, end
        case OffsetByteRequest(offset):
            return offset, None
        case SuffixByteRequest(suffix):
            return -suffix, None
    return None, None
