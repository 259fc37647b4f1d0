import numpy as np
import pytest
import zarr

from depthmill.pipeline import store as stores
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.layout import checksum, pack_depth, pack_normals
from depthmill.pipeline.store.zarr_files import WholeFiles, open_array
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, files, labels


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
    whole = WholeFiles(theirs.directory)
    for name, label in zip(("depth", "normals"), written, strict=True):
        array = open_array(whole, f"images/{name}", theirs.arrays("images")[name])
        for start in range(0, 5, shard_frames):
            array[start : start + shard_frames] = label[start : start + shard_frames]
        assert np.array_equal(zarr.open_array(f"{store.uri}/images/{name}", mode="r")[:], label)
    ours = files(store.uri)
    shards = {key: data for key, data in ours.items() if key.startswith(("images/depth/c", "images/normals/c"))}
    assert shards == {key: data for key, data in files(theirs.uri).items() if key in whole.written}
    assert len(shards) == {2: 4, 4: 4, 8: 2}[shard_frames], "a shard of nothing but fill is no file"
    assert {key: checksum(data) for key, data in shards.items()} == {key: v for key, v in whole.written.items() if v}


def test_a_row_of_nothing_but_negative_zeros_is_stored(tmp_path):
    store = stores.create(tmp_path / "ours", Layout(("normals",), 8, 8, "float16"), IDENTITY)
    store.add(IMAGES)
    writer = store.writer(Segment("images", 0, 5))
    for row in range(5):
        writer.put(row, None, np.full((24, 32, 3), -0.0 if row == 2 else 0.0, np.float16))
    writer.commit()
    stored = zarr.open_array(f"{store.uri}/images/normals", mode="r")[:]
    assert np.signbit(stored).all((1, 2, 3)).tolist() == [False, False, True, False, False]
