"""What is done with memory that was freed."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what it is about")


def test_freed_memory_is_kept():
    """What was freed is there again without a page fault: the kernel counts one for every 4096 bytes of new memory."""
    script = """
import resource, torch
from depthmill.pipeline.heap import keep_freed_memory
keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 * 2**20, dtype=torch.uint8).zero_()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    # In a process of its own, as workers have: what tests before it left in this one's memory is in the way.
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert min(map(int, printed.split())) < 2**20 / 4096, "glibc's own way faults 64 times as often"


def test_large_blocks_are_given_back_whatever_was_freed_before():
    script = """
import sys
import numpy as np
from depthmill.pipeline.heap import give_back_large_blocks

def pages():
    return int(open("/proc/self/statm").read().split()[1])

if "give" in sys.argv:
    give_back_large_blocks()
del_me = np.ones(2**24, np.uint8)  # from now on glibc takes blocks of that size from the heap
del del_me
before = pages()
columns = [np.ones(2**20, np.uint8) for _ in range(16)]
del columns[:-1]  # what stays lies above
print((pages() - before) * 4096)
"""
    kept, given = (
        int(subprocess.run([sys.executable, "-c", script, way], capture_output=True, text=True, check=True).stdout)
        for way in ("keep", "give")
    )
    assert given < 2 * 2**20 < 8 * 2**20 < kept
