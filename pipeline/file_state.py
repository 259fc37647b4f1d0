"""What a file system says of files without reading them: whether one is as it was, whether there are any."""

from __future__ import annotations

import os
import time

# A file that is written twice within one tick of its disk's clock keeps its times: of 2 s on FAT, of ms elsewhere.
_TICK_NS = 2 * 10**9


def file_state(path: str | os.PathLike[str]) -> str:
    """Size and both times of a file; "" if it was written so lately that it may change again without being seen.

    When its inode changed cannot be set back, as when its contents did can: by copying, unpacking, `touch`.

    Raises:
        OSError: If it is not there.
    """
    found = os.stat(path)  # noqa: PTH116 (names of which there may be millions)
    if max(found.st_mtime_ns, found.st_ctime_ns) >= time.time_ns() - _TICK_NS:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def holds_files(folder: str | os.PathLike[str]) -> bool:
    """Whether there is anything in a folder, and it can be listed: not where a mount is away."""
    try:
        with os.scandir(folder) as entries:
            return any(entries)
    except OSError:
        return False
