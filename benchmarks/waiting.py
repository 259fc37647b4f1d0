"""Time the network's CPU threads by how they wait for each other: as OpenMP does by itself, or asleep.

    python benchmarks/waiting.py [--rounds 5] [--seconds 4] [--quick]

By itself GNU's OpenMP has a thread that is done before the others turn round for a while, in case they are about to be
done: quicker where each has a core to itself, and where others want that core, it is theirs that it takes. Commands
and workers ask for sleep (`OMP_WAIT_POLICY=PASSIVE`, unless the environment says otherwise). Writes waiting.md:
pictures/s of the embedded network, and the ratio, with nothing else to do for the cores; beside as many busy processes
as there are cores; and of two labelers at once, as two workers are.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from unittest.mock import patch

from depthmill.pipeline.bench.timing import Ratio
from depthmill.pipeline.machine import cores

OUT = Path(__file__).resolve().parent / "waiting.md"
SIZE, BATCH = (480, 640), 8
POLICIES = {"as by itself": None, "asleep": "PASSIVE"}
_CONTEXT = multiprocessing.get_context("spawn")


def label(orders: Connection) -> None:
    """In a process of its own: for each order, so many seconds, label and answer how many pictures a second."""
    import numpy as np
    import torch

    from depthmill.pipeline.machine import keep_freed_memory
    from depthmill.pipeline.model.backend import named
    from depthmill.pipeline.model.labeler import Labeler

    torch.set_num_threads(cores())
    keep_freed_memory()
    labeler = Labeler.from_pretrained("demo", batch_size=BATCH, device="cpu")
    frames = list(np.random.default_rng(0).integers(0, 256, (BATCH, *SIZE, 3), np.uint8))
    labeler.label(frames)
    orders.send(f"{named(labeler.device)}, {labeler.dtype}, torch {torch.__version__}")
    while seconds := orders.recv():
        began_s, done = time.perf_counter(), 0
        while time.perf_counter() - began_s < seconds:
            labeler.label(frames)
            done += BATCH
        orders.send(done / (time.perf_counter() - began_s))


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


@contextmanager
def labelers(policy: str | None, count: int) -> Iterator[list[Connection]]:
    """Processes that `label`, with OpenMP told so: it reads its environment when torch is imported."""
    pipes = [_CONTEXT.Pipe() for _ in range(count)]
    processes = [_CONTEXT.Process(target=label, args=(theirs,), daemon=True) for _, theirs in pipes]
    with patch.dict(os.environ):
        os.environ.pop("OMP_WAIT_POLICY", None)
        if policy is not None:
            os.environ["OMP_WAIT_POLICY"] = policy
        for process in processes:
            process.start()
    try:
        yield [ours for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()


def rate(ready: Sequence[Connection], seconds: float) -> float:
    """Pictures a second of all of them together."""
    for one in ready:
        one.send(seconds)
    return sum(one.recv() for one in ready)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="that each alternative has in a round")
    parser.add_argument("--quick", action="store_true", help="short and once: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 0.1) if options.quick else (options.rounds, options.seconds)
    load = os.getloadavg()[0]
    found: dict[str, dict[str, list[float]]] = {}
    with labelers(POLICIES["as by itself"], 2) as left, labelers(POLICIES["asleep"], 2) as right:
        sides = dict(zip(POLICIES, (left, right), strict=True))
        machine, *_ = [one.recv() for ready in sides.values() for one in ready]
        for beside, count, busy in (
            ("nothing", 1, 0),
            (f"{cores()} busy processes", 1, cores()),
            ("a second labeler", 2, 0),
        ):
            others = [_CONTEXT.Process(target=spin, daemon=True) for _ in range(busy)]
            for other in others:
                other.start()
            rates = found[beside] = {policy: [] for policy in POLICIES}
            for _ in range(rounds):
                for policy, ready in sides.items():
                    rates[policy].append(rate(ready[:count], seconds))
            for other in others:
                other.kill()
    rows = []
    for beside, rates in found.items():
        itself, asleep = rates.values()
        times = [b / a for a, b in zip(itself, asleep, strict=True)]
        ratio = Ratio(median(times), min(times), max(times))
        rows.append(f"| {beside} | {median(itself):.1f} | {median(asleep):.1f} | {ratio} |")
    report = f"""# How the network's CPU threads wait for each other

Written by `benchmarks/waiting.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()},
{machine}; load average {load:.1f} when it began.
Batches of {BATCH} pictures of {SIZE[1]}x{SIZE[0]}, depth and normals, the embedded network, in {cores()} threads;
{rounds} rounds in turn of {seconds:g} s each, medians, with the smallest and the largest ratio.

| beside | as OpenMP does by itself, pictures/s | asleep | times |
| --- | ---: | ---: | ---: |
{chr(10).join(rows)}
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


if __name__ == "__main__":
    main()
