"""Labels read without xarray are, to the bit, those that it reads."""

import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreDamagedError
from depthmill.pipeline.store import Layout, Store, open_datasets
from depthmill.pipeline.store.rows import open_labels
from depthmill.pipeline.store.temporal import FILTERED, Temporal
from depthmill.tests.pipeline.store.samples import IMAGES, VIDEO, labels

SIZES = ((24, 32), (24, 20), (7, 32), (1, 1), (24, 32))  # of the pictures


def made(path, dtype: str) -> Store:
    """A video and pictures of several sizes, with uncertainty, all but the last frame of each labelled."""
    layout = Layout(shard_frames=4, segment_frames=8, normals_dtype=dtype, uncertainty=True)
    store = stores.create(path, layout, {})
    store.add(VIDEO, IMAGES)
    for source in (VIDEO, IMAGES):
        for segment in store.segments(source.id):
            writer = store.writer(segment)
            for i in range(segment.start, segment.stop):
                if i == source.frames - 1:
                    writer.fail(i, "broken")
                    continue
                depth, normals = labels(i, *(SIZES[i] if source is IMAGES else SIZES[0]))
                depth.flat[0] = np.nan
                normals[-1, -1], normals[0, 0] = 0, (-0.0, 0, 1)
                writer.put(i, depth, normals, depth / 3)
            writer.commit()
    return store


def smooth(store: Store, *, filtered: bool) -> None:
    """Scales and shifts that change from frame to frame, and filtered labels."""
    rng = np.random.default_rng(0)
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    for segment in temporal.pending("edges"):
        temporal.write_edges(segment, np.ones((segment.frames, 1, 5), np.float32), np.ones(segment.frames, np.float32))
    scale, shift = rng.uniform(0.5, 2, (2, VIDEO.frames)).astype(np.float32)
    temporal.write_solution(scale, shift, np.ones(VIDEO.frames, np.int32))
    if filtered:
        temporal.prepare_filter()
        for segment in store.segments("video"):
            frames = [dict(zip(("depth", "normals"), labels(50 + i), strict=True)) for i in range(segment.frames)]
            temporal.write_filtered(segment, ((FILTERED, frame) for frame in frames))


def assert_same(store: Store, *, smooth: bool = False) -> None:
    """That every frame of the datasets is the same, to the bit."""
    datasets = open_datasets(store.uri, smooth=smooth)
    assert datasets
    for source_id, dataset in datasets.items():
        for name in store.layout.arrays:
            found = open_labels(store, source_id, name, smooth=smooth)
            for i in range(dataset.sizes["frame"]):
                expected, read = dataset[name][i].values, found.read(i)
                if "size" in dataset:
                    height, width = dataset["size"][i].values
                    expected = expected[:height, :width]
                assert read.dtype == expected.dtype == np.float32
                assert read.shape == expected.shape
                assert read.tobytes() == expected.tobytes(), (source_id, name, i)


@pytest.mark.parametrize("dtype", ["int8", "int16", "float16"])
def test_labels_are_those_of_the_datasets(tmp_path, dtype):
    store = made(tmp_path / "s", dtype)
    assert_same(store)
    for filtered in (False, True):
        smooth(store, filtered=filtered)
        assert_same(store, smooth=True)


def test_what_cannot_be_decoded_is_named(tmp_path):
    store = made(tmp_path / "s", "int8")
    for file in ("depth/c/0/0/0", "size/c/0/0"):
        path = tmp_path / "s/images" / file
        path.write_bytes(b"\xff" * path.stat().st_size)
    found = open_labels(store, "images", "depth")
    with pytest.raises(StoreDamagedError, match=r"images/depth is damaged \(frame 1: .*--repair"):
        found.read(1)
    with pytest.raises(StoreDamagedError, match=r"images/size is damaged .*--repair"):
        open_labels(store, "images", "normals").read(1)
