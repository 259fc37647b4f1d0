import dataclasses
import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
import zarr

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError, StoreMismatchError
from depthmill.pipeline.store import Layout, layout, opening
from depthmill.pipeline.store.records import write_failures
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, write


def test_resume_goes_on_where_it_stopped(store):
    write(store, Segment("video", 8, 16))
    again = stores.create(store.uri, LAYOUT, dict(reversed(IDENTITY.items())))
    again.add(VIDEO, IMAGES)
    assert again.pending("video") == [Segment("video", 0, 8), Segment("video", 16, 18)]
    assert again.segments("video") == [Segment("video", 0, 8), Segment("video", 8, 16), Segment("video", 16, 18)]
    assert again.layout == LAYOUT
    assert again.identity == IDENTITY
    assert again.sources() == ["images", "video"]


def test_the_index_of_a_store_that_is_gone_on_with_is_read_once(store, monkeypatch):
    """It has some 4 kB a source."""
    reads, read = [], opening.read_root
    monkeypatch.setattr(opening, "read_root", lambda directory: reads.append(directory) or read(directory))
    assert stores.create(store.uri, LAYOUT, IDENTITY).sources() == ["images", "video"]
    assert len(reads) == 1


def test_a_store_whose_labels_were_compressed_otherwise_is_gone_on_with(tmp_path, monkeypatch):
    now = layout.label_codecs

    def slower(dtype, ndim):
        codecs = now(dtype, ndim)
        codecs[-1]["configuration"] |= {"clevel": 2, "blocksize": 2**18}
        return codecs

    segments = Segment("video", 0, 8), Segment("video", 8, 16), Segment("video", 16, 18)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "label_codecs", slower)
        old = stores.create(tmp_path / "old", LAYOUT, IDENTITY)
        old.add(VIDEO)
        write(old, segments[0])
    again = stores.create(tmp_path / "old", LAYOUT, IDENTITY)
    again.add(VIDEO)
    write(again, segments[1])
    write(again, segments[2])
    write(again, segments[0], redo=[3])
    new = stores.create(tmp_path / "new", LAYOUT, IDENTITY)
    new.add(VIDEO)
    for segment in segments:
        write(new, segment)
    for name in ("depth", "normals"):
        ours, theirs = (zarr.open_array(f"{store.uri}/video/{name}", mode="r") for store in (again, new))
        assert ours.metadata.codecs != theirs.metadata.codecs
        assert np.array_equal(ours[:], theirs[:])
    assert verify(again).damage == ()


def test_a_store_of_another_run_is_refused_naming_every_difference(store):
    before = files(store.uri)
    other = {"checkpoint": {"id": "demo", "sha256": "bb"}, "dtype": "bf16"}
    with pytest.raises(StoreMismatchError) as caught:
        stores.create(store.uri, Layout(shard_frames=2, segment_frames=8), other)
    message = str(caught.value)
    assert 'identity.checkpoint.sha256: "aa" there, "bb" now' in message
    assert "identity.processing_resolution: 768 there, absent now" in message
    assert 'identity.dtype: absent there, "bf16" now' in message
    assert "layout.shard_frames: 4 there, 2 now" in message
    assert "identity.checkpoint.id" not in message
    assert "--overwrite" in message
    assert files(store.uri) == before


def test_a_source_that_changed_is_refused(store):
    again = stores.open_store(store.uri)
    changed = dataclasses.replace(VIDEO, fingerprint="f9", frames=19, time_s=np.arange(19) / 10)
    with pytest.raises(StoreMismatchError) as caught:
        again.add(changed)
    assert 'fingerprint: "f1" there, "f9" now' in str(caught.value)
    assert "frames: 18 there, 19 now" in str(caught.value)
    assert VIDEO.uri in str(caught.value)


def test_pictures_of_which_another_limit_lets_in_larger_ones_name_the_limit(store):
    grown = dataclasses.replace(IMAGES, height=48)
    with pytest.raises(StoreMismatchError, match=r"(?s)size: \[24, 32\] there, .*Give --max-pixels as it was then;"):
        store.add_source(grown)
    store.directory.write("run.json", b'{"config": {"max_pixels": 1000}}')
    with pytest.raises(StoreMismatchError, match=r"as it was then \(in the last run that labelled something, 1000\)"):
        store.add_source(grown)
    for changed in (dataclasses.replace(grown, fingerprint="f9"), dataclasses.replace(VIDEO, height=48)):
        with pytest.raises(StoreMismatchError, match="changed since"):
            store.add_source(changed)


