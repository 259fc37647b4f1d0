import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import ConfigError, StoreError, StoreMismatchError
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.layout import DEPTH_STEP
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Failure, Segment, Source

LAYOUT = Layout(shard_frames=4, segment_frames=8)
IDENTITY = {"checkpoint": {"id": "demo", "sha256": "aa"}, "processing_resolution": 768}
VIDEO = Source("video", "/in/video.mp4", "video", 18, 24, 32, 10.0, "f1", time_s=np.arange(18) / 10)
IMAGES = Source("images", "/in/images", "images", 5, 24, 32, None, "f2", keys=("a.png", "ö/b.png", "c", "d", "e"))


def labels(seed: int, height: int = 24, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(height, width, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return rng.random((height, width), dtype=np.float32), normals.astype(np.float32)


def write(store: stores.Store, segment: Segment) -> None:
    writer = store.writer(segment)
    for index in range(segment.start, segment.stop):
        writer.put(index, *labels(index))
    writer.commit()


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)))


def files(path: Path) -> dict[str, bytes]:
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> stores.Store:
    store = stores.create(tmp_path / "labels.zarr", LAYOUT, IDENTITY)
    store.add(VIDEO, IMAGES)
    return store


class TestRoundTrip:
    @pytest.mark.parametrize(("dtype", "bound_deg"), [("int8", 0.4), ("int16", 0.0016), ("float16", 0.04)])
    def test_labels_come_back_within_the_packings_bounds(self, tmp_path, dtype, bound_deg):
        store = stores.create(tmp_path / "s", Layout(shard_frames=4, segment_frames=8, normals_dtype=dtype), {})
        store.add(VIDEO)
        for segment in store.pending("video"):
            write(store, segment)
        dataset = xarray.open_zarr(store.path, group="video")
        assert dataset["normals"].encoding["dtype"] == np.dtype(dtype)
        for index in range(VIDEO.frames):
            depth, normals = labels(index)
            assert np.abs(dataset["depth"][index].values - depth).max() <= DEPTH_STEP / 2 + 1e-7 <= 1e-4
            assert angle_deg(dataset["normals"][index].values, normals).max() <= bound_deg

    def test_xarray_finds_names_coordinates_and_conventions(self, store):
        write(store, store.segments("video")[0])
        dataset = xarray.open_zarr(store.path, group="video")
        assert dict(dataset.sizes) == {"frame": 18, "y": 24, "x": 32, "axis": 3}
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
        }
        depth = dataset["depth"][:8].values
        assert depth.min() >= 0
        assert depth.max() <= 1
        assert np.isnan(dataset["depth"][8:].values).all(), "unlabelled frames are invalid"
        assert (dataset["normals"][8:].values == 0).all()
        tree = xarray.open_datatree(store.path, engine="zarr")
        assert set(tree.children) == {"images", "video"}
        assert "z towards the viewer" in tree.attrs["conventions"]["normals"]
        assert tree.attrs["depthmill"]["identity"] == IDENTITY

    def test_depthmill_open_decodes_lazily_to_float32(self, store):
        write(store, store.segments("video")[0])
        datasets = depthmill.open(store.path)
        assert list(datasets) == ["images", "video"]
        assert not datasets["video"]["depth"].variable._in_memory
        assert datasets["video"]["depth"].dtype == datasets["video"]["normals"].dtype == np.float32
        assert list(datasets["images"]["depth"].coords) == ["key"]
        assert np.abs(datasets["video"]["depth"][2].values - labels(2)[0]).max() <= 1e-4

    def test_extremes_are_kept_and_what_is_invalid_stays_so(self, store):
        writer = store.writer(store.segments("video")[0])
        depth, normals = labels(0)
        depth[0, :5] = [0, 1, np.nan, -0.5, 1.5]
        normals[1, 0] = 0
        normals[1, 1] = [np.nan, 0, 1]
        for index in range(8):
            writer.put(index, depth, normals)
        writer.commit()
        dataset = depthmill.open(store.path)["video"]
        np.testing.assert_array_equal(dataset["depth"][3, 0, :5], [0, 1, np.nan, 0, 1])
        assert (dataset["normals"][3, 1, :2].values == 0).all()
        assert (np.linalg.norm(dataset["normals"][3, 2:].values, axis=-1) > 0.98).all()

    def test_pictures_of_other_sizes_are_padded_with_invalid(self, store):
        writer = store.writer(store.segments("images")[0])
        for index in range(5):
            writer.put(index, *labels(index, 24 - index, 32 - 2 * index))
        writer.commit()
        dataset = depthmill.open(store.path)["images"]
        assert dataset["key"].values.tolist() == list(IMAGES.keys)
        np.testing.assert_array_equal(dataset["size"], [[24 - i, 32 - 2 * i] for i in range(5)])
        depth = dataset["depth"][4].values
        assert np.abs(depth[:20, :24] - labels(4, 20, 24)[0]).max() <= 1e-4
        assert np.isnan(depth[20:]).all()
        assert np.isnan(depth[:, 24:]).all()
        assert (dataset["normals"][4, 20:].values == 0).all()

    def test_uncertainty_is_packed_as_depth_and_kept_with_it(self, tmp_path):
        with pytest.raises(ConfigError, match="add depth"):
            Layout(labels=("normals",), uncertainty=True)
        store = stores.create(tmp_path / "s", Layout(labels=("depth",), uncertainty=True), {})
        assert stores.open_store(store.path).layout == store.layout
        store.add(VIDEO)
        (segment,) = store.segments("video")
        with pytest.raises(StoreError, match=r"has no uncertainty.*\['depth', 'uncertainty'\]"):
            store.writer(segment).put(0, labels(0)[0], None)
        writer = store.writer(segment)
        for index in range(17):
            writer.put(index, labels(index)[0], None, labels(index + 1)[0] / 10)
        writer.fail(17, "no picture")
        writer.commit()
        uncertainty = depthmill.open(store.path)["video"].uncertainty
        assert uncertainty.dtype == np.float32
        assert np.abs(uncertainty[3].values - labels(4)[0] / 10).max() <= DEPTH_STEP / 2 + 1e-7
        assert np.isnan(uncertainty[17]).all()

    def test_one_kind_of_label_alone(self, tmp_path):
        store = stores.create(tmp_path / "s", Layout(labels=("depth",)), {})
        store.add(VIDEO)
        (segment,) = store.segments("video")
        with pytest.raises(StoreError, match=r"has normals, but the store's labels are \['depth'\]"):
            store.writer(segment).put(0, *labels(0))
        writer = store.writer(segment)
        for index in range(18):
            writer.put(index, labels(index)[0], None)
        writer.commit()
        assert "normals" not in depthmill.open(store.path)["video"]


