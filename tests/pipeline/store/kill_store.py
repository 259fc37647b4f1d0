"""Kill a process that writes a store at every instant that matters; print what a rerun makes of it, as JSON.

Run by test_killed.py in a process of its own: it forks, which a process that already runs Zarr's threads must not.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from depthmill.pipeline import store as stores
from depthmill.pipeline.store import files
from depthmill.pipeline.store.records import write_failures
from depthmill.pipeline.types import Failure, Source

LAYOUT = stores.Layout(shard_frames=2, segment_frames=4)
VIDEO = Source("video", "/in/video.mp4", "video", 7, 8, 12, 10.0, "f1", time_s=np.arange(7) / 10)
IMAGES = Source("images", "/in/images", "images", 3, 8, 12, None, "f2", keys=("a", "b", "c"))


def run(path: Path, overwrite: bool = False) -> None:
    store = stores.create(path, LAYOUT, {"checkpoint": "x"}, overwrite=overwrite)
    store.add(VIDEO)
    store.add(IMAGES)
    for source in (VIDEO, IMAGES):
        for segment in store.pending(source.id):
            writer = store.writer(segment)
            for index in range(segment.start, segment.stop):
                if index % 4 == 1:
                    writer.fail(index, f"frame {index} is broken")
                    continue
                rng = np.random.default_rng([index, len(source.id)])
                height = 8 if source is VIDEO else 4 + index
                normals = rng.normal(size=(height, 12, 3)).astype(np.float32)
                normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
                writer.put(index, rng.random((height, 12), dtype=np.float32), normals)
            writer.commit()
    write_failures(store.directory, [*store.failures(), Failure("/in/none.mp4", None, None, "no such file")])


def in_child(work: Callable[[], None], kill_after_s: float | None = None) -> bool:
    """Do some work in a child process, perhaps killed from outside; whether it got to its end."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def killed_at(event: int, work: Callable[[], None]) -> Callable[[], None]:
    """The work, killed at its n-th event: a file written but not yet in place, one just in place, one deleted."""

    def work_until_killed() -> None:
        seen = 0

        def tick() -> None:
            nonlocal seen
            seen += 1
            if seen > event:
                os.kill(os.getpid(), signal.SIGKILL)

        replace, unlink, rmdir = Path.replace, os.unlink, os.rmdir
        files.os.fsync = lambda fd: tick()
        Path.replace = lambda self, target: (replace(self, target), tick())
        os.unlink = lambda *args, **kwargs: (unlink(*args, **kwargs), tick())
        os.rmdir = lambda *args, **kwargs: (rmdir(*args, **kwargs), tick())
        work()

    return work_until_killed


def digest(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def main(folder: Path, stride: int) -> None:
    files.os.fsync = lambda fd: None  # a killed process loses nothing that it handed to the kernel
    reference, path = folder / "reference", folder / "killed"
    assert in_child(lambda: run(reference))
    expected = digest(reference)
    report = {"files": len(expected), "kills": 0, "differing": []}

    def compare(what: str) -> None:
        if digest(path) != expected:
            report["differing"].append(what)
        shutil.rmtree(path)

    # At every `stride`-th event of a run into nothing, and of one that replaces a store. The rerun is not told to
    # replace: whether the removal had begun or not, it must not trust half a store.
    for overwrite in (False, True):
        for event in range(0, 10_000, stride):
            if overwrite:
                shutil.copytree(reference, path)
            if in_child(killed_at(event, lambda overwrite=overwrite: run(path, overwrite))):
                shutil.rmtree(path)
                break
            report["kills"] += 1
            assert in_child(lambda: run(path))
            compare(f"event {event}, overwrite {overwrite}")
    # At random times, again and again, ever later, until one run gets through.
    rng = random.Random(0)
    for attempt in range(3):
        latest_s = 0.1
        while not in_child(lambda: run(path), kill_after_s=rng.uniform(0.01, latest_s)):
            report["kills"] += 1
            latest_s *= 1.5
        compare(f"attempt {attempt}")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
