import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreFullError
from depthmill.pipeline.store import open_datasets
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.inspect import inspect
from depthmill.pipeline.store.layout import DEPTH_INVALID
from depthmill.pipeline.store.smoothed import smoothed as apply_smoothing
from depthmill.pipeline.store.temporal import Temporal, pack_smooth_depth
from depthmill.pipeline.store.verify import verify
from depthmill.tests.pipeline.store.samples import files, labels, write


def smoothed(store, flow="medium"):
    """Smooth the video, as far as it is not: every scale is 2."""
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=1, flow=flow, leak=0.1, shape=(1, 5))
    for segment in temporal.pending("edges"):
        temporal.write_edges(segment, np.ones((segment.frames, 1, 5), np.float32), np.ones(segment.frames, np.float32))
    if not temporal.solved():
        ones = np.ones(18, np.float32)
        temporal.write_solution(2 * ones, 0 * ones, ones.astype(np.int32))
    return temporal


@pytest.fixture
def store(store):
    for segment in store.segments("video"):
        write(store, segment)
    return store


def test_labels_are_known_by_all_their_checksums(store):
    shutil.rmtree(Path(store.uri) / "video/checksum/c/1")
    expected = np.ascontiguousarray(store.read("video", "checksum"))
    assert Temporal(store, "video").digest() == hashlib.sha256(expected.tobytes()).hexdigest()


def test_smoothing_whose_removal_was_cut_short_is_none(store, monkeypatch):
    smoothed(store, "fast")
    expected = files(store.uri)
    smoothed(store)

    def cut_short(self, key):
        shutil.rmtree(self.path / key / "scale/c")
        raise StoreError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(LocalDirectory, "remove", cut_short)
        with pytest.raises(StoreError, match="killed"):
            smoothed(store, "fast")
    with pytest.raises(StoreError, match="no smoothed source"):
        open_datasets(store.uri, smooth=True)
    smoothed(store, "fast")
    assert files(store.uri) == expected


def test_named_sources_that_are_not_smoothed_are_named(store):
    smoothed(store)
    assert list(open_datasets(store.uri, smooth=True, sources=["images", "video"])) == ["video"]
    with pytest.raises(StoreError, match=r"smoothed source among images: run `depthmill smooth .* --source images`$"):
        open_datasets(store.uri, smooth=True, sources=iter(["images"]))
    shutil.rmtree(f"{store.uri}/video")  # of pictures alone none is smoothed unless it is named
    with pytest.raises(StoreError, match=r"smoothed source among images: run `depthmill smooth .* --source images`$"):
        open_datasets(store.uri, smooth=True)
    with pytest.raises(StoreError, match="--source images"):
        apply_smoothing(store, {})  # of those that are smoothed, as previews have it


@pytest.mark.parametrize("name", ["edges", "score", "scale", "shift", "shot", "filtered"])
def test_an_array_that_lost_its_metadata_is_made_again(store, name):
    smoothed(store)
    expected = files(store.uri)
    for harm in (Path.unlink, lambda path: path.write_bytes(b"nonsense")):
        harm(Path(store.uri) / f"video/temporal/{name}/zarr.json")
        found = verify(store, repair=True).damage
        assert [(one.file, one.repaired) for one in found] == [(f"video/temporal/{name}/zarr.json", True)]
        assert smoothed(store).read("scale").tolist() == [2] * 18
        assert files(store.uri) == expected
    assert not verify(store).damage


@pytest.mark.parametrize("name", ["edges/c/0/0/0", "scale/c/0", "shift/c/0", "shot/c/0"])
def test_a_file_that_was_lost_is_made_again(store, name):
    smoothed(store)
    expected = files(store.uri)
    (Path(store.uri) / "video/temporal" / name).unlink()
    verify(store, repair=True)
    smoothed(store)
    assert files(store.uri) == expected


def test_what_was_made_of_labels_that_were_damaged_is_made_again(store):
    """The mended labels are those that its attributes name."""
    temporal = smoothed(store)
    expected = files(store.uri)
    (Path(store.uri) / "video/depth/c/1/0/0").unlink()
    verify(store)
    assert temporal.current()
    verify(store, repair=True)
    write(store, *store.pending("video"))
    assert not temporal.current()
    assert temporal.pending("edges") == store.segments("video")
    with pytest.raises(StoreError, match="not smoothed, or not to the end"):
        opened(store)
    smoothed(store)
    assert files(store.uri) == expected


