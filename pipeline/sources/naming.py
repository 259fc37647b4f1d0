"""Names and orders that must be the same in every run."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def absolute(path: str | Path) -> Path:
    """The absolute path without `.` and `..`, links not followed: one name for one input, however it was given."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.absolute keeps "..")


def source_id(uri: str | Path) -> str:
    """The name of a source's group in the store: readable, unique, and the same in every run.

    Args:
        uri: Path of a file or folder; taken as absolute, but links are not followed.

    Returns:
        A slug of the name and 8 hex digits of the absolute path's hash: "my-clip-1a2b3c4d".
    """
    path = absolute(uri)
    slug = re.sub(r"[^a-z0-9]+", "-", path.stem.lower())[:60].strip("-") or "source"
    return f"{slug}-{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts frame2 before frame10: runs of digits are compared as numbers."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part)
