import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.errors import ConfigError, RunStoppedError, TrainingError
from depthmill.pipeline.training import pool


def test_two_machines_fill_one_shard_at_once(tmp_path, monkeypatch):
    """Their processes may have the same number."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    monkeypatch.setattr(pool, "render", lambda seeds, height, width, device: np.zeros((len(seeds), height, width)))
    path, save = tmp_path / "0000000.npy", np.save

    def save_after_another(file, pixels):
        monkeypatch.setattr(np, "save", save)
        pool._fill(path, range(2), 3, 4)
        save(file, pixels)

    monkeypatch.setattr(np, "save", save_after_another)
    pool._fill(path, range(2), 3, 4)
    assert np.load(path).shape == (2, 3, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(file, pixels):
        raise OSError("no space left")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(pool, "render", lambda *asked: np.zeros(1))
    with pytest.raises(OSError, match="no space"):
        pool._fill(tmp_path / "0000000.npy", range(2), 3, 4)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_and_a_pool_that_cannot_be_written_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    monkeypatch.setattr(pool, "render", lambda seeds, *size: np.zeros((len(seeds), 60, 80), pool._PIXEL))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(RunStoppedError, match=rf"{tmp_path}.* cannot be written: the disk is full"):
            pool.open_pool(tmp_path, pool.SHARD, 60, 80, processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (folder,) = tmp_path.iterdir()
    assert not list(folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/v\d+-60x80 cannot be written"):
        pool.open_pool(tmp_path / "file", pool.SHARD, 60, 80, processes=1)


def test_processes_that_fill_one_pool_begin_with_different_shards(tmp_path, monkeypatch):
    orders = []

    class Executor:
        def __init__(self, *options, **more):
            orders.append([])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, fill, path, *job):
            orders[-1].append(path)
            if len(orders[-1]) == 50:
                raise InterruptedError

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Executor)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            pool.open_pool(tmp_path, 50 * pool.SHARD, 3, 4, processes=1)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


RENDERS = """
import os, time
from pathlib import Path
import numpy as np
from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.training import pool

def quick(seeds, *size):  # in the processes, too, which run this file
    Path(f"pid-{os.getpid()}").touch()
    if seeds[0] > 0:
        time.sleep(60)
    return np.zeros((len(seeds), 2, 2), pool._PIXEL)

pool.render = quick
if __name__ == "__main__":
    try:
        pool.open_pool(Path("pool"), 50 * pool.SHARD, 2, 2, processes=2)
    except KeyboardInterrupt:
        print("stopped")
    except RunStoppedError as error:
        print(error)
"""


def runs(pid):
    """Whether a process does, and is not just waiting to be noticed."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9", "one of them is killed"])
def test_processes_that_render_end_with_the_one_that_asked_them(tmp_path, how):
    """Ctrl-C goes to all of them; it fails no shard, and no shard that is left is waited for."""
    (tmp_path / "fill.py").write_text(RENDERS)
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "fill.py"], cwd=tmp_path, stdout=said, stderr=said, start_new_session=True
        )
    try:
        until_s = time.monotonic() + 120
        while len(rendering := [int(path.name[4:]) for path in tmp_path.glob("pid-*")]) < 2:
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < until_s
            time.sleep(0.05)
        assert all(map(runs, rendering))
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(30) == 0
            assert (tmp_path / "said").read_text() == "stopped\n"
        elif how == "one of them is killed":
            os.kill(rendering[0], signal.SIGKILL)
            assert process.wait(30) == 0
            assert "Lower render_processes" in (tmp_path / "said").read_text()
        else:
            process.kill()
            process.wait(30)
        until_s = time.monotonic() + 20
        while any(map(runs, rendering)):
            assert time.monotonic() < until_s
            time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_what_a_killed_process_left_half_written_goes_and_what_another_writes_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "render", lambda seeds, *size: np.zeros((len(seeds), 3, 4), pool._PIXEL))
    folder = tmp_path / f"v{pool.scenes.VERSION}-3x4"
    folder.mkdir()
    pool._fill(folder / "0000000.npy", range(pool.SHARD), 3, 4)
    left, written = (folder / f".{name}.npy.partial" / ".0.partial" for name in ("0000000", "0000100"))
    for path in (left, written):
        path.parent.mkdir()
        path.touch()
    os.utime(left, (time.time() - 2 * 3600,) * 2)
    assert len(pool.open_pool(tmp_path, pool.SHARD, 3, 4, processes=1)) == pool.SHARD
    assert set(folder.iterdir()) == {folder / "0000000.npy", written.parent}
    assert written.exists()


@pytest.mark.parametrize("left", [0, 500])
def test_a_shard_that_was_cut_is_named(tmp_path, left):
    folder = tmp_path / f"v{pool.scenes.VERSION}-2x2"
    folder.mkdir()
    path = folder / "0000000.npy"
    np.save(path, np.zeros((pool.SHARD, 2, 2), pool._PIXEL))
    os.truncate(path, left)
    with pytest.raises(TrainingError, match=r"/0000000\.npy is damaged .*remove it"):
        pool.open_pool(tmp_path, pool.SHARD, 2, 2, processes=1)


def test_a_pool_may_have_more_shards_than_a_process_may_have_open_files(tmp_path):
    folder = tmp_path / f"v{pool.scenes.VERSION}-1x1"
    folder.mkdir()
    pixels = np.zeros((pool.SHARD, 1, 1), pool._PIXEL)
    firsts = np.arange(1024) * pool.SHARD
    for number, first in enumerate(firsts):
        pixels["rgb"][..., 0] = number % 256
        np.save(folder / f"{first:07d}.npy", pixels)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 1024), limits[1]))
    try:
        scenes = pool.open_pool(tmp_path, len(firsts) * pool.SHARD, 1, 1, processes=1)
        read = [scenes.read(some).rgb[:, 0].flatten() * 255 for some in np.split(firsts, 16)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(scenes) == len(firsts) * pool.SHARD
    np.testing.assert_allclose(np.concatenate(read), np.arange(1024) % 256, atol=1e-3)
