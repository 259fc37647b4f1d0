import dataclasses
import json
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreMismatchError
from depthmill.pipeline.store import Progress, root
from depthmill.pipeline.store.inspect import inspect
from depthmill.pipeline.store.root import read_root
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write


def test_what_a_worker_adds_and_commits_is_never_invisible(store, tmp_path):
    """The driver may be killed before it publishes."""
    worker = stores.open_store(store.uri)
    root = files(store.uri)["zarr.json"]
    new = dataclasses.replace(IMAGES, id="new", uri="/in/new")
    worker.add_source(new)
    write(worker, Segment("new", 0, 5))
    assert files(store.uri)["zarr.json"] == root
    other_worker = stores.open_store(store.uri)
    assert other_worker.pending("new") == []
    fresh = stores.open_store(store.uri)
    assert fresh.sources() == ["images", "new", "video"]
    dataset = depthmill.open(store.uri)["new"]
    assert dataset["key"].values.tolist() == list(IMAGES.keys)
    assert np.abs(dataset["depth"][2].values - labels(2)[0]).max() <= 1e-4
    store.publish(["new", "video"])
    assert "new" in dict(zarr.open_group(store.uri, mode="r").groups())
    other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    other.add(new, IMAGES, VIDEO)
    write(other, Segment("new", 0, 5))
    assert files(store.uri) == files(other.uri), "the order of adding and publishing is not to be seen"


def test_a_source_without_its_groups_document_is_none(store):
    """What a killed add leaves; whoever adds the source next overwrites it."""
    new = dataclasses.replace(IMAGES, id="new")
    store.add_source(new)
    whole = files(store.uri)
    (Path(store.uri) / "new/zarr.json").unlink()
    (Path(store.uri) / "new/key/c/0").write_bytes(b"half")
    fresh = stores.open_store(store.uri)
    assert fresh.sources() == ["images", "video"]
    with pytest.raises(StoreError, match="no source 'new'"):
        fresh.segments("new")
    with pytest.raises(StoreError, match="no source 'new'"):
        fresh.publish(["new"])
    fresh.add_source(new)
    assert files(store.uri) == whole


