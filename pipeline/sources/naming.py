"""Names and orders that must be the same in every run."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from depthmill.pipeline.objects import is_url, path_of, shown

_PREVIEW = ".depthmill"
_PREVIEWS = (f"{_PREVIEW}.png", f"{_PREVIEW}.mp4")


def canonical_uri(uri: str | Path) -> str:
    """One name for one input: a URL without what is secret in it, a path made absolute, links not followed."""
    return shown(str(uri)) if is_url(uri) else os.path.abspath(uri)  # noqa: PTH100 (Path.absolute keeps "..")


def preview_name(source_id: str, suffix: str) -> str:
    """What `depthmill preview` calls the picture or video that it draws of a source: see `is_preview`."""
    return f"{source_id}{_PREVIEW}{suffix}"


def is_preview(name: str) -> bool:
    """Whether a file is a preview by its name: no folder or pattern has it among its inputs; it can be named, though.

    A mark in the name, and not in the folder, which may hold inputs as well; and it goes along when a file is copied.
    """
    return name.lower().endswith(_PREVIEWS)


def readable(name: str) -> str:
    """A file's name as text that can be stored: bytes of it that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unique_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names, all different: of several that are equal, those after the first get `~2`, `~3` … at their end."""
    found: dict[str, None] = {}
    counts: dict[str, int] = {}
    for name in names:
        unique = name
        while unique in found:
            counts[name] = counts.get(name, 1) + 1
            unique = f"{name}~{counts[name]}"
        found[unique] = None
    return tuple(found)


def source_id(uri: str | Path) -> str:
    """The name of a source's group in the store: readable, unique, and the same in every run.

    Args:
        uri: Path of a file or folder, taken as absolute, but links are not followed; or a URL: signing it anew changes
            nothing.

    Returns:
        A slug of the name and 12 hex digits of the absolute path's hash: "my-clip-1a2b3c4d5e6f".
    """
    name = canonical_uri(uri)
    stem = Path(path_of(name) if is_url(name) else name).stem
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower())[:60].strip("-") or "source"
    return f"{slug}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts frame2 before frame10: runs of digits are compared as numbers."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part)
