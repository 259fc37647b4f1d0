import dataclasses
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import SourceChangedError, SourceError, StoreDamagedError
from depthmill.pipeline.smoothing import edges, filter
from depthmill.pipeline.smoothing.stage import (
    Smoother,
    SmoothTask,
    edges_shape,
    filter_segment,
    solve_source,
    write_empty_edges,
    write_segment_edges,
    write_unfiltered,
)
from depthmill.pipeline.sources import open_source, opened
from depthmill.pipeline.sources import video as video_source
from depthmill.pipeline.store import open_datasets, opening
from depthmill.pipeline.store.temporal import FILTERED, PARTLY, SCALED, Temporal
from depthmill.pipeline.store.verify import verify
from depthmill.tests import media
from depthmill.tests.workers.flickering import labelled, written

CONFIG = SmoothConfig(workers=0, max_edge=2, filter=True, flow="ultrafast")


class Unread:
    """A source of which some pictures cannot be read."""

    def __init__(self, source, *indices):
        self._source, self._indices = source, indices

    def read(self, start, stop, on_passed=None):
        for frame in self._source.read(start, stop):
            lost = frame.index in self._indices
            yield dataclasses.replace(frame, image=None, error="timed out") if lost else frame


def smooth(store, source_id, video, *unread, edges_unread=()):
    """Smooth a video, as far as it is not; the frames `unread` cannot be read when it is filtered. What that says."""
    temporal, source = Temporal(store, source_id), open_source(video)
    shape = edges_shape(CONFIG.max_edge)
    temporal.prepare(max_edge=CONFIG.max_edge, flow=CONFIG.flow, leak=CONFIG.leak, shape=shape)
    for segment in temporal.pending("edges") + temporal.unread("edges"):
        write_segment_edges(Unread(source, *edges_unread), segment, store, CONFIG, lambda: None)
    if not temporal.solved():
        solve_source(source_id, store, CONFIG)
    temporal.prepare_filter()
    lossy, todo = Unread(source, *unread), temporal.pending("filter") + temporal.unread("filter")
    said = [filter_segment(lossy, segment, store, CONFIG, lambda: None) for segment in todo]
    source.close()
    return said


def test_a_picture_that_cannot_be_read_once_costs_no_labels(tmp_path, monkeypatch):
    presets = []
    for module in (edges, filter):

        def noted(of, to, preset, where=module.__name__, real=module.dense_flow):
            presets.append((where, preset))
            return real(of, to, preset)

        monkeypatch.setattr(module, "dense_flow", noted)
    video = media.write_video(tmp_path / "clip.mp4", frames=14)
    whole, _ = labelled(tmp_path / "whole.zarr", video, 4)
    store, name = labelled(tmp_path / "a.zarr", video, 4)
    smooth(whole, name, video)
    assert set(presets) == {(edges.__name__, CONFIG.flow), (filter.__name__, CONFIG.flow)}
    # The frames beside it are filtered without it.
    assert smooth(store, name, video, 9) == ["", "frame 9: timed out", "frame 9: timed out", ""]
    temporal = Temporal(store, name)
    assert (
        temporal.read("filtered").tolist() == [FILTERED] * 7 + [PARTLY] * 2 + [SCALED] + [PARTLY] * 2 + [FILTERED] * 2
    )
    assert [one.start for one in temporal.unread("filter")] == [4, 8]
    scale, shift = (temporal.read(one)[9] for one in ("scale", "shift"))
    found = open_datasets(store.uri, smooth=True)[name]
    raw = open_datasets(store.uri)[name]
    np.testing.assert_allclose(found.depth[9].values, raw.depth[9].values * scale + shift, atol=1.1e-4)
    np.testing.assert_allclose(found.normals.values, raw.normals.values, atol=0.02)
    assert not verify(store).damage
    before = written(store)
    for segment in store.segments(name):  # none of which can be read at all now
        write_unfiltered(segment, store, CONFIG)
    assert written(store) == before, "what an earlier run could read stays"
    smooth(store, name, video)
    assert written(store) == written(whole)