class TestWriter:
    def test_the_order_of_rows_does_not_change_a_byte(self, store, tmp_path):
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
        assert files(store.path) == files(other.path)

    def test_a_shard_is_written_as_soon_as_it_is_full_and_then_let_go(self, store):
        writer = store.writer(Segment("video", 0, 8))
        for index in (3, 1, 0):
            writer.put(index, *labels(index))
        shards = store.path / "video" / "depth" / "c"
        assert not shards.exists()
        writer.put(2, *labels(2))
        writer._finish_writing()
        assert [path.name for path in shards.iterdir()] == ["0"]
        assert writer._rows == {}
        assert store.status("video").max() == PENDING, "not committed yet"

    def test_no_two_segments_share_a_file(self, store):
        written = []
        for segment in store.segments("video"):
            before = files(store.path)
            write(store, segment)
            written.append(files(store.path).keys() - before.keys())
            assert files(store.path).items() >= before.items()
        assert sum(map(len, written)) == len(set.union(*map(set, written)))

    def test_failed_frames_keep_their_reason(self, store):
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
            Failure("/in/images", "images", 1, "picture 1 is öken"),
            Failure("/in/images", "images", 3, "picture 3 is öken"),
        ]
        assert store.status("images").tolist() == [LABELLED, FAILED, LABELLED, FAILED, LABELLED]
        dataset = depthmill.open(store.path)["images"]
        assert np.isnan(dataset["depth"][1].values).all()
        assert dataset["reason"].values.tolist() == ["", "picture 1 is öken", "", "picture 3 is öken", ""]
        path = stores.write_failures(store, [Failure("/in/a.mp4", None, None, "no such file")])
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(line["uri"], line["frame"]) for line in lines] == [
            ("/in/a.mp4", None),
            ("/in/images", 1),
            ("/in/images", 3),
        ]
        # What is no part of the hierarchy does not disturb its readers (a warning is an error here).
        (store.path / "run.json").write_text("{}")
        xarray.open_datatree(store.path, engine="zarr")
        assert dict(zarr.open_group(store.path, mode="r").groups()).keys() == {"images", "video"}

    def test_a_shard_that_could_not_be_written_is_not_committed(self, store, monkeypatch):
        def full(path, data):
            raise OSError(28, "No space left on device")

        segment = Segment("video", 16, 18)
        writer = store.writer(segment)
        with monkeypatch.context() as patch:
            patch.setattr("depthmill.pipeline.store.files.write_atomically", full)
            for index in (16, 17):
                writer.put(index, *labels(index))
            with pytest.raises(StoreError, match=r"depth of frames 16 to 18 of video.* No space left"):
                writer.commit()
        assert segment in store.pending("video")
        write(store, segment)
        assert segment not in store.pending("video")

    def test_misuse_is_refused(self, store):
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
        with pytest.raises(StoreError, match=r"frames \[9, 10, 11, 12, 13, 14, 15\] were never given"):
            writer.commit()
        images = store.writer(Segment("images", 0, 5))
        with pytest.raises(StoreError, match=r"not at most \(24, 32\)"):
            images.put(0, *labels(0, 25, 32))
        with pytest.raises(StoreError, match="different sizes"):
            images.put(0, labels(0, 10, 10)[0], labels(0, 10, 11)[1])
        for segment in (Segment("video", 0, 4), Segment("video", 16, 24)):
            with pytest.raises(StoreError, match="is no segment of"):
                store.writer(segment)
        with pytest.raises(StoreError, match=r"no source 'nobody'; it has \['images', 'video'\]"):
            store.segments("nobody")


