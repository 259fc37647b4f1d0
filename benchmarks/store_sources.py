"""What it takes to add many sources to a store, and to open it: python benchmarks/store_sources.py [SOURCES] [FOLDER].

One process adds sources of 100 pictures, and publishes them whenever half as many again are new, as the driver does.
FOLDER is where the store is made and removed; by default the fastest there is, so that it is not the disk's fsync that
is measured (11 files a source).
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

from depthmill.pipeline import store as stores
from depthmill.pipeline.types import Source

KEYS = tuple(f"picture-{i:06d}.jpg" for i in range(100))


def main(count: int, folder: Path) -> None:
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
    print(f"{count} sources: {seconds:.1f} s, {1e3 * seconds / count:.1f} ms a source, of which publishing")
    print(f"{publishing_s:.1f} s; root {root / 1e6:.1f} MB, opened in {opening_s:.2f} s; most memory of the process")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    parent = sys.argv[2] if len(sys.argv) > 2 else "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as made:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, Path(made))
