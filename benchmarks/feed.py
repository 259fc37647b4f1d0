"""Does the network ever wait? `python benchmarks/feed.py`, on a machine with nothing else to do.

Three parts, on the demo's clip, scaled and repeated. (1) What a frame costs a core in each part of the way, and so how
many cores feed a device of a given pace. (2) A whole run, decoding to commit, with a stand-in for the device that takes
exactly its time for a batch and no core: its frames a second beside the device's own. (3) The way without a model,
beside a bare PyAV decoding loop with as many threads.
"""

import argparse
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store import Layout, create
from depthmill.pipeline.store.layout import pack_depth, pack_normals
from depthmill.pipeline.types import Labels
from depthmill.pipeline.worker import Worker

CLIP = Path(__file__).parent.parent / "demo/pedestrians.mp4"


class Device:
    """A labeler that answers with the same labels again and again, each batch `1 / rate` seconds a frame later."""

    def __init__(self, labels: Labels, rate: float, batch_size: int = 8):
        self.labels, self.rate, self.batch_size = labels, rate, batch_size
        self.free_s = 0.0

    def rounds(self, source: object) -> bool:
        return False

    def batch_shape(self, height: int, width: int, *, rounded: bool = False) -> tuple[int, int]:
        return height, width

    def submit(self, frames: list, keys: object, *, rounded: bool, packing: str) -> "Answer":
        took_s = len(frames) / self.rate
        self.free_s = max(self.free_s, time.perf_counter()) + took_s
        return Answer([self.labels] * len(frames), self.free_s, took_s)


class Answer:
    def __init__(self, labels: list, when_s: float, seconds: float):
        self.labels, self.when_s, self.seconds = labels, when_s, seconds

    def result(self) -> list:
        time.sleep(max(0.0, self.when_s - time.perf_counter()))
        return self.labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1536)
    parser.add_argument("--heights", type=int, nargs="+", default=[240, 480, 1080])
    parser.add_argument("--rates", type=float, nargs="+", default=[25, 100, 400])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a run of part 2, about")
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("milliseconds of one core for a frame, and the cores that a device of a given pace needs\n")
    print(
        "| frame | decode | pack on the CPU | compress and write | "
        + " | ".join(f"{r:.0f}/s" for r in options.rates)
        + " |"
    )
    print("| --- |" + " ---: |" * (3 + len(options.rates)))
    with tempfile.TemporaryDirectory() as folder:
        inputs = {height: make_input(Path(folder), height, options.frames) for height in options.heights}
        for path, labels in inputs.values():
            decode, pack, write = costs(path, labels, Path(folder))
            cores = " | ".join(f"{rate * (decode + write):.1f}" for rate in options.rates)
            size = "x".join(map(str, labels.depth.shape[:0:-1]))
            print(f"| {size} | {decode * 1e3:.2f} | {pack * 1e3:.2f} | {write * 1e3:.2f} | {cores} |", flush=True)
        print("\nframes a second of a whole run over the device's own; `alone`: one segment at a time\n")
        print("| frame | device, frames/s | ahead | alone |\n| --- | ---: | ---: | ---: |")
        for height, (path, labels) in inputs.items():
            for rate in options.rates:
                frames = min(options.frames, int(rate * options.seconds))
                shares = {True: [], False: []}
                for _ in range(options.rounds):
                    for ahead, found in shares.items():
                        found.append(run(path, labels, rate, frames, ahead))
                best, alone = (
                    f"{np.median(found):.3f} ({min(found):.3f} to {max(found):.3f})" for found in shares.values()
                )
                print(f"| {height} rows | {rate:.0f} | {best} | {alone} |", flush=True)
        print("\nwithout a model: decoding to commit over a bare decoding loop\n")
        print("| frame | ratio |\n| --- | ---: |")
        for height, (path, labels) in inputs.items():
            found = []
            for _ in range(options.rounds):
                frames = min(options.frames, 512)
                bare = bare_decode(path, frames)
                found.append(run(path, labels, 1e9, frames, True, seconds=True))
                found[-1] = bare / found[-1]
            print(f"| {height} rows | {np.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |", flush=True)


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
    found = Labeler.from_pretrained(device="cpu", batch_size=1)(pictures[0][None])
    return path, Labels(pack_depth(found.depth[0])[None], pack_normals(found.normals[0], "int8")[None])


def spent_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def costs(path: Path, labels: Labels, folder: Path, frames: int = 256) -> tuple[float, float, float]:
    """CPU seconds of a frame: decoded, packed, and compressed and written."""
    source = open_source(str(path))
    began = spent_s()
    for _ in source.read(0, frames):
        pass
    decode = (spent_s() - began) / frames
    depth = labels.depth[0].astype(np.float32) / 5120
    normals = labels.normals[0].astype(np.float32) / 127
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


def run(path: Path, labels: Labels, rate: float, frames: int, ahead: bool, *, seconds: bool = False) -> float:
    """Share of a run's time that the device works, start-up aside; or the run's seconds."""
    with tempfile.TemporaryDirectory() as into:
        source = open_source(str(path))
        probed = source.probe()
        source.close()
        store = create(Path(into) / "labels.zarr", Layout(), {})
        store.add(probed)
        worker = Worker(LabelConfig(device="cpu"), store.uri, ())
        worker._labeler, worker._store = Device(labels, rate), store
        tasks = [Task(str(path), probed.fingerprint, segment) for segment in store.segments(probed.id)]
        tasks = tasks[: max(4, frames // 64)]
        ends = []
        for task, following in zip(tasks, [*tasks[1:], None], strict=True):
            worker.label(task, following if ahead else None)
            ends.append(time.perf_counter())
        worker.close()
        a_segment_s = (ends[-2] - ends[0]) / (len(ends) - 2)  # from commit to commit, start and end aside
        return a_segment_s if seconds else 64 / rate / a_segment_s


def bare_decode(path: Path, frames: int) -> float:
    """Seconds for a segment of 64 frames, decoded to RGB by PyAV and thrown away."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        began = time.perf_counter()
        for number, frame in enumerate(container.decode(video=0), 1):
            frame.to_ndarray(format="rgb24")
            if number == frames:
                break
        return (time.perf_counter() - began) / number * 64


if __name__ == "__main__":
    main()
