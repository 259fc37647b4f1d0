from pathlib import Path

import numpy as np
import pytest
import xarray

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import ConfigError, StoreError
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.layout import DEPTH_STEP, checksum
from depthmill.pipeline.store.temporal import Temporal
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, VIDEO, angle_deg, labels, write


@pytest.mark.parametrize(("dtype", "bound_deg"), [("int8", 0.4), ("int16", 0.0016), ("float16", 0.04)])
def test_labels_come_back_within_the_packings_bounds(tmp_path, dtype, bound_deg):
    store = stores.create(tmp_path / "s", Layout(shard_frames=4, segment_frames=8, normals_dtype=dtype), {})
    store.add(VIDEO)
    for segment in store.pending("video"):
        write(store, segment)
    dataset = xarray.open_zarr(store.uri, group="video")
    assert dataset["normals"].encoding["dtype"] == np.dtype(dtype)
    for index in range(VIDEO.frames):
        depth, normals = labels(index)
        assert np.abs(dataset["depth"][index].values - depth).max() <= DEPTH_STEP / 2 + 1e-7 <= 1e-4
        assert angle_deg(dataset["normals"][index].values, normals).max() <= bound_deg
    assert depthmill.open(store.uri)["video"]["normals"][0].values.dtype == np.float32


def test_xarray_finds_names_coordinates_and_conventions(store):
    write(store, store.segments("video")[0])
    dataset = xarray.open_zarr(store.uri, group="video")
    assert dict(dataset.sizes) == {"frame": 18, "y": 24, "x": 32, "axis": 3, "segment": 3, "file": 5}
    assert dataset["depth"].dims == ("frame", "y", "x")
    assert list(dataset["depth"].coords) == ["time"]
    np.testing.assert_array_equal(dataset["time"], VIDEO.time_s)
    assert dataset.attrs == {
        "uri": VIDEO.uri,
        "kind": "video",
        "frames": 18,
        "size": [24, 32],
        "fingerprint": "f1",
        "fps": 10.0,
        "time_checksum": checksum((Path(store.uri) / "video/time/c/0").read_bytes()),
    }
    depth = dataset["depth"][:8].values
    assert depth.min() >= 0
    assert depth.max() <= 1
    assert np.isnan(dataset["depth"][8:].values).all(), "unlabelled frames are invalid"
    assert (dataset["normals"][8:].values == 0).all()
    tree = xarray.open_datatree(store.uri, engine="zarr")
    assert set(tree.children) == {"images", "video"}
    assert "z towards the viewer" in tree.attrs["conventions"]["normals"]
    assert tree.attrs["depthmill"]["identity"] == IDENTITY


def test_depthmill_open_decodes_lazily_to_float32(store):
    write(store, store.segments("video")[0])
    datasets = depthmill.open(store.uri)
    assert list(datasets) == ["images", "video"]
    assert not datasets["video"]["depth"].variable._in_memory
    assert datasets["video"]["depth"].dtype == datasets["video"]["normals"].dtype == np.float32
    assert list(datasets["images"]["depth"].coords) == ["key"]
    assert np.abs(datasets["video"]["depth"][2].values - labels(2)[0]).max() <= 1e-4


def test_one_source_is_opened_without_the_others(store, monkeypatch):
    write(store, store.segments("video")[0])
    expected = depthmill.open(store.uri)["video"].load()
    monkeypatch.setattr(xarray, "open_groups", None)  # takes milliseconds for each source of a store
    (found,) = depthmill.open(store.uri, sources=["video"]).values()
    xarray.testing.assert_identical(found.load(), expected)
    with pytest.raises(StoreError, match="has no source 'vidoe'; it has "):
        depthmill.open(store.uri, sources=["vidoe"])


