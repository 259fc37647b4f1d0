"""Measure whether a long video takes more memory than a short one, and whether labelling slows down on the way.

    python benchmarks/length.py [--frames 100000] [--quick]

Labels tiny frames with a tiny network of random weights, each run a process of its own (`depthmill label`): a hundredth
of the frames, a tenth and all of them, for their memory; then the longest video twice, one run near its beginning and
one near its end, in turn, for their rates. Writes length.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import psutil

from depthmill.pipeline.bench.timing import Spent
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model import scratch

OUT = Path(__file__).resolve().parent / "length.md"
DEPTHMILL = [sys.executable, "-c", "from depthmill.__main__ import main; main()", "label"]
OPTIONS = ["--workers", "0", "--threads", "1", "--device", "cpu", "--batch-size", "32", "--labels", "depth"]
SIDE = 32
SEGMENT = 64


@dataclass(frozen=True)
class Rate:
    """How quick a run was in its turns.

    Attributes:
        first: Frame at which the first turn began.
        frames: Committed in all turns.
        spent: In all of them.
    """

    first: int
    frames: int
    spent: Spent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=8, help="of each of the two runs")
    parser.add_argument("--quick", action="store_true", help="few frames: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    frames = 80 * SEGMENT if options.quick else options.frames
    turns, turn_s = (1, 0.5) if options.quick else (options.turns, 2.0)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture = scratch.Architecture(
            vae_channels=(4, 4, 4), vae_attention=False, unet_channels=(8, 8), head_channels=4, norm_groups=4
        )
        scratch.create(folder / "tiny", architecture, "depth", seed=0, processing_resolution=SIDE // 2)
        peaks = [(count, peak_bytes(folder, count)) for count in (frames // 100, frames // 10, frames)]
        early, late = rates(folder / f"{frames}.mp4", (frames // 100, frames * 6 // 7), turns, turn_s)
    grown = (peaks[-1][1] - peaks[-2][1]) / (peaks[-1][0] - peaks[-2][0])
    rows = [
        f"| peak memory, MiB | {first / 2**20:,.1f} for {short:,} frames | {last / 2**20:,.1f} for {count:,} frames | "
        f"{last / first:.3f} | <= 1.02 |"
        for (short, first), (count, last) in pairwise(peaks)
    ]
    for clock, seconds in (("wall", "wall_s"), ("CPU", "cpu_s")):
        first, last = (one.frames / getattr(one.spent, seconds) for one in (early, late))
        rows.append(
            f"| frames a second of {clock} time | {first:,.0f} from frame {early.first:,} on | {last:,.0f} from frame "
            f"{late.first:,} on | {last / first:.3f} | 0.95 to 1.05 |"
        )
    report = f"""# Long videos

Written by `benchmarks/length.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()}, Python
{platform.python_version()}; load average {load:.1f} when it began. Depth of {SIDE}x{SIDE} frames of one H.264 video,
with a network of random weights so small that all else sets the pace; each run a process of its own, labelling in it.
Rates are those of two runs over the longest video that are stopped and continued, so that they have {turns} turns of
{turn_s:g} s each, one after the other: the pace of the machine is the same for both. CPU time is that of the process,
all threads.

| | short or early | long or late | ratio | goal |
| --- | ---: | ---: | ---: | --- |
{chr(10).join(rows)}

What grows with a video is its table of packets and libav's own index of the file, in each process that has it open,
and what reading them leaves in the heap: {grown:,.0f} bytes a frame here, where
one process probes and labels.
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


def peak_bytes(folder: Path, frames: int) -> int:
    """The most memory that it takes to label a video of so many frames, which is made and stays."""
    video, store = folder / f"{frames}.mp4", folder / "peak.zarr"
    write_video(video, frames)
    _, status, usage = os.wait4(start(video, store).pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"labelling {frames} frames ended with {os.waitstatus_to_exitcode(status)}")
    shutil.rmtree(store)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rates(video: Path, after: Sequence[int], turns: int, turn_s: float) -> list[Rate]:
    """The rates of as many runs over one video, each from a number of frames on, in turn."""
    stores = [video.with_name(f"{number}.zarr") for number in range(len(after))]
    runs = []
    for store, first in zip(stores, after, strict=True):
        runs.append(start(video, store))
        while committed(store) < first:
            time.sleep(0.1)
        runs[-1].suspend()
    begun = [committed(store) for store in stores]
    wall_s, cpu_s = [0.0] * len(runs), [0.0] * len(runs)
    for _ in range(turns):
        for number, run in enumerate(runs):
            since_s, used = time.perf_counter(), run.cpu_times()
            run.resume()
            time.sleep(turn_s)
            run.suspend()
            now = run.cpu_times()
            wall_s[number] += time.perf_counter() - since_s
            cpu_s[number] += now.user + now.system - used.user - used.system
            if run.poll() is not None:
                raise SystemExit(f"the run from frame {begun[number]} on ended within its turns: give more --frames")
    done = [committed(store) for store in stores]
    for run in runs:
        run.send_signal(signal.SIGKILL)
        run.wait()
    return [
        Rate(first, last - first, Spent(*spent)) for first, last, *spent in zip(begun, done, wall_s, cpu_s, strict=True)
    ]


def start(video: Path, store: Path) -> psutil.Popen:
    """Start to label a video with the tiny network that is beside it."""
    command = [*DEPTHMILL, str(video), str(store), "--checkpoint", str(video.with_name("tiny")), *OPTIONS]
    return psutil.Popen(command, stdout=subprocess.DEVNULL)


def committed(store: Path) -> int:
    """How many frames are."""
    return SEGMENT * len(list(store.glob("*/status/c/*")))


def write_video(path: Path, frames: int) -> None:
    """A wandering gradient with noise, H.264, a keyframe every 50 frames."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 64, (50, SIDE, SIDE, 3), np.uint8)
    ramp = np.arange(SIDE, dtype=np.uint8)[:, None, None] * 4
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "50"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = noise[number % 50] + np.roll(ramp, number // 7, axis=0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