def test_edges_without_a_picture_are_made_again_and_all_that_follows_from_them(tmp_path):
    video = media.write_video(tmp_path / "clip.mp4", frames=14)
    whole, _ = labelled(tmp_path / "whole.zarr", video, 4)
    store, name = labelled(tmp_path / "a.zarr", video, 4)
    smooth(whole, name, video)
    smooth(store, name, video, edges_unread=(7,))
    temporal = Temporal(store, name)
    assert [one.start for one in temporal.unread("edges")] == [4, 8]  # it is two frames before the third segment's
    assert temporal.read("shot").tolist() == [0] * 14  # frames that nobody saw are no shots
    before = written(store)
    for segment in store.segments(name):  # none of which can be read at all now
        write_empty_edges(segment, store, CONFIG)
    assert written(store) == before, "what an earlier run could read stays"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Temporal, "uncommit_solution", lambda self: pytest.fail("nothing is new"))
        smooth(store, name, video, edges_unread=(7,))
    assert written(store) == before
    smooth(store, name, video)
    assert not temporal.unread("edges")
    assert written(store) == written(whole)


@pytest.mark.parametrize(("array", "change"), [("depth", "lost"), ("depth", "another's"), ("normals", "lost")])
def test_nothing_is_computed_of_damaged_labels(tmp_path, array, change):
    video = media.write_video(tmp_path / "clip.mp4", frames=14)
    store, name = labelled(tmp_path / "a.zarr", video, 4)
    other, shard = (Path(store.uri) / name / array / "c" / number for number in "12")
    (file,) = (one for one in shard.rglob("*") if one.is_file())
    if change == "lost":
        file.unlink()
    else:  # which decodes, as well as what was there
        file.write_bytes((other / file.relative_to(shard)).read_bytes())
    with pytest.raises(StoreDamagedError, match=f"{name}/{array}/c/2/.* is damaged"):
        smooth(store, name, video)
    temporal = Temporal(store, name)
    what = {"depth": "edges", "normals": "filter"}[array]
    assert {8} <= {one.start for one in temporal.pending(what)}


@pytest.mark.parametrize(("workers", "threads"), [(None, 1), (0, 0)])
def test_a_worker_reads_no_index_opens_anew_when_asked_and_decodes_on_its_cores(
    tmp_path, monkeypatch, workers, threads
):
    video = media.write_video(tmp_path / "clip.mp4", frames=5)
    store, name = labelled(tmp_path / "a.zarr", video)
    monkeypatch.setattr(opening, "read_root", lambda directory: pytest.fail("4 kB a source, of which it needs none"))
    given = []
    monkeypatch.setattr(
        opened, "open_source", lambda uri, **options: given.append(options) or open_source(uri, **options)
    )
    worker = Smoother(CONFIG.model_copy(update={"workers": workers}), store.uri)
    worker.load()
    uri, fingerprint = (store.attributes(name)[key] for key in ("uri", "fingerprint"))
    for phase in ("open", "edges", "solve"):
        worker.smooth(SmoothTask(phase, uri, fingerprint, store.segments(name)[0]))
    video.unlink()
    with pytest.raises(SourceError, match="no such file"):  # though it is still open
        worker.smooth(SmoothTask("open", uri, fingerprint, store.segments(name)[0]))
    worker.close()
    assert {one["threads"] for one in given} == {threads}
    assert Temporal(store, name).solved()


@pytest.mark.parametrize("phase", ["edges", "filter"])
def test_nothing_is_computed_of_a_video_that_changed_and_it_is_opened_anew(tmp_path, monkeypatch, phase):
    video = media.write_video(tmp_path / "clip.mp4", frames=21)
    store, name = labelled(tmp_path / "a.zarr", video)
    smooth(store, name, video)
    temporal = Temporal(store, name)
    temporal.uncommit_solution()
    worker, opens = Smoother(CONFIG, store.uri), []
    worker.load()
    monkeypatch.setattr(opened, "open_source", lambda *given, **how: opens.append(1) or open_source(*given, **how))
    uri, fingerprint = (store.attributes(name)[key] for key in ("uri", "fingerprint"))
    task = SmoothTask(phase, uri, fingerprint, store.segments(name)[0])
    what = {"edges": "write_edges", "filter": "_write"}[phase]

    def changed(*_):
        raise SourceChangedError("another one")

    worker.smooth(task)
    with monkeypatch.context() as patch:
        patch.setattr(Temporal, what, lambda *_: pytest.fail("it was committed"))
        patch.setattr(video_source, "check_unchanged", changed)
        with pytest.raises(SourceChangedError, match="another one"):
            worker.smooth(task)
    assert len(opens) == 1
    worker.smooth(task)
    worker.close()
    assert len(opens) == 2
