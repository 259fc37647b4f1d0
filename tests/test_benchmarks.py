"""Benchmarks that have a short form run, from end to end; what they measure is not looked at."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = sorted(
    str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py") if '"--quick"' in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_short_form_ends_and_writes_nothing(name):
    before = {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("*")}
    done = subprocess.run([sys.executable, BENCHMARKS / name, "--quick"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("*")} == before