def opened(store):
    return open_datasets(store.uri, smooth=True)


@pytest.mark.parametrize(
    ("key", "reads"),
    [("video/temporal/zarr.json", (opened, smoothed)), ("video/temporal/scale/zarr.json", (opened,))],
)
def test_damaged_metadata_is_named_with_what_repairs_it(store, key, reads):
    smoothed(store)
    for data in (b"", b"\xffnonsense"):
        (Path(store.uri) / key).write_bytes(data)
        for read in reads:
            with pytest.raises(StoreError, match=f"{key} is damaged .*: run `depthmill verify {store.uri} --repair`"):
                read(store)
        assert [one.file for one in verify(store, repair=True).damage] == [key]
        assert smoothed(store).read("scale").tolist() == [2] * 18


@pytest.mark.parametrize(
    ("name", "old", "new", "readable"),
    [
        ("temporal", "labels", "label5", False),
        ("temporal/score", "shape", "shade", True),
        ("temporal/scale", "float32", "float92", False),
        ("temporal/shift", "chunk_shape", "chunk_shade", False),
        ("temporal/edges", "fill_value", "fill_valve", True),
    ],
)
def test_metadata_of_which_a_byte_changed_is_found(store, name, old, new, readable):
    smoothed(store)
    expected = files(store.uri)
    path = Path(store.uri) / f"video/{name}/zarr.json"
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))
    if not readable:
        with pytest.raises(StoreError, match=f"video/{name}.* is damaged .*: run `depthmill verify {store.uri}"):
            opened(store)
    assert inspect(store).sources[1].smoothing == ("damaged" if name == "temporal" else "smoothed")
    assert [one.file for one in verify(store, repair=True).damage] == [f"video/{name}/zarr.json"]
    smoothed(store)
    assert files(store.uri) == expected


def test_what_damaged_metadata_keeps_from_being_written_says_so(store):
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    segment, path = temporal.pending("edges")[0], Path(store.uri) / "video/temporal/score/zarr.json"
    for harm in (lambda: path.write_text(path.read_text().replace("chunk_grid", "chunk_grad")), path.unlink):
        harm()
        with pytest.raises(StoreDamagedError, match=r"temporal/score.* is damaged .*: run `depthmill verify"):
            temporal.write_edges(segment, np.ones((8, 1, 5), np.float32), np.ones(8, np.float32))


def test_scales_that_are_not_solved_yet_are_not_zero(store):
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    assert np.isnan([temporal.read(name) for name in ("scale", "shift")]).all()


def test_edges_that_could_not_be_written_are_pending(store, monkeypatch):
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    segment = temporal.pending("edges")[0]

    def full(partial, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(StoreFullError):
            temporal.write_edges(
                segment, np.ones((segment.frames, 1, 5), np.float32), np.ones(segment.frames, np.float32)
            )
    Path(store.uri, "video/temporal/edges/c/0/0").mkdir(parents=True, exist_ok=True)  # as if killed before the file was
    assert temporal.pending("edges")[0] == segment


def test_other_edges_un_commit_what_was_solved_of_them_and_the_same_do_not(store):
    temporal = smoothed(store)
    segment = store.segments("video")[0]
    edges, score = np.ones((segment.frames, 1, 5), np.float32), np.ones(segment.frames, np.float32)
    temporal.write_edges(segment, edges, score)
    assert temporal.solved()
    temporal.write_edges(segment, 2 * edges, score)
    assert not temporal.solved()


def test_another_leak_is_solved_anew_from_the_same_edges(store):
    temporal = smoothed(store)
    temporal.prepare(max_edge=1, flow="medium", leak=0.2, shape=(1, 5))
    assert not temporal.solved()
    assert temporal.pending("edges") == []


def test_smoothing_is_of_the_labels_and_not_of_their_status(store):
    temporal = smoothed(store)
    segment = store.segments("video")[0]
    writer = store.writer(segment)
    depth, normals = labels(1)
    for index in range(8):
        writer.put(index, depth / 2, normals)
    writer.commit()
    assert temporal.stale()


def test_smoothed_depth_that_leaves_the_range_is_held_to_it_and_valid():
    depth = np.array([[-9, -4, 0, 1, 100, np.nan]], np.float32)
    assert pack_smooth_depth(depth).tolist() == [[0, 0, 4 * 5120, 5 * 5120, DEPTH_INVALID - 1, DEPTH_INVALID]]
