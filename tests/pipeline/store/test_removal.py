import json
from pathlib import Path

import pytest
import zarr

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.temporal import Temporal
from depthmill.tests.pipeline.store.samples import IDENTITY, LAYOUT, files


def notes(path):
    (path / "mine").mkdir()
    (path / "mine/notes.txt").write_text("dear")


def array_in_a_source(path):
    zarr.create_array(path / "video/masks", shape=(18,), dtype="uint8")


def array(path):
    zarr.create_array(path / "mine", shape=(18,), dtype="uint8")[:] = 1


def empty_group(path):
    zarr.create_group(path / "mine", attributes={"uri": "/in/mine"})


def group_with_our_names(path):
    zarr.create_array(path / "mine/depth", shape=(18,), dtype="uint8")
    (path / "mine/zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))


CASES = [
    (notes, "mine/notes.txt"),
    (array_in_a_source, "video/masks"),
    (array, "mine/c"),
    (empty_group, "mine"),
    (group_with_our_names, "mine"),
]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("add", "named"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_depthmill_did_not_write_is_not_removed(store, add, named, resumed):
    path = Path(store.uri)
    add(path)
    if resumed:
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"] = {"depthmill": {"being_removed": True}}
        (path / "zarr.json").write_text(json.dumps(root))
    before = files(path)
    with pytest.raises(StoreError, match=rf"/{named} was not written by depthmill.*move it away"):
        stores.create(path, LAYOUT, IDENTITY, overwrite=not resumed)
    assert files(path) == before


def test_all_that_depthmill_writes_is_removed(store):
    """Smoothed labels, a source that a killed process was adding, and what a killed removal left of one included."""
    temporal = Temporal(store, "video")
    temporal.prepare(max_edge=4, flow="fast", leak=0.1, shape=(3, 4))
    temporal.prepare_filter()
    path = Path(store.uri)
    (path / "images/zarr.json").unlink()
    (path / "emptied").mkdir()
    assert stores.create(path, LAYOUT, IDENTITY, overwrite=True).sources() == []
    assert list(files(path)) == ["zarr.json"]