class TestCreate:
    def test_resume_goes_on_where_it_stopped(self, store):
        write(store, Segment("video", 8, 16))
        again = stores.create(store.path, LAYOUT, dict(reversed(IDENTITY.items())))
        again.add(VIDEO, IMAGES)
        assert again.pending("video") == [Segment("video", 0, 8), Segment("video", 16, 18)]
        assert again.segments("video") == [Segment("video", 0, 8), Segment("video", 8, 16), Segment("video", 16, 18)]
        assert again.layout == LAYOUT
        assert again.identity == IDENTITY
        assert again.sources() == ["images", "video"]

    def test_a_store_of_another_run_is_refused_naming_every_difference(self, store):
        before = files(store.path)
        other = {"checkpoint": {"id": "demo", "sha256": "bb"}, "dtype": "bf16"}
        with pytest.raises(StoreMismatchError) as caught:
            stores.create(store.path, Layout(shard_frames=2, segment_frames=8), other)
        message = str(caught.value)
        assert 'identity.checkpoint.sha256: "aa" there, "bb" now' in message
        assert "identity.processing_resolution: 768 there, absent now" in message
        assert 'identity.dtype: absent there, "bf16" now' in message
        assert "layout.shard_frames: 4 there, 2 now" in message
        assert "identity.checkpoint.id" not in message
        assert "--overwrite" in message
        assert files(store.path) == before

    def test_a_source_that_changed_is_refused(self, store):
        again = stores.open_store(store.path)
        changed = dataclasses.replace(VIDEO, fingerprint="f9", frames=19, time_s=np.arange(19) / 10)
        with pytest.raises(StoreMismatchError) as caught:
            again.add(changed)
        assert 'fingerprint: "f1" there, "f9" now' in str(caught.value)
        assert "frames: 18 there, 19 now" in str(caught.value)
        assert VIDEO.uri in str(caught.value)

    def test_overwrite_starts_anew(self, store, tmp_path):
        write(store, Segment("video", 0, 8))
        stores.write_failures(store)
        (store.path / "notes.txt").write_text("mine")
        new = stores.create(store.path, Layout(), {"other": 1}, overwrite=True)
        assert new.sources() == []
        expected = stores.create(tmp_path / "fresh", Layout(), {"other": 1})
        assert files(new.path) == {**files(expected.path), "notes.txt": b"mine"}

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_is_no_depthmill_store_is_never_touched(self, tmp_path, overwrite):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "holiday.jpg").write_text("dear")
        zarr.create_group(tmp_path / "other.zarr", attributes={"theirs": 1})
        (tmp_path / "file").write_text("dear")
        before = files(tmp_path)
        for name, message in [("photos", "holiday.jpg"), ("other.zarr", "no depthmill store"), ("file", "is a file")]:
            with pytest.raises(StoreError, match=message):
                stores.create(tmp_path / name, LAYOUT, IDENTITY, overwrite=overwrite)
        assert files(tmp_path) == before

    def test_opening_what_is_not_there(self, tmp_path, store):
        with pytest.raises(StoreError, match="is no depthmill store"):
            stores.open_store(tmp_path / "nothing")
        root = json.loads((store.path / "zarr.json").read_text())
        root["attributes"]["depthmill"]["format"] = 99
        (store.path / "zarr.json").write_text(json.dumps(root))
        with pytest.raises(StoreError, match="store format 99"):
            stores.open_store(store.path)

    def test_source_ids_are_group_names(self, store):
        for bad in ("a/b", "", "..", ".hidden", "zarr.json"):
            with pytest.raises(StoreError, match="cannot name a group"):
                store.add(dataclasses.replace(VIDEO, id=bad))


