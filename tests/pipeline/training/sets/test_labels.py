"""A store of one folder of pictures and one video, with labels that the test makes up."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import SampleError, SourceChangedError, SourceError, StoreError, TrainingError
from depthmill.pipeline.sources import images, open_source, opened, source_id
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.layout import DEPTH_STEP
from depthmill.pipeline.training.batch import TrainingSet
from depthmill.pipeline.training.sets import labels as labels_module
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.sets.labels import StoreOptions
from depthmill.pipeline.types import FrameSource
from depthmill.tests import media
from depthmill.tests.pipeline.training.sets.contract import SetContract, same

H, W = 48, 64
VIDEO_FRAMES = 20


def labels(index: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth in [0, 1], 0 included, its first row invalid; normals towards the viewer, the first column invalid."""
    rng = np.random.default_rng(index)
    depth = rng.random((height, width), dtype=np.float32)
    depth[0], depth[1] = np.nan, 0
    normals = rng.normal(size=(height, width, 3)).astype(np.float32)
    normals[..., 2] = np.abs(normals[..., 2]) + 0.1
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:, 0] = 0
    return depth, normals


def label(path: Path, inputs: list[Path], *, shown: tuple[str, ...] = ("depth", "normals")) -> stores.Store:
    """Label all frames; those that cannot be read fail, and the last segment of each source stays pending."""
    store = stores.create(path, stores.Layout(labels=shown, shard_frames=2, segment_frames=4), {})  # type: ignore[arg-type]
    for item in inputs:
        source = open_source(item)
        probed = source.probe()
        store.add(probed)
        for segment in store.segments(probed.id)[:-1]:
            writer = store.writer(segment)
            for frame in source.read(segment.start, segment.stop):
                if frame.image is None:
                    writer.fail(frame.index, frame.error)
                    continue
                depth, normals = labels(frame.index, *frame.image.shape[:2])
                writer.put(frame.index, depth if "depth" in shown else None, normals if "normals" in shown else None)
            writer.commit()
        source.close()
    return store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures 0, 1 and 3 of the folder, and 16 frames of the video, are labelled."""
    root = tmp_path_factory.mktemp("labels")
    pictures = root / "pictures"
    media.write_image_folder(pictures, count=6, sizes=((60, 64), (48, 64)))
    (pictures / "002.png").write_bytes(b"")
    media.write_video(root / "video.mp4", frames=VIDEO_FRAMES)
    label(root / "labels.zarr", [pictures, root / "video.mp4"])
    return root


@pytest.fixture
def config(folder: Path) -> StoreOptions:
    return StoreOptions(path=folder / "labels.zarr", height=H, width=W)


class TestStoredLabels(SetContract):
    pass


def indices(pictures: TrainingSet) -> list[int]:
    return [media.read_index((pictures.read(i).rgb[0] * 255).byte().permute(1, 2, 0).numpy()) for i in range(19)]


def test_frames_without_labels_are_left_out(config: StoreOptions, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pictures = open_set(config, "depth")
    assert caplog.messages == [f"{config.path}: 7 of 26 frames have no labels and are left out"]
    assert len(pictures) == 19


def test_each_frame_has_its_own_labels(config: StoreOptions) -> None:
    depths, normals = open_set(config, "depth"), open_set(config, "normals")
    assert indices(depths) == [0, 1, 3, *range(16)]
    for i in (1, 3, 14, 7, 18):  # a picture of the set's size, and frames of the video, the first too, in any order
        index = [0, 1, 3, *range(16)][i]
        depth, normal = labels(index, H, W)
        batch = depths.read(i)
        mask = ~np.isnan(depth)
        assert np.array_equal(batch.mask[0].numpy(), mask)
        assert np.abs(batch.target[0, 0].numpy() - 1 - depth)[mask].max() <= DEPTH_STEP / 2 + 1e-6
        batch = normals.read(i)
        assert np.array_equal(batch.mask[0].numpy(), normal.any(-1))
        assert np.abs(batch.target[0].permute(1, 2, 0).numpy() - normal).max() < 0.01


def test_a_picture_of_another_size_is_cut_from_the_middle(config: StoreOptions) -> None:
    batch = open_set(config, "depth").read(0)
    depth, _ = labels(0, 60, 64)
    np.testing.assert_allclose(batch.target[0, 0].numpy(), 1 + depth[6:54], atol=DEPTH_STEP)


def test_a_source_is_probed_once_however_few_stay_open(config: StoreOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_OPEN_SOURCES", 1)
    pictures, probed = open_set(config, "depth"), []

    def noted(uri: str, **options: int) -> FrameSource:
        probed.append(uri)
        return open_source(uri, **options)

    monkeypatch.setattr(opened, "open_source", noted)
    order = [0, 18, 1, 3, 0, 18]  # the folder's and the video's in turn
    found = [media.read_index((pictures.read(i).rgb[0] * 255).byte().permute(1, 2, 0).numpy()) for i in order]
    assert found == [0, 15, 1, 0, 0, 15]
    assert len(probed) == len(set(probed)) == 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_worker_opens_its_own(config: StoreOptions) -> None:
    pictures = open_set(config, "normals")
    here = [pictures.read(i) for i in (12, 1)]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def work() -> None:
        theirs.send([same(pictures.read(i), batch) for i, batch in zip((12, 1), here, strict=True)])

    worker = context.Process(target=work)
    worker.start()
    assert ours.poll(60), "the worker hangs"
    assert ours.recv() == [True, True]
    worker.join(10)
    assert worker.exitcode == 0


def test_a_changed_or_missing_source_is_an_error(tmp_path: Path) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    label(tmp_path / "s", [tmp_path / "a"])
    config = StoreOptions(path=tmp_path / "s", height=H, width=W)
    pictures = open_set(config, "depth")
    media.write_image(tmp_path / "a" / "001.png", 9)
    for attempt in (lambda: open_set(config, "depth"), lambda: pictures.read(0)):
        with pytest.raises(TrainingError, match="is not the file that was labelled"):
            attempt()
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(TrainingError, match=r"cannot be opened .*put it back"):
        open_set(config, "depth")


def test_a_file_that_is_replaced_while_it_is_open_is_probed_anew(tmp_path: Path) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    label(tmp_path / "s", [tmp_path / "a"])
    pictures = open_set(StoreOptions(path=tmp_path / "s", height=H, width=W), "depth")
    pictures.read(1)
    before = (tmp_path / "a" / "001.png").read_bytes()
    media.write_image(tmp_path / "a" / "001.png", 9)
    with pytest.raises(SourceChangedError, match="changed since"):
        pictures.read(1)
    with pytest.raises(TrainingError, match="is not the file that was labelled"):
        pictures.read(1)
    (tmp_path / "a" / "001.png").write_bytes(before)
    pictures.read(1)


def test_a_frame_that_can_no_longer_be_read(tmp_path: Path) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    label(tmp_path / "s", [tmp_path / "a"])
    pictures = open_set(StoreOptions(path=tmp_path / "s", height=H, width=W), "depth")
    pictures.read(2)
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(SampleError, match=r"a, frame 1: .*001.png"):
        pictures.read(1)


def test_a_disk_that_fails_costs_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    label(tmp_path / "s", [tmp_path / "a"])
    pictures = open_set(StoreOptions(path=tmp_path / "s", height=H, width=W), "depth")

    def fail(*_: object) -> None:
        raise SourceError("the disk does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(images, "decode_ahead", fail)
        with pytest.raises(SourceError, match="the disk does not answer"):
            pictures.read(1)
    (tmp_path / "s").rename(tmp_path / "away")
    with pytest.raises(StoreError, match="s is no depthmill store"):
        pictures.read(1)
    (tmp_path / "away").rename(tmp_path / "s")
    pictures.read(1)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(SourceError, match="no such file"):
        pickle.loads(pickle.dumps(pictures)).read(1)  # as in another process, which has nothing open


def test_a_damaged_file_of_labels_costs_its_samples(tmp_path: Path) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    store = label(tmp_path / "s", [tmp_path / "a"])
    pictures = open_set(StoreOptions(path=tmp_path / "s", height=H, width=W), "depth")
    pictures.read(0)
    shard = tmp_path / "s" / store.sources()[0] / "depth/c/0/0/0"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(SampleError, match=r"depth is damaged \(frame 0: .*run `depthmill verify .*s --repair`"):
        pictures.read(0)
    pictures.read(2)


def test_a_stores_url_stays_one() -> None:
    url = "s3://bucket/labels[1]"
    options = StoreOptions.model_validate({"kind": "store", "path": url, "height": H, "width": W})
    assert options.model_dump(mode="json")["path"] == url
    with pytest.raises(TrainingError, match=r"^s3://bucket/labels\[1\] cannot be a store: .*s3://bucket/prefix"):
        open_set(options, "depth")


def test_stores_that_cannot_be_trained_from(tmp_path: Path) -> None:
    media.write_image_folder(tmp_path / "a", count=8)
    label(tmp_path / "s", [tmp_path / "a"], shown=("depth",))
    with pytest.raises(TrainingError, match="labels of depth; expected normals"):
        open_set(StoreOptions(path=tmp_path / "s", height=H, width=W), "normals")
    with pytest.raises(TrainingError, match="no depthmill store"):
        open_set(StoreOptions(path=tmp_path / "none", height=H, width=W), "depth")
    stores.create(tmp_path / "empty", stores.Layout(), {}).add(open_source(tmp_path / "a").probe())
    with pytest.raises(TrainingError, match="no labelled frame"):
        open_set(StoreOptions(path=tmp_path / "empty", height=H, width=W), "depth")


def test_depth_is_greater_than_zero_where_the_label_is_zero(config: StoreOptions) -> None:
    batch = open_set(config, "depth").read(5)
    assert batch.mask[0, 1].all()
    torch.testing.assert_close(batch.target[0, 0, 1], torch.ones(W))


def test_a_frame_costs_no_look_at_other_sources(config: StoreOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening all of them took minutes and gigabytes for each loader worker, of 100,000."""
    elsewhere, keys = pickle.loads(pickle.dumps(open_set(config, "depth"))), []
    read = LocalDirectory.read
    monkeypatch.setattr(LocalDirectory, "read", lambda self, key, *part: keys.append(key) or read(self, key, *part))
    elsewhere.read(5)
    assert {key.partition("/")[0] for key in keys} == {source_id(config.path.parent / "video.mp4")}
    assert not any(key.endswith("zarr.json") for key in keys)


def test_labels_stay_open_a_few_sources_at_a_time(config: StoreOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "_OPEN_SOURCES", 1)
    pictures, opened = open_set(config, "depth"), []
    array = stores.Store.array
    monkeypatch.setattr(stores.Store, "array", lambda self, *named: opened.append(named[0]) or array(self, *named))
    for i in (0, 1, 18, 17, 0):
        pictures.read(i)
    folder, video = (source_id(config.path.parent / name) for name in ("pictures", "video.mp4"))
    assert opened == [folder, video, folder]


def test_a_frame_takes_four_bytes(config: StoreOptions) -> None:
    """There may be tens of millions, in each loader worker; as tuples they took a hundred."""
    pictures = open_set(config, "depth")
    arrays = [value for value in vars(pictures).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 4 * len(pictures) + 8 * 2
    assert not any(isinstance(value, list) and len(value) > 2 for value in vars(pictures).values())
