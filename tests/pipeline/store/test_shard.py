import dataclasses

import numpy as np
import pytest
import zarr

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.files import open_directory
from depthmill.pipeline.store.layout import array_document, checksum, pack_depth, pack_normals, segment_files
from depthmill.pipeline.store.shard import assemble, read_rows, split, write_plain
from depthmill.pipeline.store.zarr_files import ZarrFiles, open_array
from depthmill.pipeline.types import FAILED, LABELLED, Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, VIDEO, files, labels


def rows(normals_dtype):
    """The packed labels of five pictures of which one has failed and one is invalid all over; on their canvas."""
    depth, normals = np.full((5, 24, 32), 0xFFFF, np.uint16), np.zeros((5, 24, 32, 3), normals_dtype)
    for row, (height, width) in {0: (24, 32), 1: (7, 31), 4: (24, 30)}.items():
        one, other = labels(row, height, width)
        depth[row, :height, :width] = pack_depth(one)
        normals[row, :height, :width] = pack_normals(other, normals_dtype)
    depth[0, :20] = 100  # what compresses well, and what does not
    normals[4, 3, 3] = -0.0
    return depth, normals


@pytest.mark.parametrize("normals_dtype", ["int8", "int16", "float16"])
@pytest.mark.parametrize("shard_frames", [2, 4, 8])
def test_bytes_are_those_that_zarr_writes(tmp_path, normals_dtype, shard_frames):
    store = stores.create(tmp_path / "ours", Layout(("depth", "normals"), shard_frames, 8, normals_dtype), IDENTITY)
    store.add(IMAGES)
    theirs = stores.create(tmp_path / "theirs", store.layout, IDENTITY)
    theirs.add(IMAGES)
    sizes = [(24, 32), (7, 31), (10, 10), None, (24, 30)]
    written = rows(normals_dtype)
    writer = store.writer(Segment("images", 0, 5))
    for row, size in enumerate(sizes):
        if size is None:
            writer.fail(row, "gone")
        else:
            writer.put(row, *(label[row, : size[0], : size[1]] for label in written))
    writer.commit()
    for name, label in zip(("depth", "normals"), written, strict=True):
        array = theirs.array("images", name)
        for start in range(0, 5, shard_frames):
            array[start : start + shard_frames] = label[start : start + shard_frames]
        assert np.array_equal(zarr.open_array(f"{store.uri}/images/{name}", mode="r")[:], label)
    theirs.array("images", "size")[:] = [size or (0, 0) for size in sizes]
    theirs.array("images", "reason")[:] = np.array(["", "", "", "gone", ""], object)
    theirs.array("images", "status")[:] = [LABELLED, LABELLED, LABELLED, FAILED, LABELLED]
    columns = segment_files(Segment("images", 0, 5), theirs.arrays("images"))
    sums = {key: checksum(data) for key, data in files(theirs.uri).items()}
    theirs.array("images", "checksum")[0, : len(columns)] = np.array([sums.get(key, 0) for key in columns], np.uint64)
    ours = {key: data for key, data in files(store.uri).items() if "/c/" in key}
    assert ours == {key: data for key, data in files(theirs.uri).items() if "/c/" in key}
    shards = [key for key in ours if key.startswith(("images/depth", "images/normals"))]
    assert len(shards) == {2: 4, 4: 4, 8: 2}[shard_frames], "a shard of nothing but fill is no file"


@pytest.mark.parametrize(
    ("fill", "dtype", "values"),
    [
        (0, "uint8", [0, 0, 0, 0, 0, 0, 1, 2, 3]),
        ("NaN", "float32", [np.nan, np.nan, np.nan, np.nan, -1.5, np.nan, 0, 1, 2]),
        (0, "float32", [0, 0, 0, 0, -0.0, 0, 0, 0, 0]),
        (-1, "int32", [-1, -1, -1, -1, 4, 5, 6, 7, 8]),
        (0, "uint64", [2**63, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("", "string", ["", "", "", "", "ö", "/b\0", "", "", ""]),
    ],
)
def test_plain_arrays_are_those_that_zarr_writes(tmp_path, fill, dtype, values):
    document = array_document((9,), 4, dtype, fill, ("frame",), {})
    given = np.array(values, object if dtype == "string" else dtype)
    ours, theirs = (open_directory(tmp_path / name) for name in ("ours", "theirs"))
    (tmp_path / "ours/video/x/c").mkdir(parents=True)
    (tmp_path / "ours/video/x/c/0").write_text("an earlier attempt")
    (tmp_path / "theirs/video").mkdir(parents=True)
    (tmp_path / "theirs/zarr.json").touch()
    (tmp_path / "ours/zarr.json").touch()
    open_array(ZarrFiles(theirs), "video/x", document)[:] = given
    sums = write_plain(ours, "video", "x", document, 0, given[:4])
    sums |= write_plain(ours, "video", "x", document, 4, given[4:])
    there = files(tmp_path / "ours")
    assert there == files(tmp_path / "theirs")
    assert sums == {key: checksum(there[key]) if key in there else 0 for key in (f"video/x/c/{i}" for i in range(3))}
    read = read_rows(ours, "video", "x", document, slice(1, 8))
    assert np.array_equal(read, given[1:8], equal_nan=dtype == "float32")


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:-20] + b"\1" + data[-19:], lambda _: b""]
)
def test_a_shard_whose_index_is_broken_has_no_chunks(change):
    document = array_document((4, 2, 2), 4, "uint8", 0, ("frame", "y", "x"), {})
    data = assemble({2: b"chunk"}, document)
    assert split(data, document) == {2: b"chunk"}
    with pytest.raises(ValueError, match="index"):
        split(change(data), document)


def test_times_are_stored_as_the_array_has_them_whatever_they_are_given_as(store):
    times = np.arange(18)
    store.add_source(dataclasses.replace(VIDEO, id="whole", time_s=times))
    assert store.read("whole", "time").tolist() == times.tolist()
    assert depthmill.open(store.uri, sources=["whole"])["whole"]["time"].values.tolist() == times.tolist()


def test_a_row_of_nothing_but_negative_zeros_is_stored(tmp_path):
    store = stores.create(tmp_path / "ours", Layout(("normals",), 8, 8, "float16"), IDENTITY)
    store.add(IMAGES)
    writer = store.writer(Segment("images", 0, 5))
    for row in range(5):
        writer.put(row, None, np.full((24, 32, 3), -0.0 if row == 2 else 0.0, np.float16))
    writer.commit()
    stored = zarr.open_array(f"{store.uri}/images/normals", mode="r")[:]
    assert np.signbit(stored).all((1, 2, 3)).tolist() == [False, False, True, False, False]
