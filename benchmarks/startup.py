"""Measure how long the command line takes before it does anything: help, the first label, the rerun of a finished job.

    python benchmarks/startup.py [--rounds 5] [--quick]

Each is a process of its own, `depthmill` as a user starts it, on one picture with the embedded checkpoint. Writes
startup.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from depthmill.pipeline.bench.timing import Spent
from depthmill.pipeline.model.backend import cores

OUT = Path(__file__).resolve().parent / "startup.md"
DEPTHMILL = [sys.executable, "-c", "from depthmill.cli import main; main()"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        spent = measure(Path(folder), 1 if options.quick else options.rounds)
    bare = spent["bare"]
    rows = [
        f"| {what} | {_seconds(spent[name], 'wall_s')} | {_seconds(spent[name], 'cpu_s')} | {goal} |"
        for name, what, goal in (
            ("bare", "`python -c pass`", ""),
            ("torch", "`import torch`", ""),
            ("help", "`depthmill --help`", "< 0.5 s"),
            ("label", "first committed label", ""),
            ("rerun", "rerun of a finished job", "< 0.5 s wanted, < 3 s required"),
        )
    ]
    report = f"""# Start-up

Written by `benchmarks/startup.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()}, Python
{platform.python_version()}, torch {torch.__version__}; load average {load:.1f} when it began. Processes in turn,
{len(bare)} rounds after one that warms the disk's cache; medians, with the smallest and the largest. *CPU* is the
process's own, user and system: what it would take on an idle core.

| from the start of the process to | wall, s | CPU, s | goal |
| --- | ---: | ---: | --- |
{chr(10).join(rows)}

The label is one picture's depth and normals, with the embedded checkpoint and `--workers 0`; its wall time ends when
the commit is on disk, its CPU time with the process. A rerun opens the inputs, hashes the checkpoints, and reads what
is committed.
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


def measure(folder: Path, rounds: int) -> dict[str, list[Spent]]:
    """Name -> time of each round."""
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(picture)
    store, done = folder / "new.zarr", folder / "done.zarr"
    label = [*DEPTHMILL, "label", str(picture)]
    options = ["--workers", "0"]

    def committed() -> bool:
        return any(store.glob("*/status/c/0"))

    def first_label() -> Spent:
        shutil.rmtree(store, ignore_errors=True)
        return spend([*label, str(store), *options], committed)

    ways: dict[str, Callable[[], Spent]] = {
        "bare": lambda: spend([sys.executable, "-c", "pass"]),
        "torch": lambda: spend([sys.executable, "-c", "import torch"]),
        "help": lambda: spend([*DEPTHMILL, "--help"]),
        "label": first_label,
        "rerun": lambda: spend([*label, str(done), *options]),
    }
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            one = way()
            if turn:
                spent[name].append(one)
    return spent


def spend(command: Sequence[str], reached: Callable[[], bool] | None = None) -> Spent:
    """Run a process to its end; the wall time may end before, when something is reached."""
    started = time.perf_counter()
    process = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    wall_s = None
    while reached is not None and wall_s is None:
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if reached() or ended:
            wall_s = time.perf_counter() - started
        time.sleep(0.01)
    _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return Spent(wall_s or time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def _seconds(spent: Sequence[Spent], clock: str) -> str:
    values = [getattr(one, clock) for one in spent]
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
