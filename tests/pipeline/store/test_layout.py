import dataclasses
import hashlib
import json

import numpy as np
import pytest

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.layout import FORMAT, checksum, segment_files, source_arrays, source_attributes
from depthmill.pipeline.types import CORPUS_PICTURES, Segment
from depthmill.tests.pipeline.store.samples import IMAGES, VIDEO, files, labels, write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment_frames": 20}, r"segment_frames is 20: give a multiple of shard_frames \(16\)"),
        ({"segment_frames": 0}, "segment_frames is 0"),
        ({"corpus_segment_frames": 40}, "corpus_segment_frames is 40"),
        ({"shard_frames": 0}, "shard_frames is 0"),
        ({"labels": ()}, r"labels is \[\]"),
        ({"labels": ("depth", "depth")}, "each once"),
        ({"labels": ("colour",)}, "one or more of"),
        ({"normals_dtype": "int4"}, "normals_dtype is 'int4'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Layout(**options)


def test_huge_pictures_get_shards_that_fit_in_memory():
    layout = Layout()
    assert layout.frames_per_shard(576, 768) == 16
    assert layout.frames_per_segment({"kind": "video", "frames": 9999, "size": [576, 768]}) == 64
    assert layout.frames_per_shard(2160, 3840) == 4
    assert layout.frames_per_shard(8000, 6250) == 1
    assert (layout.frames_per_shard(3000, 4000), Layout(uncertainty=True).frames_per_shard(3000, 4000)) == (4, 2)
    assert Layout(normals_dtype="int16").frames_per_shard(3000, 4000) == 2
    assert Layout(("depth",)).frames_per_shard(2048, 4096) == 16, "as large as one may be"
    assert layout.frames_per_segment({"kind": "images", "frames": 5, "size": [8000, 6250]}) == 4


@pytest.mark.parametrize(
    ("kind", "frames", "size", "expected"),
    [
        ("images", CORPUS_PICTURES, [576, 768], 2048),
        ("images", CORPUS_PICTURES, [8000, 6250], 2048),
        ("images", CORPUS_PICTURES - 1, [576, 768], 64),
        ("webdataset", 10, [576, 768], 2048),
        ("parquet", 10, [576, 768], 2048),
        ("video", 10_000, [576, 768], 64),
    ],
)
def test_a_corpus_has_segments_of_its_own(kind, frames, size, expected):
    source = {"kind": kind, "frames": frames, "size": size}
    assert Layout(corpus_segment_frames=2048).frames_per_segment(source) == expected
    assert Layout().frames_per_segment(source) == 64 // (16 // Layout().frames_per_shard(*size))


def test_huge_pictures_are_written_in_small_shards(tmp_path):
    layout = Layout()
    store = stores.create(tmp_path / "s", layout, {})
    store.add(dataclasses.replace(IMAGES, height=8000, width=6250))
    first, second = store.segments("images")
    assert (first, second) == (Segment("images", 0, 4), Segment("images", 4, 5))
    write(store, second, size=(100, 6250))
    assert store.pending("images") == [first]
    dataset = depthmill.open(store.uri)["images"]
    assert np.abs(dataset["depth"][4, :100].values - labels(4, 100, 6250)[0]).max() <= 1e-4
    assert sum(map(len, files(store.uri).values())) < 4e6, "the empty canvas costs next to nothing"


def test_where_files_are_and_what_is_in_them_stays_as_long_as_the_format():
    """What was written before is read by this: whoever changes it raises FORMAT."""
    told = [checksum(b"a file")]
    for source in (VIDEO, IMAGES):
        for layout in (Layout(uncertainty=True), Layout(normals_dtype="float16")):
            arrays = source_arrays(source_attributes(source), layout)
            for array in arrays.values():
                del array["attributes"]["long_name"]
            told += [sorted(arrays.items()), list(segment_files(Segment(source.id, 0, 5), arrays).items())]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    assert (FORMAT, digest[:16]) == (1, "247567c1c3c6663b")
