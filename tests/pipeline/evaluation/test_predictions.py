"""What is said of predictions that cannot be read."""

from pathlib import PurePosixPath

import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import EvaluationError, StoreDamagedError, StoreError, UnscorableError
from depthmill.pipeline.evaluation.predictions import from_folder, from_store, named
from depthmill.pipeline.evaluation.samples import Sample
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.temporal import Temporal
from depthmill.tests import media

SAMPLES = [Sample(f"a/{i:03d}", f"a/{i:03d}.png", "", None) for i in range(4)]
WANTED = {one.name for one in SAMPLES}


def label(path, *inputs):
    """A store of pictures whose depth is a quarter of their row in their source; the ids of the sources."""
    store = stores.create(path, stores.Layout(labels=("depth",), shard_frames=2, segment_frames=4), {})
    sources = [open_source(one).probe() for one in inputs]
    store.add(*sources)
    for source in sources:
        writer = store.writer(store.segments(source.id)[0])
        for i in range(source.frames):
            writer.put(i, np.full((source.height, source.width), 0.25 * i, np.float32), None)
        writer.commit()
    return [source.id for source in sources]


def test_a_source_that_is_one_picture_is_found_by_the_path_of_its_file(tmp_path):
    label(tmp_path / "s", *(media.write_image(tmp_path / f"{one.name}.png") for one in SAMPLES[:2]))
    taken = from_store(tmp_path / "s", SAMPLES[:2], "depth")
    assert taken.read(SAMPLES[1]).shape == (media.HEIGHT, media.WIDTH)


def test_damaged_labels_cost_their_pictures_and_say_what_mends_them(tmp_path):
    media.write_image_folder(tmp_path / "a", count=4)
    (source,) = label(tmp_path / "s", tmp_path / "a")

    def damage(file):
        path = tmp_path / "s" / source / file
        path.write_bytes(b"\xff" * path.stat().st_size)

    damage("depth/c/0/0/0")
    taken = from_store(tmp_path / "s", SAMPLES, "depth")
    with pytest.raises(UnscorableError, match=r"a-.* is damaged \(frame 1: .*run `depthmill verify .*--repair`"):
        taken.read(SAMPLES[1])
    assert taken.read(SAMPLES[3]).mean() == pytest.approx(0.75, abs=1e-4)
    damage("key/c/0")
    with pytest.raises(StoreDamagedError, match=r"/key is damaged .*run `depthmill verify .*--repair`"):
        from_store(tmp_path / "s", SAMPLES, "depth")


def test_sources_that_hold_no_sample_are_not_opened(tmp_path, monkeypatch):
    for name in "abcd":
        media.write_image_folder(tmp_path / name, count=4)
    a, *_ = label(tmp_path / "s", *(tmp_path / name for name in "abcd"))
    read, keys = LocalDirectory.read, []
    monkeypatch.setattr(LocalDirectory, "read", lambda self, key, *part: keys.append(key) or read(self, key, *part))
    taken = from_store(tmp_path / "s", SAMPLES, "depth")
    assert [taken.read(one).mean() for one in SAMPLES] == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-4)
    assert len([key for key in keys if not key.startswith(a)]) == 1 + 3  # the root, and which pictures there are


def test_a_failed_frame_says_why(tmp_path):
    media.write_image_folder(tmp_path / "a", count=4)
    (source,) = label(tmp_path / "s", tmp_path / "a")
    store = stores.open_store(tmp_path / "s")
    writer = store.writer(store.segments(source)[0])
    for i in range(4):
        writer.fail(i, f"broken {i}")
    writer.commit()
    with pytest.raises(UnscorableError, match=r"^it has no labels: broken 2$"):
        from_store(tmp_path / "s", SAMPLES, "depth").read(SAMPLES[2])


