"""A run's folder: its `config.json`, and words for a disk that is full."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthmill.pipeline.errors import RunStoppedError, TrainingError
from depthmill.pipeline.store import write_atomically
from depthmill.pipeline.store.files import FULL

_CONFIG = "config.json"
_NO_ROOM = 1 << 20  # bytes


def write_config(folder: Path, document: Mapping[str, Any]) -> None:
    """Record what a run was told."""
    write_atomically(folder / _CONFIG, (json.dumps(document, indent=2) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """What the run in a folder was told.

    Raises:
        TrainingError: If that cannot be read.
    """
    path = folder / _CONFIG
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); expected the configuration of the run whose states are beside it: put "
            "it back, or start over with --overwrite"
        ) from error
    return document


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Say in a line that something could not be written because the disk is full.

    Raises:
        RunStoppedError: If it is.
    """
    try:
        yield
    except Exception as error:
        # Safetensors gives the number in words alone; torch gives none, but has filled the disk by then.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        filled = isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < _NO_ROOM
        if number not in FULL and not filled:
            raise
        where = getattr(error, "filename", None) or folder
        raise RunStoppedError(
            f"{where} cannot be written: the disk is full, or what may be used of it; make room and run again: what is "
            "saved stays"
        ) from error
