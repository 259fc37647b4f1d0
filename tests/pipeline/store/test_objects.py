"""Stores in object storage, on a server of S3's protocol on loopback."""

import logging
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError, StoreMismatchError
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.files import open_directory
from depthmill.pipeline.store.inspect import inspect
from depthmill.pipeline.store.objects import ObjectDirectory
from depthmill.pipeline.store.records import write_failures
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Segment
from depthmill.tests import media, runs
from depthmill.tests.pipeline.store import kill_store
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write


def objects(uri):
    directory = open_directory(uri)
    return directory.read_all(dict(directory.sizes()))


def fill(store):
    store.add(VIDEO, IMAGES)
    for segment in (*store.segments("video")[1:], *store.segments("images")):
        write(store, segment)
    store.directory.write("run.json", b"{}")
    write_failures(store.directory, store.failures())
    return store


def test_a_store_is_the_same_in_a_bucket_as_in_a_directory(s3, tmp_path):
    uri = f"{s3.url}/corpora/labels.zarr"
    store = fill(stores.create(uri + "/", LAYOUT, IDENTITY))
    local = fill(stores.create(tmp_path / "s", LAYOUT, IDENTITY))
    assert (store.uri, local.uri) == (uri, str(tmp_path / "s"))
    assert objects(uri) == files(local.uri)
    again = stores.create(uri, LAYOUT, IDENTITY)
    assert again.sources() == ["images", "video"]
    assert again.pending("video") == [Segment("video", 0, 8)]
    assert again.progress("video") == local.progress("video")
    assert again.directory.read("run.json") == b"{}"
    assert again.directory.read("nothing") is None
    datasets = depthmill.open(uri)
    assert np.abs(datasets["video"]["depth"][9].values - labels(9)[0]).max() <= 1e-4
    xarray.testing.assert_identical(datasets["images"].load(), depthmill.open(local.uri)["images"].load())
    assert inspect(again).sources == inspect(local).sources
    with pytest.raises(StoreMismatchError, match="shard_frames: 4 there, 2 now"):
        stores.create(uri, Layout(shard_frames=2, segment_frames=8), IDENTITY)
    replaced = stores.create(uri, LAYOUT, {"other": 1}, overwrite=True)
    assert replaced.sources() == []
    assert list(objects(uri)) == ["zarr.json"]
    replaced.remove_if_empty()
    assert objects(uri) == {}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_on(s3):
    """As the workers of a DataLoader do."""
    fill(stores.create(f"{s3.url}/s", LAYOUT, IDENTITY))
    depth = depthmill.open(f"{s3.url}/s")["video"]["depth"]
    expected = depth[9].values
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=lambda: theirs.send(depth[9].values))
    worker.start()
    assert ours.poll(60), "the worker hangs, or fails"
    assert np.array_equal(ours.recv(), expected)
    worker.join(10)


def test_a_bucket_outlives_the_store_in_it(s3):
    store = stores.create(s3.url, LAYOUT, IDENTITY)
    with pytest.raises(ValueError, match="never removed whole"):
        store.directory.remove("")
    assert list(objects(s3.url)) == ["zarr.json"]
    store.remove_if_empty()
    assert objects(s3.url) == {}
    store.directory.write("notes.txt", b"the bucket is there")
    assert objects(s3.url) == {"notes.txt": b"the bucket is there"}


