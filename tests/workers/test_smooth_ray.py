"""`depthmill smooth` as a user runs it: Ray workers, real kills, memory."""

import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from depthmill.tests import media, runs
from depthmill.tests.workers.flickering import labelled, written

FRAMES = 26


def command(store, *options):
    """A run that asks for little: edges over 4 frames, and the filter."""
    code = "from depthmill.cli import main; main()"
    return [sys.executable, "-c", code, "smooth", store.uri, "--filter", "--max-edge", "4", *options]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return media.write_video(tmp_path_factory.mktemp("media") / "clip.mp4", frames=FRAMES, height=96, width=128)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, video):
    """What one process writes in one go."""
    store, _ = labelled(tmp_path_factory.mktemp("undisturbed") / "a.zarr", video, segment_frames=4)
    subprocess.run(command(store, "--workers", "0"), check=True, capture_output=True, timeout=240)
    return written(store)


def commits(store):
    # Not by walking the store: folders of partial files come and go in it.
    found = (Path(store.uri).glob(f"*/temporal/{name}/c/*") for name in ("edges", "filtered"))
    return sum(path.name.isdigit() for path in chain.from_iterable(found))


def is_worker(process):
    return any("ray::SmoothWorker" in word for word in process.cmdline())


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_none(tmp_path, video, undisturbed):
    store, _ = labelled(tmp_path / "a.zarr", video, segment_frames=4)
    done = subprocess.run(command(store, "--workers", "2"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert written(store) == undisturbed
    assert "1 source smoothed in" in done.stdout


@pytest.mark.slow
def test_killed_workers_and_a_killed_driver_leave_the_bytes_of_one_process(tmp_path, video, undisturbed):
    store, _ = labelled(tmp_path / "a.zarr", video, segment_frames=4)
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            command(store, "--workers", "2"), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + 120
        while commits(store) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        workers = [one for one in runs.family(process) if is_worker(one)]
        assert workers, log.seek(0) or log.read()
        runs.kill(workers[:1])
        before = commits(store)
        while commits(store) < before + 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)  # the other, or a new one, goes on
        assert commits(store) >= before + 2, log.seek(0) or log.read()
        family = runs.family(process)
        runs.kill(family[:1])
        process.wait(30)
        runs.kill([one for one in family if one.is_running()])
    done = subprocess.run(command(store, "--workers", "2"), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert written(store) == undisturbed


@pytest.mark.slow
def test_memory_does_not_grow_with_length(tmp_path):
    """Peak of the process at 10 times the length, within 2 %; ru_maxrss would be that of the process it came from."""
    peaks = []
    for frames in (120, 1200):
        video = media.write_video(tmp_path / f"{frames}.mp4", frames=frames, height=96, width=128)
        store, _ = labelled(tmp_path / f"{frames}.zarr", video, segment_frames=16)
        program = (
            "import sys; from pathlib import Path; from depthmill.pipeline.config import SmoothConfig; "
            "from depthmill.workers.smooth import smooth; smooth(sys.argv[1], SmoothConfig(workers=0, filter=True)); "
            "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, store.uri], capture_output=True, text=True, check=True, timeout=600
        )
        peaks.append(int(done.stdout.split()[-1]))
    print(f"\npeak at 120 frames {peaks[0] >> 10} MiB, at 1,200 {peaks[1] >> 10} MiB: {peaks[1] / peaks[0]:.4f}")
    assert peaks[1] <= 1.02 * peaks[0]
