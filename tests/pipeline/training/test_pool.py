import numpy as np
import pytest

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