@pytest.mark.parametrize(("folder", "key"), [("a", "{}.png"), ("a", "{}.x.PNG"), (".", "a/{}.jpg"), ("b/a", "{}.webp")])
def test_a_picture_is_found_by_the_end_of_its_path_without_suffix(folder, key):
    keys = [key.format(f"{i:03d}") for i in range(5)] + ["c/000.png"]
    expected = []
    for row, one in enumerate(keys):
        name = "/".join((PurePosixPath("/data", folder) / one).with_suffix("").parts[-2:])
        expected += [(name, row)] if name in WANTED else []
    assert list(named(f"/data/{folder}".removesuffix("/."), keys, WANTED, {2, 4})) == expected
    assert len(expected) == (0 if ".x" in key else 4)


def smoothed(path, *sources):
    """Smooth them, by a scale of 2."""
    store = stores.open_store(path)
    for source in sources:
        temporal = Temporal(store, source)
        temporal.prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
        temporal.write_solution(np.full(4, 2, np.float32), np.zeros(4, np.float32), np.ones(4, np.int32))
    return store


def test_smoothing_is_asked_of_those_sources_alone_that_hold_a_sample(tmp_path):
    for name in "ab":
        media.write_image_folder(tmp_path / name, count=4)
    a, b = label(tmp_path / "s", tmp_path / "a", tmp_path / "b")
    smoothed(tmp_path / "s", b)
    with pytest.raises(StoreError, match=f"no smoothed source among {a}: run `depthmill smooth .*s --source {a}`$"):
        from_store(tmp_path / "s", SAMPLES, "depth", smooth=True)
    store = smoothed(tmp_path / "s", a)
    writer = store.writer(store.segments(b)[0])
    for i in range(4):
        writer.fail(i, "broken")
    writer.commit()  # which makes b's smoothing one of other labels
    taken = from_store(tmp_path / "s", SAMPLES, "depth", smooth=True)
    assert taken.read(SAMPLES[3]).mean() == pytest.approx(1.5, abs=2e-4)
    with pytest.raises(StoreError, match=f"{b} of .* has been labelled again since"):
        from_store(tmp_path / "s", [Sample("b/000", "", "", None)], "depth", smooth=True)


def test_a_folder_that_is_not_there_is_said_to_be_none(tmp_path):
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        from_folder(tmp_path / "nowhere", SAMPLES, "depth")
    with pytest.raises(EvaluationError, match="has predictions of 0 of 4 pictures"):
        from_folder(tmp_path, SAMPLES, "depth")


def test_pictures_of_normals_are_no_vectors(tmp_path):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/000.npy", np.zeros((2, 2, 3), np.uint8))
    np.save(tmp_path / "a/001.npy", np.full((2, 2, 3), 127, np.int8))
    taken = from_folder(tmp_path, SAMPLES[:2], "normals")
    with pytest.raises(UnscorableError, match=r"an array of uint8, .*map \[0, 255\] to \[-1, 1\] first"):
        taken.read(SAMPLES[0])
    assert (taken.read(SAMPLES[1]) == 127).all()
    assert (from_folder(tmp_path, SAMPLES[:1], "depth").read(SAMPLES[0]) == 0).all()


def test_an_archive_of_arrays_is_no_prediction(tmp_path):
    (tmp_path / "a").mkdir()
    for sample in SAMPLES[:2]:
        np.savez(tmp_path / f"{sample.name}.npz", np.zeros((2, 2)))
        (tmp_path / f"{sample.name}.npz").rename(tmp_path / f"{sample.name}.npy")
    damaged = tmp_path / f"{SAMPLES[1].name}.npy"
    damaged.write_bytes(damaged.read_bytes()[:100])
    taken = from_folder(tmp_path, SAMPLES[:2], "depth")
    with pytest.raises(UnscorableError, match=r"an archive of arrays \(\.npz\); expected one array"):
        taken.read(SAMPLES[0])
    with pytest.raises(UnscorableError, match="its prediction cannot be read"):
        taken.read(SAMPLES[1])
