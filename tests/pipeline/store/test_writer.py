import json
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store import layout
from depthmill.pipeline.store import writer as writing
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.records import write_failures
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Failure, Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write


def test_the_order_of_rows_does_not_change_a_byte(store, tmp_path):
    other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    other.add(IMAGES)  # nor does the order of sources
    other.add(VIDEO)
    for segment in store.segments("video"):
        write(store, segment)
    for segment in reversed(other.segments("video")):
        writer = other.writer(segment)
        for index in np.random.default_rng(0).permutation(range(segment.start, segment.stop)).tolist():
            writer.put(index, *labels(index))
        writer.commit()
    assert files(store.uri) == files(other.uri)


def test_a_shard_is_written_as_soon_as_it_is_full_and_then_let_go(store):
    writer = store.writer(Segment("video", 0, 8))
    for index in (3, 1, 0):
        writer.put(index, *labels(index))
    shards = Path(store.uri) / "video" / "depth" / "c"
    assert not shards.exists()
    assert writer.waiting_bytes == 3 * 24 * 32 * (2 + 3)
    writer.put(2, *labels(2))
    writer._finish_writing()
    assert [path.name for path in shards.iterdir()] == ["0"]
    assert writer._rows == {}
    assert writer.waiting_bytes == 0
    assert store.status("video").max() == PENDING, "not committed yet"


@pytest.mark.parametrize(
    ("where", "step", "most"),
    [(writing, "encode_chunk", 4), (LocalDirectory, "write", 7)],
    ids=["to be compressed", "to be written"],
)
def test_rows_wait_up_to_a_shard_of_them(store, monkeypatch, where, step, most):
    free, original = threading.Event(), getattr(where, step)

    def held(*args):
        free.wait(10)
        return original(*args)

    monkeypatch.setattr(where, step, held)
    monkeypatch.setattr(writing, "_SHARDS_WRITTEN_AT_ONCE", 1)
    monkeypatch.setattr("depthmill.pipeline.store.writer.cores", lambda: 2)
    writer = store.writer(Segment("video", 0, 8))
    for index in range(most):
        writer.put(index, *labels(index))  # a batch comes at once: who gives it does not wait
    more = threading.Thread(target=writer.put, args=(most, *labels(most)))
    more.start()
    more.join(0.2)
    assert more.is_alive(), "memory is bounded"
    free.set()
    more.join(10)
    assert not more.is_alive()


def test_no_two_segments_share_a_file(store):
    written = []
    for segment in store.segments("video"):
        before = files(store.uri)
        write(store, segment)
        written.append(files(store.uri).keys() - before.keys())
        assert files(store.uri).items() >= before.items()
    assert sum(map(len, written)) == len(set.union(*map(set, written)))
    assert verify(store).damage == (), "each has its checksums, the short one at the end too"


def test_failed_frames_keep_their_reason(store):
    (segment,) = store.segments("images")
    writer = store.writer(segment)
    for index in range(5):
        if index in (1, 3):
            writer.fail(index, f"picture {index} is öken")
        else:
            writer.put(index, *labels(index))
    assert store.failures() == []
    writer.commit()
    assert store.failures() == [
        Failure("/in/images", "images", 1, "picture 1 is öken", key="ö/b.png"),
        Failure("/in/images", "images", 3, "picture 3 is öken", key="d"),
    ]
    assert store.status("images").tolist() == [LABELLED, FAILED, LABELLED, FAILED, LABELLED]
    dataset = depthmill.open(store.uri)["images"]
    assert np.isnan(dataset["depth"][1].values).all()
    assert dataset["reason"].values.tolist() == ["", "picture 1 is öken", "", "picture 3 is öken", ""]
    write_failures(store.directory, [*store.failures(), Failure("/in/a.mp4", None, None, "no such file")])
    path = Path(store.uri, "failures.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["uri"], line["frame"], line.get("key")) for line in lines] == [
        ("/in/a.mp4", None, None),
        ("/in/images", 1, "ö/b.png"),
        ("/in/images", 3, "d"),
    ]
    # What is no part of the hierarchy does not disturb its readers (a warning is an error here).
    (Path(store.uri) / "run.json").write_text("{}")
    xarray.open_datatree(store.uri, engine="zarr")
    assert dict(zarr.open_group(store.uri, mode="r").groups()).keys() == {"images", "video"}


