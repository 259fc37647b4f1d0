import pytest

from depthmill.pipeline import store as stores
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO


@pytest.fixture
def store(tmp_path):
    store = stores.create(tmp_path / "labels.zarr", LAYOUT, IDENTITY)
    store.add(VIDEO, IMAGES)
    return store