def test_attributes_that_a_user_added_to_a_source_change_nothing(store):
    path = Path(store.uri) / "zarr.json"
    root = json.loads(path.read_text())
    root["consolidated_metadata"]["metadata"]["video"]["attributes"]["note"] = "mine"
    path.write_text(json.dumps(root))
    stores.open_store(store.uri).add_source(VIDEO)


def test_a_checkpoint_is_known_by_its_hash_whatever_it_is_called(tmp_path):
    def identity(name, sha256):
        return {"checkpoints": {"depth": {"name": name, "sha256": sha256}}}

    stores.create(tmp_path, LAYOUT, identity("ckpt", "aa"))
    again = stores.create(tmp_path, LAYOUT, identity("/home/me/ckpt", "aa"))
    assert again.identity == identity("ckpt", "aa")
    with pytest.raises(StoreMismatchError, match=r'(?s)depth\.name: "ckpt" there.*depth\.sha256: "aa" there, "bb" now'):
        stores.create(tmp_path, LAYOUT, identity("/home/me/ckpt", "bb"))


def test_the_order_in_which_labels_were_named_does_not_matter(tmp_path):
    stores.create(tmp_path, Layout(("normals", "depth")), IDENTITY)
    assert stores.create(tmp_path, Layout(("depth", "normals")), IDENTITY).layout.labels == ("normals", "depth")
    with pytest.raises(StoreMismatchError, match="labels"):
        stores.create(tmp_path, Layout(("depth",)), IDENTITY)


def test_segments_that_nobody_asked_for_are_as_long_as_the_store_s(tmp_path):
    stores.create(tmp_path, Layout(segment_frames=32, corpus_segment_frames=64), IDENTITY)
    again = stores.create(tmp_path, Layout(), IDENTITY, own_segments=True)
    assert (again.layout.segment_frames, again.layout.corpus_segment_frames) == (32, 64)
    with pytest.raises(StoreMismatchError, match=r"other run:\n  layout\.shard_frames: 16 there, 8 now\nGive"):
        stores.create(tmp_path, Layout(shard_frames=8), IDENTITY, own_segments=True)
    anew = stores.create(tmp_path, Layout(), IDENTITY, own_segments=True, overwrite=True)
    assert (anew.layout.segment_frames, anew.layout.corpus_segment_frames) == (64, None)


def test_overwrite_starts_anew(store, tmp_path):
    write(store, Segment("video", 0, 8))
    write_failures(store.directory, store.failures())
    (Path(store.uri) / "notes.txt").write_text("mine")
    new = stores.create(store.uri, Layout(), {"other": 1}, overwrite=True)
    assert new.sources() == []
    expected = stores.create(tmp_path / "fresh", Layout(), {"other": 1})
    assert files(new.uri) == {**files(expected.uri), "notes.txt": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_depthmill_store_is_never_touched(tmp_path, overwrite):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("dear")
    zarr.create_group(tmp_path / "other.zarr", attributes={"theirs": 1})
    (tmp_path / "file").write_text("dear")
    before = files(tmp_path)
    for name, message in [("photos", "holiday.jpg"), ("other.zarr", "no depthmill store"), ("file", "is a file")]:
        with pytest.raises(StoreError, match=message):
            stores.create(tmp_path / name, LAYOUT, IDENTITY, overwrite=overwrite)
    assert files(tmp_path) == before


def test_opening_what_is_not_there(tmp_path, store):
    with pytest.raises(StoreError, match=f"is no depthmill store: .*, as {re.escape(platform.node())} sees it"):
        stores.open_store(tmp_path / "nothing")
    root = json.loads((Path(store.uri) / "zarr.json").read_text())
    root["attributes"]["depthmill"]["format"] = 99
    (Path(store.uri) / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match="store format 99"):
        stores.open_store(store.uri)


def test_source_ids_are_group_names(store):
    for bad in ("a/b", "", "..", ".hidden", "zarr.json"):
        with pytest.raises(StoreError, match="cannot name a group"):
            store.add(dataclasses.replace(VIDEO, id=bad))
