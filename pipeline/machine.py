"""What a process may use of its machine, and what it does with the memory that it frees."""

from __future__ import annotations

import ctypes
import os
import platform
from math import ceil
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # as a container sees its own
# glibc's <malloc.h>: no trimming, no blocks of their own mappings, one heap for all threads.
_KEEPING = {-1: -1, -4: 0, -8: 1}


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the quota of its container (cgroup v2), if any."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, _QUOTA.read_text().split())
    except (OSError, ValueError):  # there is none, or its quota is "max"
        return count
    return max(1, min(count, ceil(quota / period)))


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for the next frame or batch, which needs the same again.

    glibc gives large blocks back at once, and the kernel clears each page that it hands out anew: a sixth of a worker's
    time on CPUs, a third of what decoding takes. What a process has taken at its highest it then keeps to its end, and
    that is a seventh more; what it has freed before is given back first. Only threads that start afterwards share the
    heap. Without glibc nothing is done.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
        for option, value in _KEEPING.items():
            libc.mallopt(option, value)


def give_back_freed_memory() -> None:
    """Give back what was freed so far, for once: where something was read that left more behind than is used again."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
