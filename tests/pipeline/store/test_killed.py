import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write

"""A run that was killed at any instant, then run again, leaves the bytes of one that never was."""


@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rerun_leaves_the_same_bytes(tmp_path, stride):
    command = [sys.executable, str(Path(__file__).with_name("kill_store.py")), str(tmp_path), str(stride)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=290, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["differing"] == []
    assert report["kills"] >= 8  # how far each comes depends on which of its threads is first
    assert report["files"] == 41


def test_what_commits_is_written_last_and_removed_first(store, monkeypatch):
    done = []
    for name in ("write", "delete", "remove"):
        real = getattr(LocalDirectory, name)

        def noted(self, key, *data, real=real):
            done.append(key)
            real(self, key, *data)

        monkeypatch.setattr(LocalDirectory, name, noted)

    def keys():
        taken = done[:]
        done.clear()
        return taken

    store.add_source(dataclasses.replace(VIDEO, id="new"))
    assert keys()[-1] == "new/zarr.json"
    segment = Segment("new", 0, 8)
    write(store, segment)
    assert keys()[-2:] == ["new/checksum/c/0/0", "new/status/c/0"]

    temporal, ones = Temporal(store, "new"), np.ones(18, np.float32)
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    assert keys()[-1] == "new/temporal/zarr.json"
    temporal.write_edges(segment, np.ones((8, 1, 5), np.float32), ones[:8])
    assert keys() == ["new/temporal/score/c/0", "new/temporal/edges/c/0/0/0"]
    temporal.write_solution(ones, ones, ones.astype(np.int32))
    assert keys()[-1] == "new/temporal/shot/c/0"
    temporal.prepare_filter()
    temporal.write_filtered(segment, [(1, dict(zip(("depth", "normals"), labels(0), strict=True)))] * 8)
    assert keys()[-1] == "new/temporal/filtered/c/0"
    temporal.uncommit_solution()
    assert keys()[0] == "new/temporal/filtered/c"

    store.directory.write("new/depth/c/0/0/0", b"damaged")
    keys()
    verify(store, repair=True)
    assert (first := keys())[0] == "new/temporal/edges/c", "what is smoothed goes while the damage can be found again"
    assert first[-2:] == ["new/status/c/0", "new/checksum/c/0/0"]
    stores.create(store.uri, LAYOUT, IDENTITY, overwrite=True)
    assert keys()[0] == "zarr.json", "which says that the rest is being removed"


def test_leftovers_of_a_worker_are_cleared_by_whoever_takes_its_segment(store):
    for segment in store.segments("video"):
        write(store, segment)
    clean = files(store.uri)
    (Path(store.uri) / "video" / "status" / "c" / "1").unlink()
    for file in ("depth/c/2/0/0", "normals/c/3/0/0/0", "status/c/1", "reason/c/1"):
        path = Path(store.uri) / "video" / file
        folder = path.with_name(f".{path.name}.partial")
        folder.mkdir(parents=True)
        (folder / ".0123abcd.partial").write_bytes(b"half")
    write(store, Segment("video", 8, 16))
    assert files(store.uri) == clean
    assert not list(Path(store.uri).rglob("*.partial")), "nor an empty folder of them"


def test_labels_of_an_abandoned_attempt_do_not_outlive_it(store, tmp_path):
    """The frame that killed a worker is marked as failed next time; so may be a whole segment."""
    other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    other.add(VIDEO, IMAGES)
    for segment, failed in ((Segment("video", 0, 8), {1, 6}), (Segment("video", 8, 16), set(range(8, 16)))):
        writer = store.writer(segment)
        for index in range(segment.start, segment.stop):
            writer.put(index, *labels(index))
        writer._finish_writing()
        for target in (store, other):
            write(target, segment, failed)
    assert files(store.uri) == files(other.uri)


def test_a_store_whose_removal_was_cut_short_says_so_and_is_finished(store):
    root = json.loads((Path(store.uri) / "zarr.json").read_text())
    root["attributes"] = {"depthmill": {"being_removed": True}}
    (Path(store.uri) / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match="run the same command again"):
        stores.open_store(store.uri)
    assert stores.create(store.uri, LAYOUT, IDENTITY).sources() == []
    assert not (Path(store.uri) / "video").exists()


def test_writers_of_one_segment_do_not_hinder_each_other(store, tmp_path):
    """A worker given up for dead that is not, and its successor; each starts while others are writing."""
    other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    other.add(VIDEO, IMAGES)
    segment = Segment("video", 0, 8)
    write(other, segment)
    errors = []

    def race():
        try:
            for _ in range(6):
                write(stores.open_store(store.uri), segment)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=race) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert files(store.uri) == files(other.uri)


def test_what_is_cleared_while_it_is_written_is_written_again(store, monkeypatch):
    cleared = []
    fsync = os.fsync

    def clear_then_sync(file):
        if len(cleared) < 3:
            cleared.append(file)
            store.directory.clear_partial("run.json")
        fsync(file)

    monkeypatch.setattr("os.fsync", clear_then_sync)
    before = files(store.uri)
    store.directory.write("run.json", b"{}")
    assert len(cleared) == 3
    assert files(store.uri) == {**before, "run.json": b"{}"}