def test_extremes_are_kept_and_what_is_invalid_stays_so(store):
    writer = store.writer(store.segments("video")[0])
    depth, normals = labels(0)
    depth[0, :5] = [0, 1, np.nan, -0.5, 1.5]
    normals[1, 0] = 0
    normals[1, 1] = [np.nan, 0, 1]
    normals[1, 2] = [1.01, 0, -1.01]  # rounded in bfloat16, say
    for index in range(8):
        writer.put(index, depth, normals)
    writer.commit()
    dataset = depthmill.open(store.uri)["video"]
    np.testing.assert_array_equal(dataset["depth"][3, 0, :5], [0, 1, np.nan, 0, 1])
    assert (dataset["normals"][3, 1, :2].values == 0).all()
    np.testing.assert_array_equal(dataset["normals"][3, 1, 2], [1, 0, -1])
    assert (np.linalg.norm(dataset["normals"][3, 2:].values, axis=-1) > 0.98).all()


def test_pictures_of_other_sizes_are_padded_with_invalid(store):
    writer = store.writer(store.segments("images")[0])
    for index in range(5):
        writer.put(index, *labels(index, 24 - index, 32 - 2 * index))
    writer.commit()
    dataset = depthmill.open(store.uri)["images"]
    assert dataset["key"].values.tolist() == list(IMAGES.keys)
    np.testing.assert_array_equal(dataset["size"], [[24 - i, 32 - 2 * i] for i in range(5)])
    depth = dataset["depth"][4].values
    assert np.abs(depth[:20, :24] - labels(4, 20, 24)[0]).max() <= 1e-4
    assert np.isnan(depth[20:]).all()
    assert np.isnan(depth[:, 24:]).all()
    assert (dataset["normals"][4, 20:].values == 0).all()


def test_uncertainty_is_packed_as_depth_and_kept_with_it(tmp_path):
    with pytest.raises(ConfigError, match="add depth"):
        Layout(labels=("normals",), uncertainty=True)
    store = stores.create(tmp_path / "s", Layout(labels=("depth",), uncertainty=True), {})
    assert stores.open_store(store.uri).layout == store.layout
    store.add(VIDEO)
    (segment,) = store.segments("video")
    with pytest.raises(StoreError, match=r"has no uncertainty.*\['depth', 'uncertainty'\]"):
        store.writer(segment).put(0, labels(0)[0], None)
    writer = store.writer(segment)
    for index in range(17):
        writer.put(index, labels(index)[0], None, labels(index + 1)[0] / 10)
    writer.fail(17, "no picture")
    writer.commit()
    uncertainty = depthmill.open(store.uri)["video"].uncertainty
    assert uncertainty.dtype == np.float32
    assert np.abs(uncertainty[3].values - labels(4)[0] / 10).max() <= DEPTH_STEP / 2 + 1e-7
    assert np.isnan(uncertainty[17]).all()
    temporal, ones = Temporal(store, "video"), np.ones(18, np.float32)
    temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    temporal.write_solution(2 * ones, ones, ones.astype(np.int32))
    scaled = depthmill.open(store.uri, smooth=True)[
        "video"
    ].uncertainty  # in units of a depth that is scaled, not shifted
    assert np.array_equal(scaled.values, 2 * uncertainty.values, equal_nan=True)


def test_one_kind_of_label_alone(tmp_path):
    store = stores.create(tmp_path / "s", Layout(labels=("depth",)), {})
    store.add(VIDEO)
    (segment,) = store.segments("video")
    with pytest.raises(StoreError, match=r"has normals, but the store's labels are \['depth'\]"):
        store.writer(segment).put(0, *labels(0))
    writer = store.writer(segment)
    for index in range(18):
        writer.put(index, labels(index)[0], None)
    writer.commit()
    assert "normals" not in depthmill.open(store.uri)["video"]


def test_a_dataset_is_read_wherever_the_process_has_gone(tmp_path, monkeypatch):
    store = stores.create(tmp_path / "s", Layout(shard_frames=4, segment_frames=8), {})
    store.add(VIDEO)
    write(store, store.pending("video")[0])
    monkeypatch.chdir(tmp_path)
    video = depthmill.open("s")["video"]
    monkeypatch.chdir("/")
    assert np.isfinite(video["depth"][:8].values).any()
    assert video["status"][:8].values.all()
