"""Measure whether the network ever waits for its frames, on a machine with nothing else to do.

    python benchmarks/feed.py [--heights 240 480] [--rates 25 100 400] [--quick]

Three parts, on the demo's clip, scaled and repeated. (1) What a frame costs a core in each part of the way, and so how
many cores feed a device of a given pace. (2) A whole run, decoding to commit, with a stand-in for the device that takes
exactly its time for a batch and no core: its frames a second beside the device's own. (3) The way without a model,
beside a bare PyAV decoding loop with as many threads, one and one a core. Writes feed.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import av
import cv2
import torch
from av.video.reformatter import VideoReformatter

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.machine import cores, keep_freed_memory
from depthmill.pipeline.model.backend import cpu_kind
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.model.transfer import pack_depth, pack_normals
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.sources.video import VideoSource
from depthmill.pipeline.sources.video_pixels import to_rgb
from depthmill.pipeline.store import Layout, create
from depthmill.pipeline.types import Labels
from depthmill.pipeline.worker import Worker

OUT = Path(__file__).resolve().parent / "feed.md"
CLIP = Path(__file__).parent.parent / "demo/pedestrians.mp4"


class Device:
    """A labeler that answers with the same labels again and again, each batch `1 / rate` seconds a frame later."""

    def __init__(self, labels: Labels, rate: float):
        self.labels, self.rate, self.batch_size = labels, rate, 8
        self.free_s = 0.0

    def rounds(self, source: object) -> bool:
        return False

    def batch_shape(self, height: int, width: int, *, rounded: bool = False) -> tuple[int, int]:
        return height, width

    def submit(self, frames: list, keys: object, *, rounded: bool, packing: str) -> Answer:
        took_s = len(frames) / self.rate
        self.free_s = max(self.free_s, time.perf_counter()) + took_s
        return Answer([self.labels] * len(frames), self.free_s, took_s)


class Answer:
    def __init__(self, labels: list, when_s: float, seconds: float):
        self.labels, self.when_s, self.seconds = labels, when_s, seconds

    def result(self) -> list:
        time.sleep(max(0.0, self.when_s - time.perf_counter()))
        return self.labels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1536)
    parser.add_argument("--heights", type=int, nargs="+", default=[240, 480])
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 100, 400])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a run of part 2, about")
    parser.add_argument("--quick", action="store_true", help="small and once: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if options.quick:
        options.heights, options.rates, options.frames, options.rounds = [96], [400.0], 256, 1
    load = os.getloadavg()[0]
    keep_freed_memory()  # as a worker does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {height: make_input(folder, height, options.frames) for height in options.heights}
        spent = {height: costs(*inputs[height], folder) for height in inputs}
        shares = {
            (height, rate): busy_shares(*inputs[height], rate, options) for height in inputs for rate in options.rates
        }
        ways = {
            (height, threads): path_ratios(*inputs[height], threads, options) for height in inputs for threads in (1, 0)
        }
    paces = " | ".join(f"{rate:.0f}/s" for rate in options.rates)
    cost_rows = [
        f"| {_size(inputs[height])} | {decode * 1e3:.2f} | {pack * 1e3:.2f} | {write * 1e3:.2f} | "
        + " | ".join(f"{rate * (decode + write):.1f}" for rate in options.rates)
        + " |"
        for height, (decode, pack, write) in spent.items()
    ]
    busy_rows = [
        f"| {_size(inputs[height])} | {rate:.0f} | {rate * sum(spent[height][::2]) / cores():.0%} | "
        f"{' | '.join(map(_spread, found))} |"
        for (height, rate), found in shares.items()
    ]
    path_rows = [
        f"| {_size(inputs[height])} | {threads or cores()} | {' | '.join(map(_spread, found[:3]))} | "
        f"{' | '.join(f'{median(needed):.1f}' for needed in found[3:])} |"
        for (height, threads), found in ways.items()
    ]
    report = f"""# The feed

