"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import asyncio
import glob
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

_PARTIAL = "partial"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and survives a power cut once this returns.

    A killed write leaves `.<name>.<random>.partial` beside it, which `remove_partial` clears. The name is random
    because a worker that was given up for dead may still be writing the same file as its successor.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_partial(path: Path) -> None:
    """Remove what killed writes of this one file left behind."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.{_PARTIAL}"):
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Whether this is the leftover of a killed `write_atomically`."""
    return path.name.startswith(".") and path.name.endswith(f".{_PARTIAL}")


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document, atomically; the same document always gives the same bytes."""
    write_atomically(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


class AtomicStore(LocalStore):
    """Zarr's own directory store, but every write goes through `write_atomically`.

    Zarr 3.1 happens to write through a temporary file too, but without fsync, under a name that only it could clean
    up, and without promising it.
    """

    async def set(self, key: str, value: Buffer) -> None:
        """Write one key."""
        self._check_writable()
        await asyncio.to_thread(write_atomically, self.root / key, value.to_bytes())

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write one key, unless there is one."""
        if not await self.exists(key):
            await self.set(key, value)


__all__ = ["AtomicStore", "is_partial", "remove_partial", "write_atomically", "write_json"]
