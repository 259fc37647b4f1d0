"""Micro-batches out of the loader's processes."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from depthmill.pipeline.errors import RunStoppedError, TrainingError
from depthmill.pipeline.training import loader as loader_module
from depthmill.pipeline.training.loader import MicroBatches, load
from depthmill.tests.pipeline.training.tiny import config


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_cannot_be_read_is_an_error_without_a_traceback(scene_pool: Path, tmp_path: Path, workers: int) -> None:
    (sound,) = scene_pool.rglob("*.npy")
    scenes = np.load(sound)
    scenes["depth"] = np.inf  # nothing but sky
    damaged = tmp_path / sound.relative_to(scene_pool)
    damaged.parent.mkdir()
    np.save(damaged, scenes)
    batches = MicroBatches(config(tmp_path))
    assert isinstance(pickle.loads(pickle.dumps(batches[0])), TrainingError)  # as a process hands it over
    with pytest.raises(TrainingError, match=r"^not one of the 100 pictures can be used, for reasons such as\n"):
        next(load(batches, [0], workers=workers, pin=False))


@pytest.mark.parametrize(
    ("error", "killed"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (EOFError(), True),
        (ConnectionResetError("Caught ConnectionResetError in pin memory thread for device 0.\nOriginal"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback"), False),
        (EOFError("Caught EOFError in DataLoader worker process 0.\nOriginal Traceback"), False),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), False),
    ],
)
def test_a_process_that_is_gone_is_told_from_one_that_failed(
    scene_pool: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, killed: bool
) -> None:
    def loader(*_: object, **__: object) -> Iterator[object]:
        yield from ()
        raise error

    monkeypatch.setattr(loader_module, "DataLoader", loader)
    with pytest.raises((RunStoppedError, type(error))) as raised:
        next(load(MicroBatches(config(scene_pool)), [0], workers=1, pin=False))
    assert ("run again to go on from the last saved state" in str(raised.value)) == killed


def test_processes_that_cannot_be_started_are_said(scene_pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __iter__(self) -> Iterator[object]:
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(loader_module, "DataLoader", Loader)
    with pytest.raises(TrainingError, match=r"Read-only file system.*loader_workers: 0"):
        next(load(MicroBatches(config(scene_pool)), [0], workers=1, pin=False))


def test_sets_have_their_shares_and_an_autoencoder_sees_depth_and_normals(scene_pool: Path, odd_pool: Path) -> None:
    often = {"kind": "scenes", "path": scene_pool, "scenes": 100, "height": 24, "width": 32, "ratio": 3}
    seldom = {"kind": "scenes", "path": odd_pool, "scenes": 100, "height": 25, "width": 34}
    batches = MicroBatches(config("unused", objective="autoencoder", sets=[often, seldom]))
    seen = Counter(tuple(batches[number].batch.target.shape[1:3]) for number in range(8))
    assert seen == {(1, 24): 3, (3, 24): 3, (1, 25): 1, (3, 25): 1}


@pytest.mark.slow
def test_a_process_that_is_killed_stops_the_run_where_pictures_are_read(scene_pool: Path) -> None:
    before = set(multiprocessing.active_children())
    loaded = load(MicroBatches(config(scene_pool)), range(100), workers=1, pin=False)
    next(loaded)
    (reader,) = set(multiprocessing.active_children()) - before
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    time.sleep(0.2)  # a handler of torch's would raise here
    with pytest.raises(RunStoppedError, match=r"was killed \(.*Lower loader_workers, and run again"):
        list(loaded)


@pytest.mark.slow
def test_a_process_that_reads_ends_with_a_run_that_is_killed_while_it_starts(scene_pool: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from depthmill.pipeline.training.loader import MicroBatches, load
        from depthmill.tests.pipeline.training.tiny import config
        next(load(MicroBatches(config(Path(sys.argv[1]))), [0], workers=1, pin=False))
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(scene_pool)])
    readers: list[psutil.Process] = []
    while not readers:
        assert run.poll() is None
        time.sleep(0.02)
        readers = [one for one in psutil.Process(run.pid).children() if "spawn_main" in " ".join(one.cmdline())]
    time.sleep(0.2)
    run.kill()
    run.wait()
    _, left = psutil.wait_procs(readers, timeout=60)
    for reader in left:
        reader.kill()
    assert not left