def test_groups_and_arrays_of_the_users_are_no_sources(store):
    write(store, Segment("images", 0, 5))
    root = zarr.open_group(store.uri, mode="r+", use_consolidated=False)
    root.create_group("splits").create_array("train", shape=5, dtype="uint8")
    root.create_array("weights", shape=2, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other Zarrs may not know strings
        for names in ({"images", "video"}, {"images", "splits", "video", "weights"}):
            assert {name.partition("/")[0] for name in read_root(store.directory).members} == names
            found = stores.open_store(store.uri)
            assert found.sources() == ["images", "video"]
            assert len(inspect(found).sources) == verify(found).sources == 2
            assert list(depthmill.open(store.uri, sources=["images"])) == ["images"]
            zarr.consolidate_metadata(store.uri)


def test_a_source_that_changed_is_refused_by_every_process(store):
    worker = stores.open_store(store.uri)
    store.add_source(dataclasses.replace(IMAGES, id="new"))
    with pytest.raises(StoreMismatchError, match='fingerprint: "f2" there, "f9" now'):
        worker.add_source(dataclasses.replace(IMAGES, id="new", fingerprint="f9"))


def test_many_processes_may_add_the_same_sources(store):
    sources = [dataclasses.replace(IMAGES, id=f"s{i}") for i in range(6)]
    errors = []

    def add():
        try:
            worker = stores.open_store(store.uri)
            for source in sources:
                worker.add_source(source)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    groups = {source.id: {} for source in sources}
    for key, data in files(store.uri).items():
        source_id, _, rest = key.partition("/")
        if source_id in groups:
            groups[source_id][rest] = data
    assert all(group == groups["s0"] for group in groups.values())
    assert len(groups["s0"]) == 9


def test_publishing_keeps_what_it_does_not_know(store):
    """Members of another version, and a root that another program wrote in its own way."""
    path = Path(store.uri) / "zarr.json"
    root = json.loads(path.read_text())
    foreign = {"zarr_format": 3, "node_type": "group", "attributes": {"by": "someone"}}
    root["consolidated_metadata"]["metadata"]["video/temporal"] = foreign
    path.write_text(json.dumps(root, indent=1))
    again = stores.open_store(store.uri)
    assert again.sources() == ["images", "video"]
    again.add(dataclasses.replace(IMAGES, id="new"))
    members = json.loads(path.read_text())["consolidated_metadata"]["metadata"]
    assert members.pop("video/temporal") == foreign
    assert list(members) == sorted(members)
    assert sum("/" not in name for name in members) == 3


def test_a_source_whose_directory_was_removed_is_no_more_and_can_be_another(store):
    write(store, Segment("images", 0, 5))
    before, group = files(store.uri), Path(store.uri) / "images"
    shutil.rmtree(group)
    assert stores.open_store(store.uri).sources() == ["video"]
    stores.create(store.uri, LAYOUT, IDENTITY).add(IMAGES)
    write(store, Segment("images", 0, 5))
    assert files(store.uri) == before
    shutil.rmtree(group)
    grown = dataclasses.replace(IMAGES, fingerprint="f9", height=48)
    driver, worker = stores.create(store.uri, LAYOUT, IDENTITY), stores.open_store(store.uri)
    worker.add_source(grown)
    worker.writer(Segment("images", 0, 5)).put(0, *labels(0, 48))
    driver.publish(["images"])
    assert stores.open_store(store.uri).attributes("images")["size"] == [48, 32]


def test_what_was_removed_of_a_source_is_written_anew(store):
    """Its index is right, and what is committed stays."""
    write(store, Segment("video", 0, 8))
    before, group = files(store.uri), Path(store.uri) / "video"
    for path in (group / "zarr.json", group / "depth/zarr.json", group / "time/c/0"):
        path.unlink()
    again = stores.create(store.uri, LAYOUT, IDENTITY)
    assert not again.has("video")
    with pytest.raises(StoreMismatchError, match=f"remove {group} and run the same command again"):
        again.add_source(dataclasses.replace(VIDEO, fingerprint="f9"))
    again.add_source(VIDEO)
    assert again.has("video")
    assert files(store.uri) == before


def test_a_source_that_lies_elsewhere_behind_a_link_stays(store, tmp_path):
    (Path(store.uri) / "video").rename(tmp_path / "elsewhere")
    (Path(store.uri) / "video").symlink_to(tmp_path / "elsewhere")
    before = files(store.uri)
    again = stores.create(store.uri, LAYOUT, IDENTITY)
    assert again.sources() == ["images", "video"]
    assert files(store.uri) == before


def test_progress(store):
    write(store, Segment("video", 8, 16))
    assert store.progress("video") == Progress(pending=((0, 1), (2, 3)), labelled=8, failed=0)
    assert store.progress("images") == Progress(pending=((0, 1),), labelled=0, failed=0)
    write(store, Segment("video", 16, 18), failed={16})
    assert store.progress("video") == Progress(pending=((0, 1),), labelled=9, failed=1)
    write(store, Segment("video", 0, 8))
    assert store.progress("video") == Progress(pending=(), labelled=17, failed=1)
    assert store.failed_segments("video") == [(Segment("video", 16, 18), (16,))]
    assert store.failed_segments("images") == []
    assert store.segment_frames("video") == 8


def test_a_new_store_without_sources_can_be_removed(store, tmp_path):
    store.remove_if_empty()
    assert store.sources() == ["images", "video"]
    empty = stores.create(tmp_path / "empty", LAYOUT, IDENTITY)
    empty.remove_if_empty()
    assert not (tmp_path / "empty").exists()


def test_no_more_is_removed_than_the_store_wrote_itself(tmp_path):
    new = stores.create(tmp_path / "s", LAYOUT, IDENTITY)
    before = files(new.uri)
    stores.create(new.uri, LAYOUT, IDENTITY).remove_if_empty()
    assert files(new.uri) == before, "another run made it"
    (tmp_path / "s/video").mkdir()
    (tmp_path / "s/video/half").write_bytes(b"of a source that another process is adding")
    new.remove_if_empty()
    assert files(new.uri) == {**before, "video/half": b"of a source that another process is adding"}
    (tmp_path / "s/video").rename(tmp_path / "elsewhere")
    (tmp_path / "s/notes.txt").write_bytes(b"mine")
    new.remove_if_empty()
    assert files(new.uri) == {"notes.txt": b"mine"}
    with pytest.raises(ValueError, match="never removed whole"):
        new.directory.remove("")


@pytest.mark.parametrize("whole", [False, True], ids=["as we write it", "as zarr does"])
def test_writers_need_no_index(tmp_path, monkeypatch, whole):
    """A worker, or prober, of many thousands of sources reads the root's first line alone."""
    kept = {}
    for name, index in (("a", True), ("b", False)):
        path = tmp_path / name
        stores.create(path, LAYOUT, IDENTITY).add(VIDEO)
        if whole:
            (path / "zarr.json").write_text(json.dumps(json.loads((path / "zarr.json").read_text()), indent=1))
        with monkeypatch.context() as patch:
            if not index and not whole:
                patch.setattr(root, "read_root", lambda directory: pytest.fail("read whole"))
            store = stores.open_store(path, index=index)
            store.add_source(IMAGES)
            for source in (VIDEO, IMAGES):
                write(store, store.segments(source.id)[0])
            write(store, store.segments("video")[0], failed=[3], redo=[3])
        assert (store.layout, store.identity) == (LAYOUT, IDENTITY)
        assert store.failed_segments("video") == [(store.segments("video")[0], (3,))]
        store.publish(["images"])
        assert verify(store).damage == ()
        kept[name] = {key: data for key, data in files(path).items() if key != "zarr.json"}
    assert kept["a"] == kept["b"]


@pytest.mark.parametrize("lost", ["video/zarr.json", "video/checksum/zarr.json"])
@pytest.mark.parametrize("index", [True, False])
def test_the_root_tells_what_a_damaged_file_of_a_source_was(store, lost, index):
    before = files(store.uri)
    path = Path(store.uri) / lost
    path.write_bytes(b"")
    if "checksum" in lost:
        path.unlink()
    again = stores.open_store(store.uri, index=index)
    again.add_source(VIDEO)
    write(again, Segment("video", 0, 8))
    with pytest.raises(StoreMismatchError):
        again.add_source(dataclasses.replace(VIDEO, fingerprint="f9"))
    report = verify(stores.open_store(store.uri), repair=True)
    assert [(damage.file, damage.repaired) for damage in report.damage] == [(lost, True)]
    assert before.items() <= files(store.uri).items()


def test_a_damaged_source_that_no_root_names_is_told_and_hides_no_other(store):
    store.add_source(dataclasses.replace(VIDEO, id="new"))
    path = Path(store.uri) / "new/zarr.json"
    whole = path.read_bytes()
    path.write_bytes(b"")
    worker = stores.open_store(store.uri, index=False)
    with pytest.raises(StoreDamagedError, match=r"new/zarr.json is damaged .*remove the directory"):
        worker.progress("new")
    assert worker.progress("video").labelled == 0
    driver = stores.create(store.uri, LAYOUT, IDENTITY)
    driver.publish(["new", "video"])
    assert driver.sources() == ["images", "video"]
    assert list(driver.damaged) == ["new"]
    assert [(failure.source_id, failure.frame) for failure in driver.failures()] == [("new", None)]
    path.write_bytes(whole)
    assert worker.progress("new").labelled == 0
    shutil.rmtree(path.parent)
    assert driver.sources() == ["images", "video"]
    assert not driver.damaged
