import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what it is about")
def test_freed_memory_is_kept():
    """What was freed is there again without a page fault: the kernel counts one for every 4096 bytes of new memory."""
    script = """
import resource, torch
from depthmill.pipeline.memory import keep_freed_memory
keep_freed_memory()
for _ in range(12):  # glibc first keeps seven slivers, left by aligning blocks, between those
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 * 2**20, dtype=torch.uint8).zero_()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    # In a process of its own, as workers have: what tests before it left in this one's memory is in the way.
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert max(map(int, printed.split()[-3:])) < 2**20 / 4096, "glibc's own way faults 64 times as often"
