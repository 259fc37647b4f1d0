"""Measure what it takes to add many sources to a store, to open it, and to read and write small arrays.

    python benchmarks/store_sources.py [--sources 10000] [--folder FOLDER] [--quick]

One process adds sources of 100 pictures, and publishes them whenever half as many again are new, as the driver does.
FOLDER is where the store is made and removed; by default the fastest there is, so that it is not the disk's fsync that
is measured (11 files a source). Writes store_sources.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline import store as stores
from depthmill.pipeline.store.shard import write_plain
from depthmill.pipeline.types import LABELLED, Source

if TYPE_CHECKING:
    from depthmill.pipeline.bench.timing import Spent

OUT = Path(__file__).resolve().parent / "store_sources.md"
KEYS = tuple(f"picture-{i:06d}.jpg" for i in range(100))
ROUNDS, SEGMENTS = 5, 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm") if Path("/dev/shm").is_dir() else None)
    parser.add_argument("--quick", action="store_true", help="few sources: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        row = measure(100 if options.quick else options.sources, Path(made))
        # Not before the first row has its memory: torch comes with it.
        from depthmill.pipeline.bench.timing import ratio, typical

        frames = 1_000 if options.quick else 100_000
        both = {
            f"reading the status of a video of {frames:,} frames": read_status(frames, Path(made)),
            "writing the small arrays of a segment of one picture": write_small(Path(made)),
        }
    rows = []
    for what, spent in both.items():
        cells = [f"{1e3 * one.wall_s:.1f}, {1e3 * one.cpu_s:.1f}" for one in (typical(s) for s in spent.values())]
        ratios = [f"{ratio(spent['zarr'], spent['ours'], clock):.1f}" for clock in ("wall_s", "cpu_s")]
        rows.append(f"| {what} | {' | '.join(cells + ratios)} |")
    report = f"""# Many sources in a store

Written by `benchmarks/store_sources.py`, {datetime.date.today()}, on {os.cpu_count()} cores of {platform.machine()},
Python {platform.python_version()}, zarr {version("zarr")}; load average {load:.1f} when it began. One process adds
sources of {len(KEYS)} pictures to a store in {options.folder or tempfile.gettempdir()},
and publishes them whenever half as many again are new.

| sources | ms a source | publishing, of that | root, MB | opening, s | peak memory, MB |
| ---: | ---: | ---: | ---: | ---: | ---: |
{row}

By Zarr and by the store itself, in turn, {ROUNDS} rounds: how many times as long Zarr takes, the median, with the
smallest and the largest.

| | by Zarr, ms: wall, CPU | by the store, ms: wall, CPU | wall | CPU |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


def measure(count: int, folder: Path) -> str:
    store = stores.create(folder / "labels.zarr", stores.Layout(), {})
    started, publishing_s, published, new = time.perf_counter(), 0.0, 0, []
    for i in range(count):
        name = f"shard-{i:05d}-0123abcd"
        source = Source(name, f"/in/{name}.tar", "images", 100, 512, 512, None, "f" * 64, keys=KEYS)
        store.add_source(source)
        new.append(name)
        if len(new) > published // 2 or i == count - 1:
            before = time.perf_counter()
            store.publish(new)
            publishing_s += time.perf_counter() - before
            published, new = published + len(new), []
    seconds = time.perf_counter() - started
    root = (folder / "labels.zarr/zarr.json").stat().st_size
    before = time.perf_counter()
    stores.open_store(store.uri)
    opening_s = time.perf_counter() - before
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return (
        f"| {count:,} | {1e3 * seconds / count:.1f} | {publishing_s / seconds:.0%} | {root / 1e6:.1f} | "
        f"{opening_s:.2f} | {memory:.0f} |"
    )


def read_status(frames: int, folder: Path) -> dict[str, list[Spent]]:
    """Time what a rerun does for each source: read what became of its frames."""
    import torch

    from depthmill.pipeline.bench.timing import interleave

    store = stores.create(folder / "video.zarr", stores.Layout(), {})
    store.add(
        Source("video-0123abcd", "/in/video.mp4", "video", frames, 48, 64, 25.0, "f" * 64, time_s=np.arange(frames))
    )
    document = store.arrays("video-0123abcd")["status"]
    write_plain(store.directory, "video-0123abcd", "status", document, 0, np.full(frames, LABELLED, np.uint8))

    def reads(read: Callable[[], npt.NDArray[Any]]) -> Callable[[], int]:
        def way() -> int:
            assert (read() == LABELLED).all()
            return 1

        return way

    ways = {
        "zarr": reads(lambda: np.asarray(store.array("video-0123abcd", "status")[:])),
        "ours": reads(lambda: store.status("video-0123abcd")),
    }
    return interleave(ways, ROUNDS, torch.device("cpu"))


def write_small(folder: Path) -> dict[str, list[Spent]]:
    """Time what each commit writes beside labels, and each source of one picture, which is one commit, so often."""
    import torch

    from depthmill.pipeline.bench.timing import interleave

    store = stores.create(folder / "picture.zarr", stores.Layout(), {})
    store.add(Source("picture", "/in/picture.png", "images", 1, 48, 64, None, "f" * 64, keys=("picture.png",)))
    documents = store.arrays("picture")
    values: dict[str, npt.NDArray[Any]] = {
        "size": np.array([[48, 64]], np.int32),
        "reason": np.array(["broken"], object),
        "checksum": np.ones((1, documents["checksum"]["shape"][1]), np.uint64),
        "status": np.array([LABELLED], np.uint8),
    }

    def by_zarr() -> int:
        for _ in range(SEGMENTS):
            for name, rows in values.items():
                store.array("picture", name)[:] = rows
        return SEGMENTS

    def by_us() -> int:
        for _ in range(SEGMENTS):
            for name, rows in values.items():
                write_plain(store.directory, "picture", name, documents[name], 0, rows)
        return SEGMENTS

    return interleave({"zarr": by_zarr, "ours": by_us}, ROUNDS, torch.device("cpu"))


if __name__ == "__main__":
    main()
