"""What this process does with memory that it has freed, where glibc manages it; elsewhere nothing is changed."""

from __future__ import annotations

import ctypes
import platform

# glibc's <malloc.h>
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for the next frame or batch, which needs the same again.

    glibc gives large blocks back at once, and the kernel clears each page that it hands out anew: a sixth of a worker's
    time on CPUs, a third of what decoding takes. What a process has taken at its highest it then keeps to its end, and
    that is a seventh more; what it has freed before is given back first. Only threads that start afterwards share the
    heap.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
        _set({_TRIM_THRESHOLD: -1, _MMAP_MAX: 0, _ARENA_MAX: 1})


def give_back_large_blocks() -> None:
    """Have blocks of 128 KiB and more given back when they are freed, however many there were before.

    glibc raises that limit to the largest block that it has seen freed. Those below it come from the heap, so that what
    stays of a long video's packet table would lie among what was needed for a moment.
    """
    _set({_MMAP_THRESHOLD: 128 * 1024})


def _set(options: dict[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in options.items():
            libc.mallopt(option, value)