class TestLayout:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"segment_frames": 20}, r"segment_frames is 20: give a multiple of shard_frames \(16\)"),
            ({"segment_frames": 0}, "segment_frames is 0"),
            ({"shard_frames": 0}, "shard_frames is 0"),
            ({"labels": ()}, r"labels is \[\]"),
            ({"labels": ("depth", "depth")}, "each once"),
            ({"labels": ("colour",)}, "one or more of"),
            ({"normals_dtype": "int4"}, "normals_dtype is 'int4'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            Layout(**options)

    def test_huge_pictures_get_shards_that_fit_in_memory(self, tmp_path):
        layout = Layout()
        assert layout.frames_per_shard(576, 768) == 16
        assert layout.frames_per_segment(576, 768) == 64
        assert layout.frames_per_shard(2160, 3840) == 4
        assert (layout.frames_per_shard(8000, 6250), layout.frames_per_segment(8000, 6250)) == (1, 4)
        store = stores.create(tmp_path / "s", layout, {})
        store.add(dataclasses.replace(IMAGES, height=8000, width=6250))
        first, second = store.segments("images")
        assert (first, second) == (Segment("images", 0, 4), Segment("images", 4, 5))
        writer = store.writer(second)
        writer.put(4, *labels(4, 100, 6250))
        writer.commit()
        assert store.pending("images") == [first]
        dataset = depthmill.open(store.path)["images"]
        assert np.abs(dataset["depth"][4, :100].values - labels(4, 100, 6250)[0]).max() <= 1e-4
        assert sum(map(len, files(store.path).values())) < 4e6, "the empty canvas costs next to nothing"


class TestKilled:
    """A run that was killed at any instant, then run again, leaves the bytes of one that never was."""

    @pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_rerun_leaves_the_same_bytes(self, tmp_path, stride):
        command = [sys.executable, str(Path(__file__).with_name("kill_store.py")), str(tmp_path), str(stride)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=290, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["differing"] == []
        assert report["kills"] >= 12
        assert report["files"] == 36

    def test_leftovers_of_a_worker_are_cleared_by_whoever_takes_its_segment(self, store):
        for segment in store.segments("video"):
            write(store, segment)
        clean = files(store.path)
        (store.path / "video" / "status" / "c" / "1").unlink()
        for file in ("depth/c/2/0/0", "normals/c/3/0/0/0", "status/c/1", "reason/c/1"):
            path = store.path / "video" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f".{path.name}.0123abcd.partial").write_bytes(b"half")
        write(store, Segment("video", 8, 16))
        assert files(store.path) == clean

    def test_labels_of_an_abandoned_attempt_do_not_outlive_it(self, store, tmp_path):
        """The frame that killed a worker is marked as failed next time; so may be a whole segment."""
        other = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
        other.add(VIDEO, IMAGES)
        for segment, failed in ((Segment("video", 0, 8), {1, 6}), (Segment("video", 8, 16), set(range(8, 16)))):
            writer = store.writer(segment)
            for index in range(segment.start, segment.stop):
                writer.put(index, *labels(index))
            writer._finish_writing()
            for target in (store, other):
                writer = target.writer(segment)
                for index in range(segment.start, segment.stop):
                    if index in failed:
                        writer.fail(index, "killed the worker")
                    else:
                        writer.put(index, *labels(index))
                writer.commit()
        assert files(store.path) == files(other.path)

    def test_a_store_whose_removal_was_cut_short_says_so_and_is_finished(self, store):
        root = json.loads((store.path / "zarr.json").read_text())
        root["attributes"] = {"depthmill": {"being_removed": True}}
        (store.path / "zarr.json").write_text(json.dumps(root))
        with pytest.raises(StoreError, match="run the same command again"):
            stores.open_store(store.path)
        assert stores.create(store.path, LAYOUT, IDENTITY).sources() == []
        assert not (store.path / "video").exists()
