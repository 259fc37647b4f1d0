"""A store that another run makes anew while this one writes into it."""

import pytest

from depthmill.pipeline.errors import StoreReplacedError
from depthmill.pipeline.store import create, open_store
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write


def under_way(store):
    """A writer that has been given all of a segment but its last frame."""
    writer = store.writer(Segment("video", 8, 16))
    for index in range(8, 15):
        writer.put(index, *labels(index))
    return writer


def test_nothing_of_another_configuration_is_committed_into_it(store):
    before = open_store(store.uri, index=False)
    writer, written = under_way(before), under_way(before)
    written.put(15, *labels(15))
    written._finish_writing()  # all but the commit
    other = create(store.uri, LAYOUT, {**IDENTITY, "processing_resolution": 1024}, overwrite=True)
    other.add(VIDEO)
    write(other, Segment("video", 8, 16))
    there = files(store.uri)
    writer.put(15, *labels(1))
    for step in (writer.commit, written.commit, lambda: before.add_source(IMAGES), lambda: before.publish(["video"])):
        with pytest.raises(StoreReplacedError, match=r"processing_resolution: .*1024 now"):
            step()
    assert files(store.uri) == there