def test_workers_and_driver_meet_in_a_bucket(s3):
    uri = f"{s3.url}/s"
    driver, worker = stores.create(uri, LAYOUT, IDENTITY), stores.open_store(uri)
    worker.add_source(IMAGES)
    written = write(worker, Segment("images", 0, 5), failed=range(5))
    assert written == sum(len(data) for key, data in objects(uri).items() if "/c/" in key and "/key/" not in key)
    assert driver.progress("images").failed == 5, "and no listing is remembered"
    assert stores.open_store(uri).sources() == ["images"]
    driver.publish(["images"])
    ((segment, frames),) = worker.failed_segments("images")
    write(worker, segment, redo=frames)
    assert driver.failures() == []
    assert verify(driver).damage == ()
    directory = open_directory(uri)
    directory.delete("images/depth/c/0/0/0")
    (damage,) = verify(driver, repair=True).damage
    assert (damage.file, damage.reason) == ("images/depth/c/0/0/0", "is missing")
    assert driver.pending("images") == [Segment("images", 0, 5)]


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_run_again_leaves_the_same_bytes(s3, tmp_path, stride):
    kill_store.run(tmp_path / "local")
    script = Path(__file__).with_name("kill_objects.py")
    done = subprocess.run([sys.executable, script, s3.url, str(stride)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    requests = done.stdout.split()
    assert len(requests) >= 3
    expected = files(tmp_path / "local")
    for request in requests:
        assert objects(f"{s3.url}/{request}") == expected, f"killed before request {request}"


def test_what_is_left_to_do_is_one_listing(s3, monkeypatch):
    store = fill(stores.create(f"{s3.url}/s", LAYOUT, IDENTITY))
    calls = []
    for name in ("read", "read_all", "children", "sizes"):
        method = getattr(ObjectDirectory, name)

        def counted(self, *args, name=name, method=method):
            calls.append((name, *args))
            return method(self, *args)

        monkeypatch.setattr(ObjectDirectory, name, counted)
    store.pending("video")
    assert calls == [("children", "video/status/c")]
    calls.clear()
    store.writer(Segment("video", 0, 8))
    assert calls == [], "all that a writer must know is known"


def test_a_large_file_is_one_put_of_which_a_kill_leaves_nothing(s3, monkeypatch):
    directory, methods = open_directory(f"{s3.url}/s"), []

    async def note(self, method, *args, **options):
        methods.append(method)
        return {"UploadId": "1", "ETag": "1"}

    monkeypatch.setattr(type(directory._fs), "_call_s3", note)
    large = bytes(101 << 20)  # pages that are never touched
    directory.write("large", large)
    directory.write_all({"large": large})
    assert methods == ["put_object"] * 2


def test_the_marker_of_an_empty_folder_is_nothing(s3):
    """An object whose name ends in a slash, as S3's console makes it."""
    directory = open_directory(f"{s3.url}/s")
    directory._fs.pipe_file(f"{s3.url}/s/", b"")
    directory._fs.pipe_file(f"{s3.url}/s/video/", b"")
    assert (directory.children(), directory.children("video"), [*directory.sizes()]) == (["video/"], [], [])
    directory._fs.rm_file(f"{s3.url}/s/video/")
    assert stores.create(f"{s3.url}/s", LAYOUT, IDENTITY).new


def test_the_marker_of_a_folder_is_none_of_what_is_in_it(s3, monkeypatch):
    """As gcsfs lists it: by the folder's own name."""
    directory = open_directory(f"{s3.url}/s")
    path = f"{s3.url}/s".removeprefix("s3://")
    entries = [{"name": name, "type": "directory"} for name in (path, f"{path}/video")]
    monkeypatch.setattr(directory._fs, "ls", lambda *args, **options: entries)
    assert directory.children() == ["video/"]


def test_what_is_no_store_of_ours_is_never_touched(s3):
    directory = open_directory(f"{s3.url}/photos")
    directory.write("holiday/beach.jpg", b"dear")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"photos has files in it \(holiday\), but is no depthmill store"):
            stores.create(f"{s3.url}/photos", LAYOUT, IDENTITY, overwrite=overwrite)
    assert objects(f"{s3.url}/photos") == {"holiday/beach.jpg": b"dear"}
    with pytest.raises(StoreError, match="is no depthmill store"):
        stores.open_store(f"{s3.url}/nothing")


def test_errors_name_the_place_and_no_credentials(s3, monkeypatch):
    with pytest.raises(StoreError, match=r"s3://there-is-no-such-bucket/s/zarr\.json cannot be written") as caught:
        stores.create("s3://there-is-no-such-bucket/s", LAYOUT, IDENTITY)
    assert "secret" not in str(caught.value)
    with pytest.raises(StoreError, match="has credentials in it") as caught:
        stores.open_store("s3://theaccesskey:thesecretkey@bucket/s")
    assert "thesecretkey" not in str(caught.value)
    assert "theaccesskey" not in str(caught.value)
    for uri in (
        "ftp://host/s",
        "https://host/s",
        "s3:///s",
        "s3://bucket/s?versionId=1",
        "s3://bucket/s[1]",
        "s3://b/*",
    ):
        with pytest.raises(StoreError, match="cannot be a store: expected a directory, s3://bucket/prefix"):
            stores.open_store(uri)
    directory = open_directory(s3.url)

    def refuse(*args, **kwargs):
        raise PermissionError("the key theaccesskey with thesecretkey\nis refused")

    monkeypatch.setattr(directory._fs, "cat_ranges", refuse)
    with pytest.raises(StoreError, match=r"cannot be read: PermissionError: the key \*\*\* with \*\*\* is refused"):
        directory.read("zarr.json")


def test_a_library_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StoreError, match=r"pip install 'depthmill\[gs\]'"):
        stores.open_store("gs://bucket/s")


def test_what_a_library_raises_it_does_not_print_as_well():
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)


@pytest.mark.slow
def test_label_into_a_bucket_killed_and_resumed(s3, checkpoints, tmp_path):
    """The command as a user gives it, killed once something is committed."""
    clip = media.write_video(tmp_path / "clip.mp4", frames=24)
    local, uri = tmp_path / "local", f"{s3.url}/labels.zarr"
    assert runs.run([clip], local, checkpoints, "--workers", "0").returncode == 0
    process = runs.start([clip], uri, checkpoints, "--workers", "0", log=subprocess.DEVNULL)
    committed, directory = 0, open_directory(uri)
    while process.poll() is None and committed < 3:
        committed = sum("/status/c/" in key for key, _ in directory.sizes())
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9, "it was over before it could be killed"
    assert 3 <= sum("/status/c/" in key for key, _ in directory.sizes()) < 12
    done = runs.run([clip], uri, checkpoints, "--workers", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert uri in done.stdout
    there = objects(uri)
    assert b"secret" not in there.pop("run.json")
    there.pop("stamps.json", None)  # there is one, unless the clip was written a moment before
    assert there == runs.contents(local)
