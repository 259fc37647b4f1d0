"""Words for a disk that is full, or away."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.store.files import FULL

_NO_ROOM = 1 << 20  # bytes


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Say in a line that something could not be written because the disk is full, or the folder no longer usable.

    Raises:
        RunStoppedError: If so.
    """
    try:
        yield
    except Exception as error:
        # Safetensors gives the number in words alone; torch gives none, but has filled the disk by then.
        told = re.search(r"\(os error (\d+)\)", str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        filled = isinstance(error, RuntimeError) and folder.exists() and shutil.disk_usage(folder).free < _NO_ROOM
        if number not in FULL and not filled:
            if number is not None and f"{folder}{os.sep}" in str(error):
                raise RunStoppedError(
                    f"{folder} can no longer be used ({error}); expected it as it was, on a mount that is there, and "
                    "no other run in it: see to that, and run again to go on from what is saved in it"
                ) from error
            raise
        where = getattr(error, "filename", None) or folder
        raise RunStoppedError(
            f"{where} cannot be written: the disk is full, or what may be used of it; make room and run again: what is "
            "saved stays"
        ) from error
