"""What is said of predictions that cannot be read."""

import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import EvaluationError, StoreDamagedError, UnscorableError
from depthmill.pipeline.evaluation.predictions import from_folder, from_store
from depthmill.pipeline.evaluation.samples import Sample
from depthmill.pipeline.sources import open_source
from depthmill.tests import media

SAMPLES = [Sample(f"a/{i:03d}", f"a/{i:03d}.png", "", None) for i in range(4)]


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
