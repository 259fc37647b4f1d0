import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.checked import decoded
from depthmill.pipeline.store.layout import file_key, rows_per_file
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, VIDEO, write


@pytest.mark.parametrize("normals_dtype", ["int8", "int16", "float16"])
def test_rows_are_those_that_zarr_reads(tmp_path, normals_dtype):
    store = stores.create(tmp_path / "s", Layout(("depth", "normals"), 4, 8, normals_dtype), IDENTITY)
    store.add(VIDEO, IMAGES)
    for segment in (*store.segments("video"), *store.segments("images")):
        write(store, segment, failed=(1, 4, 5, 6, 7, 16), size=(24, 30 if segment.source_id == "images" else 32))
    for source_id in store.sources():
        for name, array in store.arrays(source_id).items():
            stored, length = store.array(source_id, name)[:], rows_per_file(array)
            for start in range(0, len(stored), length):
                data = store.directory.read(file_key(source_id, name, array, start))
                for rows in (slice(start, start + length), slice(start + length // 2, start + length // 2 + 1)):
                    found = decoded(array, data, rows)
                    assert np.array_equal(found, stored[rows]), name
                    assert found.dtype == stored.dtype or array["data_type"] == "string"