def test_failures_that_are_told_are_not_written_again(store):
    """A finished store may be where nothing can be written."""
    write(store, Segment("images", 0, 5), failed={2})
    write_failures(store.directory, store.failures())
    path = Path(store.uri, "failures.jsonl")
    before = path.stat().st_ino
    write_failures(store.directory, store.failures())
    assert path.stat().st_ino == before


def test_a_shard_that_could_not_be_written_is_not_committed(store, monkeypatch):
    def full(path, data, root):
        raise OSError(28, "No space left on device")

    segment = Segment("video", 16, 18)
    writer = store.writer(segment)
    with monkeypatch.context() as patch:
        patch.setattr("depthmill.pipeline.store.files.write_atomically", full)
        for index in (16, 17):
            writer.put(index, *labels(index))
        with pytest.raises(StoreError, match=r"video/depth/c/4/0/0 cannot be written: No space left"):
            writer.commit()
    assert segment in store.pending("video")
    write(store, segment)
    assert segment not in store.pending("video")


def test_labels_that_come_packed_are_written_as_those_that_do_not(store, tmp_path):
    other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    other.add(VIDEO)
    segment = Segment("video", 0, 8)
    write(store, segment)
    writer = other.writer(segment)
    for index in range(8):
        depth, normals = labels(index)
        writer.put(index, layout.pack_depth(depth), layout.pack_normals(normals, LAYOUT.normals_dtype))
    writer.commit()
    for name in ("depth", "normals"):
        assert files(Path(store.uri) / "video" / name / "c") == files(Path(other.uri) / "video" / name / "c")
    depth, normals = labels(8)
    with pytest.raises(StoreError, match=r"normals of frame 8 .* is int16; expected float32, or packed as int8"):
        other.writer(Segment("video", 8, 16)).put(8, depth, layout.pack_normals(normals, "int16"))


def test_misuse_is_refused(store):
    writer = store.writer(Segment("video", 8, 16))
    depth, normals = labels(0)
    with pytest.raises(StoreError, match=r"frame 3 is not in video\[8:16\]"):
        writer.put(3, depth, normals)
    with pytest.raises(StoreError, match="has no normals"):
        writer.put(8, depth, None)
    with pytest.raises(StoreError, match=r"depth of frame 8 of video\[8:16\] is \(23, 32\), not \(24, 32\)"):
        writer.put(8, depth[1:], normals)
    writer.put(8, depth, normals)
    with pytest.raises(StoreError, match=r"frame 8 of .* was given twice"):
        writer.fail(8, "again")
    writer.fail(9, "broken")
    with pytest.raises(StoreError, match=r"frame 9 of .* was given twice"):
        writer.put(9, depth, normals)
    with pytest.raises(StoreError, match=r"frames \[10, 11, 12, 13, 14, 15\] were never given"):
        writer.commit()
    images = store.writer(Segment("images", 0, 5))
    with pytest.raises(StoreError, match=r"not at most \(24, 32\)"):
        images.put(0, *labels(0, 25, 32))
    with pytest.raises(StoreError, match=r"not at most \(24, 32\)"):
        images.put(0, *labels(0, 24, 33))
    with pytest.raises(StoreError, match="different sizes"):
        images.put(0, labels(0, 10, 10)[0], labels(0, 10, 11)[1])
    for segment in (Segment("video", 0, 4), Segment("video", 16, 24)):
        with pytest.raises(StoreError, match="is no segment of"):
            store.writer(segment)
    with pytest.raises(StoreError, match=r"no source 'nobody'; it has \['images', 'video'\]"):
        store.segments("nobody")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("caf\udce9: no picture", "caf\\udce9: no picture"), ("", "no reason was given")],
    ids=["a file whose name is no UTF-8", "nothing"],
)
def test_whatever_the_reason_says_it_is_kept(store, given, kept):
    write(store, Segment("images", 0, 5), range(5), given)
    assert {failure.reason for failure in store.failures()} == {kept}
