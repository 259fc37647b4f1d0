"""Measure how long the command line takes before it does anything, and what a rerun takes for each input.

    python benchmarks/startup.py [--rounds 5] [--quick]

Help, the first label, the rerun of a finished job: each is a process of its own, `depthmill` as a user starts it, on
one picture with the embedded checkpoint. Then, in this process, a checkpoint is opened, and inputs are probed of which
nothing is left to do: read, and known by what is kept of them. Writes startup.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from PIL import Image

from depthmill.pipeline import store as stores
from depthmill.pipeline.bench.timing import Spent, interleave, ratio, typical
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.plan import Planned, Prober
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store import records
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS

# Weights of each part.
STABLE_DIFFUSION_2 = {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}

OUT = Path(__file__).resolve().parent / "startup.md"
DEPTHMILL = [sys.executable, "-c", "from depthmill.__main__ import main; main()"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # where it is installed, byte code is there
        rounds = 1 if options.quick else options.rounds
        spent = measure(Path(folder), rounds)
        known = [open_weights(Path(folder), rounds, 1000 if options.quick else 1)]
        known += probe(Path(folder), rounds, 2 if options.quick else 200)
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
the commit is on disk, its CPU time with the process. A rerun looks at the files of the inputs and of the
checkpoints, and reads what is committed.

What a rerun takes for each checkpoint, and for each input of which nothing is left to do: read, as those that may have
changed are, and known by what was kept of them. In turn, {rounds} rounds; how many times as long reading takes, the
median, with the smallest and the largest. All lies in the disk's cache: from a disk or a network, reading takes longer.

| | read, ms: wall, CPU | known, ms: wall, CPU | wall | CPU |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(known)}
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


def probe(folder: Path, rounds: int, scale: int) -> Iterator[str]:
    """A row for each kind of input."""
    for what, path in write_inputs(folder, scale):
        store = stores.create(f"{path}.zarr", stores.Layout(), {})
        store.add(open_source(path).probe())
        (name,) = store.sources()
        for segment in store.segments(name):
            writer = store.writer(segment)
            for frame in range(segment.start, segment.stop):
                writer.fail(frame, "nothing is measured of it")
            writer.commit()
        reads, knows = (Prober(store.uri, MAX_PIXELS, MAX_FRAMES, False) for _ in range(2))
        reads.load()
        planned = reads.probe(str(path))
        records.write_stamps(store.directory, {name: planned.stamp})
        knows.load()

        def again(prober: Prober, path: Path = path, planned: Planned = planned) -> None:
            assert prober.probe(str(path)) == planned

        yield row(what, partial(again, reads), partial(again, knows), rounds)


def open_weights(folder: Path, rounds: int, less: int) -> str:
    """The row of a checkpoint with files as large as Stable Diffusion 2's in float32, all zeros, or less."""
    checkpoint = shutil.copytree(open_checkpoint("demo", "depth").directory, folder / "checkpoint")
    weights = list(checkpoint.glob("*/*.safetensors"))
    for path in weights:
        values = STABLE_DIFFUSION_2[path.parent.name] // less
        header = json.dumps({"zeros": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 4 * values)
    kept = Path(os.environ["XDG_CACHE_HOME"])
    time.sleep(3)  # until the files are old enough that what they hash to is kept

    def read() -> None:
        shutil.rmtree(kept / "depthmill", ignore_errors=True)
        open_checkpoint(str(checkpoint), "depth")

    what = f"a checkpoint of Stable Diffusion 2's size, {_megabytes(*weights)}"
    return row(what, read, lambda: open_checkpoint(str(checkpoint), "depth"), rounds)


def row(what: str, read: Callable[[], object], know: Callable[[], object], rounds: int) -> str:
    """What two ways take, one after the other."""

    def once(way: Callable[[], object]) -> int:
        way()
        return 1

    spent = interleave({"read": partial(once, read), "know": partial(once, know)}, rounds, torch.device("cpu"))
    cells = [f"{1e3 * one.wall_s:.1f}, {1e3 * one.cpu_s:.1f}" for one in map(typical, spent.values())]
    cells += [f"{ratio(spent['read'], spent['know']):.1f}", f"{ratio(spent['read'], spent['know'], 'cpu_s'):.1f}"]
    return f"| {what} | {' | '.join(cells)} |"


def write_inputs(folder: Path, scale: int) -> Iterator[tuple[str, Path]]:
    """A video, a folder of pictures and a tar of them."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 720, 1280, 3), np.uint8)
    video = folder / "video.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mjpeg", rate=25, width=1280, height=720, pix_fmt="yuvj420p")
        for i in range(10 * scale):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise[i % len(noise)], "rgb24")))
        container.mux(stream.encode())
    pictures = folder / "pictures"
    pictures.mkdir()
    data = io.BytesIO()
    Image.fromarray(noise[0]).save(data, "JPEG", quality=50)
    for i in range(10 * scale):
        (pictures / f"{i}.jpg").write_bytes(data.getvalue())
    shard = folder / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(pictures, "")
    time.sleep(3)  # as above
    yield f"a video of {10 * scale:,} frames, {_megabytes(video)}", video
    yield f"a folder of {10 * scale:,} pictures, {_megabytes(*pictures.iterdir())}", pictures
    yield f"a tar of the same, {_megabytes(shard)}", shard


def _megabytes(*files: Path) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.0f} MB"


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
