"""Running `depthmill label` as a user does, and looking at what it left."""

import subprocess
import sys
import time
from pathlib import Path

import psutil


def command(inputs, store, checkpoints, *options):
    """The command line for random-weight checkpoints, in segments of two frames."""
    return [
        *(sys.executable, "-c", "from depthmill.cli import main; main()", "label", *map(str, inputs), str(store)),
        *("--checkpoint", str(checkpoints / "depth"), "--normals-checkpoint", str(checkpoints / "normals")),
        *(
            "--device",
            "cpu",
            "--threads",
            "1",
            "--batch-size",
            "2",
            "--shard-frames",
            "2",
            "--segment-frames",
            "2",
            *options,
        ),
    ]


def run(*arguments, **settings):
    """Run to the end; the process, with what it printed."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, check=False, **settings)


def start(*arguments, log):
    """Start in a session of its own, so that it and its children can be killed alone."""
    return subprocess.Popen(
        command(*arguments), stdout=log, stderr=subprocess.STDOUT, start_new_session=True, text=True
    )


def contents(store):
    """Path -> bytes of every file of a store, but for `run.json` and `stamps.json`, which hold times."""
    return {
        path.relative_to(store).as_posix(): path.read_bytes()
        for path in sorted(Path(store).rglob("*"))
        if path.is_file() and path.name not in ("run.json", "stamps.json")
    }


def commits(store):
    """How many segments are committed; what a kill left of one that was being written does not count."""
    return sum(path.name.isdigit() for path in Path(store).glob("*/status/c/*"))


def wait_for_commits(store, count, process, timeout_s=120):
    """Wait until `count` segments are committed, or the process has ended."""
    end = time.monotonic() + timeout_s
    while commits(store) < count and process.poll() is None:
        assert time.monotonic() < end, f"{commits(store)} of {count} segments after {timeout_s} s"
        time.sleep(0.005)


def family(process):
    """A process and all below it, Ray's included."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_worker(process):
    """Whether it is one of our Ray actors (Ray names the process after the class)."""
    try:
        return any("ray::LabelWorker" in word for word in process.cmdline())
    except psutil.Error:
        return False


def name(process):
    """What it is called; nothing if it is gone."""
    try:
        return process.name()
    except psutil.Error:
        return ""


def memory(process):
    """Bytes that it has in memory; 0 if it is gone."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def kill(processes):
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)