Written by `benchmarks/feed.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()}
({cpu_kind()}), Python {platform.python_version()}, PyAV {av.__version__}; load average {load:.1f} when it began and
{os.getloadavg()[0]:.1f} when it ended: what else ran took cores from it. The demo's clip,
scaled, in H.264 (veryfast, crf 23), 4:2:0; depth and normals as the embedded checkpoint predicts them. Medians of
{options.rounds} runs in turn, with the smallest and the largest.

## Cores that a device needs

Milliseconds of one core for a frame, and the cores that a device of a given pace keeps busy with decoding (to RGB) and
with compressing and writing. A GPU packs labels itself; where the CPU is the device, packing is to be added.

| frame | decode | pack | compress, write | {paces} |
| --- | {"---: | " * (3 + len(options.rates))}
{chr(10).join(cost_rows)}

## A whole run, beside its device

Frames a second of a run, over those of a stand-in for the device, which takes exactly its time for a batch of eight and
no core. Where the cores of this machine are needed to more than 100 %, they set the pace. *One at a time* is without
the next segment's being read and labelled while one is committed.

| frame | device, frames/s | cores needed | ratio | one segment at a time |
| --- | ---: | ---: | --- | --- |
{chr(10).join(busy_rows)}

## Without a model

Frames a second from decoding to commit, labels given, over those of a bare PyAV loop that decodes with as many threads:
one that converts to RGB as PyAV does by default, repeating chroma, and one that converts as exactly as depthmill does;
and over what the cores could do at most if they did nothing else, going by what the run itself took of them. The last
two columns are computed: what the run took of a core for a frame, over the time in which either loop does 0.8 frames.

| frame | threads | default conversion | exact conversion | cores' limit | cores for 0.8 of default | of exact |
| --- | ---: | --- | --- | --- | ---: | ---: |
{chr(10).join(path_rows)}
"""
    if options.quick:
        print(report)
    else:
        options.out.write_text(report)


def busy_shares(path: Path, labels: Labels, rate: float, options: argparse.Namespace) -> list[list[float]]:
    """Of some rounds: frames a second over the device's, the next segment begun ahead, and one at a time."""
    frames = min(options.frames, int(rate * options.seconds))
    rows = [
        [1 / rate / run(path, labels, rate, frames, ahead=ahead)[0] for ahead in (True, False)]
        for _ in range(options.rounds)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def path_ratios(path: Path, labels: Labels, threads: int, options: argparse.Namespace) -> list[list[float]]:
    """Of some rounds without a model, decoding with some threads, 0 for one a core.

    Returns:
        Frames a second over those of the bare loop, default and exact, and over the cores' limit; and the cores that
        0.8 of either loop would take.
    """
    rows = []
    frames = min(options.frames, 512)
    for _ in range(options.rounds):
        bare = [bare_decode(path, frames, threads, exact=exact) for exact in (False, True)]
        ours, core = run(path, labels, 1e9, frames, threads=threads)
        rows.append([*(one / ours for one in bare), core / cores() / ours, *(core / one * 0.8 for one in bare)])
    return [list(column) for column in zip(*rows, strict=True)]


def _size(made: tuple[Path, Labels]) -> str:
    depth = made[1].depth
    assert depth is not None
    return f"{depth.shape[2]}x{depth.shape[1]}"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def make_input(folder: Path, height: int, frames: int) -> tuple[Path, Labels]:
    """The clip at another size, as often as it takes; and packed labels of its first frame."""
    with av.open(str(CLIP)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    width = round(pictures[0].shape[1] * height / pictures[0].shape[0] / 16) * 16
    pictures = [cv2.resize(picture, (width, height)) for picture in pictures]
    path = folder / f"{height}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            back = number // len(pictures) % 2  # to and fro: no cut
            at = number % len(pictures)
            picture = pictures[len(pictures) - 1 - at if back else at]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    [labels] = Labeler.from_pretrained(device="cpu", batch_size=1).label(pictures[:1], packing="int8")
    return path, labels


def spent_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def costs(path: Path, labels: Labels, folder: Path, frames: int = 256) -> tuple[float, float, float]:
    """CPU seconds of a frame: decoded, packed, and compressed and written."""
    source = open_source(str(path))
    frames = min(frames, source.probe().frames)
    began = spent_s()
    for _ in source.read(0, frames):
        pass
    decode = (spent_s() - began) / frames
    depth, normals = (torch.from_numpy(one).float() for one in (labels.depth / 5120, labels.normals / 127))
    began = spent_s()
    for _ in range(64):
        pack_depth(depth)
        pack_normals(normals, "int8")
    pack = (spent_s() - began) / 64
    with tempfile.TemporaryDirectory(dir=folder) as into:
        store = create(Path(into) / "labels.zarr", Layout(), {})
        store.add(source.probe())
        began = spent_s()
        segments = store.segments(source.probe().id)[: max(1, frames // 64)]
        for segment in segments:
            writer = store.writer(segment)
            for index in range(segment.start, segment.stop):
                writer.put(index, labels.depth[0], labels.normals[0])
            writer.commit()
        write = (spent_s() - began) / sum(segment.frames for segment in segments)
    source.close()
    return decode, pack, write


def run(
    path: Path, labels: Labels, rate: float, frames: int, *, ahead: bool = True, threads: int = 0
) -> tuple[float, float]:
    """What a run took of a frame, beside a device of a given pace: seconds, and seconds of a core."""
    with tempfile.TemporaryDirectory() as into:
        source = VideoSource(path, max_pixels=1 << 27, max_frames=1_000_000, threads=threads)
        probed = source.probe()
        store = create(Path(into) / "labels.zarr", Layout(), {})
        store.add(probed)
        worker = Worker(LabelConfig(device="cpu"), store.uri, ())
        worker._labeler, worker._store = Device(labels, rate), store
        worker._sources._sources[str(path)] = source
        tasks = [Task(str(path), probed.fingerprint, segment) for segment in store.segments(probed.id)]
        tasks = tasks[: max(4, frames // 64)]
        marks = []
        for task, following in zip(tasks, [*tasks[1:], None], strict=True):
            worker.label(task, following if ahead else None)
            marks.append((time.perf_counter(), spent_s()))
        worker.close()
        done = sum(task.frames for task in tasks[1:-1])  # from commit to commit, start and end aside
        took_s, core_s = ((last - first) / done for first, last in zip(marks[0], marks[-2], strict=True))
        return took_s, core_s


def bare_decode(path: Path, frames: int, threads: int, *, exact: bool) -> float:
    """Seconds for a frame, decoded to RGB and thrown away; by so many threads, 0 for one a core."""
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO"
        height, width = stream.codec_context.height, stream.codec_context.width
        began = time.perf_counter()
        for number, frame in enumerate(container.decode(video=0), 1):
            if exact:
                to_rgb(frame, reformatter, codec="h264", height=height, width=width, threads=threads)
            else:
                frame.to_ndarray(format="rgb24")
            if number == frames:
                break
        return (time.perf_counter() - began) / number


if __name__ == "__main__":
    main()
