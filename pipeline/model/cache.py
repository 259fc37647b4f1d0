"""What is kept for this user's later runs on this machine: it saves time, and nothing depends on it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from depthmill.pipeline.store import write_atomically

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where it is.

    Raises:
        RuntimeError: If this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthmill"


def kept(name: str | Path) -> Any:
    """The JSON kept under a name, a path in the cache or an absolute one; None if there is none that can be read."""
    try:
        return json.loads((cache_directory() / name).read_bytes())
    except (OSError, ValueError, RuntimeError):
        return None


def keep(name: str | Path, what: object) -> None:
    """Keep JSON under a name, if that can be done."""
    try:
        write_atomically(cache_directory() / name, json.dumps(what).encode())
    except (OSError, RuntimeError) as error:
        log.debug("%s cannot be kept: %s", name, error)
