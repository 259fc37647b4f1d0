import platform
import subprocess
import sys

import pytest

from depthmill.pipeline import machine


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what it is about")
def test_freed_memory_is_kept():
    """What was freed is there again without a page fault: the kernel counts one for every 4096 bytes of new memory."""
    script = """
import resource, torch
from depthmill.pipeline.machine import keep_freed_memory
keep_freed_memory()
for _ in range(30):  # glibc first keeps slivers, left by aligning blocks, between those: 5 to 9 were seen
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 * 2**20, dtype=torch.uint8).zero_()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    # In a process of its own, as workers have: what tests before it left in this one's memory is in the way.
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert max(map(int, printed.split()[-3:])) < 2**20 / 4096, "glibc's own way faults 64 times as often"


@pytest.mark.parametrize(("quota", "left"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), (None, 8)])
def test_a_container_s_quota_counts(monkeypatch, tmp_path, quota, left):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert machine.cores() == left
