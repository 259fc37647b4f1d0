import dataclasses

import numpy as np

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.smoothing.stage import edges_shape, filter_segment, solve_source, write_segment_edges
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store import open_datasets
from depthmill.pipeline.store.temporal import FILTERED, SCALED, Temporal
from depthmill.pipeline.store.verify import verify
from depthmill.tests import media
from depthmill.tests.workers.flickering import labelled, written

CONFIG = SmoothConfig(workers=0, max_edge=2, filter=True)


class Unread:
    """A source of which some pictures cannot be read."""

    def __init__(self, source, *indices):
        self._source, self._indices = source, indices

    def read(self, start, stop):
        for frame in self._source.read(start, stop):
            lost = frame.index in self._indices
            yield dataclasses.replace(frame, image=None, error="timed out") if lost else frame


def smooth(store, source_id, video, *unread):
    """Smooth a video, as far as it is not; when it is filtered, the frames `unread` cannot be read. What it says."""
    temporal, source = Temporal(store, source_id), open_source(video)
    shape = edges_shape(CONFIG.max_edge)
    temporal.prepare(max_edge=CONFIG.max_edge, flow=CONFIG.flow, leak=CONFIG.leak, shape=shape)
    for segment in temporal.pending("edges"):
        write_segment_edges(source, segment, store, CONFIG, lambda: None)
    if not temporal.solved():
        solve_source(source_id, store, CONFIG)
    temporal.prepare_filter()
    lossy = Unread(source, *unread)
    said = [filter_segment(lossy, segment, store, CONFIG, lambda: None) for segment in temporal.pending("filter")]
    source.close()
    return said


def test_a_picture_that_cannot_be_read_once_costs_no_labels(tmp_path):
    video = media.write_video(tmp_path / "clip.mp4", frames=14)
    whole, _ = labelled(tmp_path / "whole.zarr", video, 4)
    store, name = labelled(tmp_path / "a.zarr", video, 4)
    smooth(whole, name, video)
    # The frames beside it are filtered without it.
    assert smooth(store, name, video, 9) == ["", "frame 9: timed out", "frame 9: timed out", ""]
    temporal = Temporal(store, name)
    assert temporal.read("filtered").tolist() == [FILTERED] * 9 + [SCALED] + [FILTERED] * 4
    assert temporal.attributes()["unread"] == [4, 8]
    scale, shift = (temporal.read(one)[9] for one in ("scale", "shift"))
    found = open_datasets(store.uri, smooth=True)[name]
    raw = open_datasets(store.uri)[name]
    np.testing.assert_allclose(found.depth[9].values, raw.depth[9].values * scale + shift, atol=1.1e-4)
    assert (found.normals[9, ..., 2].values > 0.99).all()
    assert not verify(store).damage
    smooth(store, name, video)
    assert written(store) == written(whole)
