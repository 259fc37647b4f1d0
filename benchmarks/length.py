"""Measure whether a long video takes more memory than a short one, and whether labelling slows down on the way.

    python benchmarks/length.py [--frames 100000] [--quick]

Labels tiny frames with a tiny network of random weights, each run a process of its own (`depthmill label`), a hundredth
of the frames, a tenth and all of them. Writes length.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import psutil

from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.backend import cores

OUT = Path(__file__).resolve().parent / "length.md"
DEPTHMILL = [sys.executable, "-c", "from depthmill.cli import main; main()", "label"]
OPTIONS = ["--workers", "0", "--threads", "1", "--device", "cpu", "--batch-size", "32", "--labels", "depth"]
SIDE = 32
SEGMENT = 64


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Attributes:
        peak_bytes: Most that its process had in memory.
        frames: Numbers of the frames up to which segments were committed, in order.
        wall_s: When each of these commits was made.
        cpu_s: The processor time that the process had taken by then.
    """

    peak_bytes: int
    frames: np.ndarray
    wall_s: np.ndarray
    cpu_s: np.ndarray

    def rate(self, clock: np.ndarray, near: int) -> float:
        """Frames a second of a clock: the median over steps of a few segments in the tenth of the video at a frame."""
        last = self.frames[-1]
        low = min(max(SEGMENT, near - last // 20), last - last // 10)
        part = np.flatnonzero((self.frames >= low) & (self.frames <= low + last // 10))[:: step(last)]
        return float(np.median(np.diff(self.frames[part]) / np.diff(clock[part])))


def step(frames: int) -> int:
    """Segments in one measurement of the rate: a tenth of the video has ten of them, if it is long."""
    return max(1, frames // (100 * SEGMENT))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="few frames: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    frames = 40 * SEGMENT if options.quick else options.frames
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture = scratch.Architecture(
            vae_channels=(4, 4, 4), vae_attention=False, unet_channels=(8, 8), head_channels=4, norm_groups=4
        )
        scratch.create(folder / "tiny", architecture, "depth", seed=0, processing_resolution=SIDE // 2)
        runs = {count: run(folder, count) for count in (frames // 100, frames // 10, frames)}
    long = runs[frames]
    early, late = min(1000, frames // 10), frames
    rates = {
        "wall": [long.rate(long.wall_s, near) for near in (early, late)],
        "CPU": [long.rate(long.cpu_s, near) for near in (early, late)],
    }
    peaks = [(count, one.peak_bytes) for count, one in runs.items()]
    grown = (peaks[-1][1] - peaks[-2][1]) / (peaks[-1][0] - peaks[-2][0])
    rows = [
        f"| peak memory, MiB | {first / 2**20:,.1f} for {short:,} frames | {last / 2**20:,.1f} for {count:,} frames | "
        f"{last / first:.3f} | <= 1.02 |"
        for (short, first), (count, last) in pairwise(peaks)
    ] + [
        f"| frames a second of {clock} time | {first:,.0f} at frame {early:,} | {last:,.0f} at frame {late:,} | "
        f"{last / first:.3f} | 0.95 to 1.05 |"
        for clock, (first, last) in rates.items()
    ]
    report = f"""# Long videos

Written by `benchmarks/length.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()}, Python
{platform.python_version()}; load average {load:.1f} when it began. Depth of {SIDE}x{SIDE} frames of one H.264 video,
with a network of random weights so small that all else sets the pace; each run a process of its own, labelling in it.
Rates are medians over steps of {step(frames) * SEGMENT:,} frames, in the tenth of the video that is nearest. CPU time
is that of the process, all threads: other work on the machine does not slow it down as much.

| | short or early | long or late | ratio | goal |
| --- | ---: | ---: | ---: | --- |
{chr(10).join(rows)}

What grows with a video is its table of packets and libav's own index of the file, about 100 bytes a frame together in
each process that has it open, and what reading them leaves in the heap: {grown:,.0f} bytes a frame here, where
one process probes and labels.
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


def run(folder: Path, frames: int) -> Run:
    """Make a video of so many frames, and label it."""
    video, store = folder / f"{frames}.mp4", folder / f"{frames}.zarr"
    write_video(video, frames)
    command = [*DEPTHMILL, str(video), str(store), "--checkpoint", str(folder / "tiny"), *OPTIONS]
    process = os.posix_spawn(
        command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    samples: list[tuple[float, float]] = []
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=(psutil.Process(process), samples, ended))
    sampler.start()
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    ended.set()
    sampler.join()
    _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    commits = sorted((int(path.name), path.stat().st_mtime) for path in store.glob("*/status/c/*"))
    wall_s = np.array([when for _, when in commits])
    clock, cpu = (np.array(column) for column in zip(*samples, strict=True))
    shutil.rmtree(store)
    return Run(
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        frames=np.array([(number + 1) * SEGMENT for number, _ in commits]),
        wall_s=wall_s,
        cpu_s=np.interp(wall_s, clock, cpu),
    )


def _sample(process: psutil.Process, samples: list[tuple[float, float]], ended: threading.Event) -> None:
    while not ended.wait(0.1):
        try:
            used = process.cpu_times()
        except psutil.Error:
            return
        samples.append((time.time(), used.user + used.system))


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
