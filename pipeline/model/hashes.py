"""What a checkpoint's files hash to: its identity in a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from depthmill.pipeline.file_state import file_state
from depthmill.pipeline.model.cache import keep, kept


def hash_files(directory: Path, files: Sequence[Path]) -> str:
    """sha256 of files in a directory, names included.

    What weights hash to is kept, for as long as they are as they were: those of Stable Diffusion take seconds, each
    time a checkpoint is opened.
    """
    place = f"sha256/{hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]}.json"
    before = found if isinstance(found := kept(place), dict) else {}
    now, total = {}, hashlib.sha256()
    for path in files:
        name = path.relative_to(directory).as_posix()
        state = file_state(path) if path.suffix == ".safetensors" else ""
        digest = before.get(f"{name} {state}") if state else None
        if not isinstance(digest, str):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if state:
            now[f"{name} {state}"] = digest
        total.update(f"{name} {digest}\n".encode())
    if now != before:
        keep(place, now)
    return total.hexdigest()
