"""Smoothing runs, in this process, in which something fails: sources, segments, the store."""

import io
import signal
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from ray.exceptions import RayTaskError
from rich.console import Console

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import (
    RunStoppedError,
    SourceError,
    StoreClosedError,
    StoreError,
    StoreForbiddenError,
    StoreFullError,
)
from depthmill.pipeline.smoothing import stage
from depthmill.pipeline.smoothing.edges import FIELDS
from depthmill.pipeline.smoothing.stage import Smoother
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store import Layout, create, open_datasets
from depthmill.pipeline.store.temporal import SCALED, Temporal
from depthmill.pipeline.store.verify import verify
from depthmill.tests import media
from depthmill.tests.pipeline.store import samples
from depthmill.tests.workers.flickering import labelled, run, written
from depthmill.workers import pace
from depthmill.workers.looks import Looks
from depthmill.workers.pool import Event
from depthmill.workers.smooth import _Run, smooth

FRAMES = 21


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return media.write_video(tmp_path_factory.mktemp("media") / "clip.mp4", frames=FRAMES)


def test_unlabelled_and_missing_sources_are_left_out_with_the_reason(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video, upto=2)
    assert "not labelled yet" in run(store).left_out[name]
    gone = media.write_video(tmp_path / "gone.mp4", frames=FRAMES)
    other, name = labelled(tmp_path / "b.zarr", gone)
    gone.unlink()
    assert list(run(other).left_out) == [name]
    with pytest.raises(StoreError, match="no smoothed source"):
        open_datasets(other.uri, smooth=True)


@pytest.mark.parametrize("phase", ["edges", "filter"])
def test_a_segment_that_cannot_be_read_again_is_left_until_it_can(tmp_path, video, monkeypatch, phase):
    from depthmill.pipeline.smoothing import stage

    name = {"edges": "write_segment_edges", "filter": "filter_segment"}[phase]
    real = getattr(stage, name)

    def broken(source, segment, *arguments):
        if segment.start == 8:
            raise MemoryError("decoder")
        real(source, segment, *arguments)

    whole, _ = labelled(tmp_path / "whole.zarr", video)
    run(whole, filter=True)
    store, source_id = labelled(tmp_path / "a.zarr", video)
    with monkeypatch.context() as patch:
        patch.setattr(stage, name, broken)
        for _ in range(2):  # it is tried again, and listed again
            done = run(store, attempts=2, filter=True)
            assert list(done.unread.values()) == ["MemoryError: decoder"]
            assert done.smoothed == (source_id,)
    temporal = Temporal(store, source_id)
    if phase == "edges":
        assert temporal.unread("edges") == [store.segments(source_id)[1]]
        assert not np.isfinite(temporal.read("edges")[8:16, :, FIELDS.index("log_scale")]).any()
    else:
        assert (temporal.read("filtered")[8:16] == SCALED).all()
        scale, shift = temporal.read("scale"), temporal.read("shift")
        raw = open_datasets(store.uri)[source_id]
        scaled = raw.depth.values * scale[:, None, None] + shift[:, None, None]
        found = open_datasets(store.uri, smooth=True)[source_id]
        np.testing.assert_allclose(found.depth.values[8:16], scaled[8:16], atol=1.1e-4)
        np.testing.assert_allclose(found.normals.values, raw.normals.values, atol=0.02)
    assert not verify(store).damage
    assert not run(store, filter=True).unread
    assert written(store) == written(whole)


def test_nothing_of_a_source_that_is_left_out_is_tried_again(tmp_path, video):
    store, source_id = labelled(tmp_path / "a.zarr", video)
    going = _Run(store, SmoothConfig(workers=2, max_edge=4, attempts=2), [source_id])
    going.plan(wait=True)
    first, second, third = (going.queue.popleft() for _ in range(3))  # all are under way
    going._failed(third, Event(2, error=MemoryError("decoder")))
    assert going.queue.pop() == replace(third, attempts=1), "tried again, as often as was asked for"
    going._failed(replace(first, attempts=1), Event(0, error=SourceError("it is another file now")))
    assert list(going.left_out) == [source_id]
    for attempts in (0, 1):
        going._failed(replace(second, attempts=attempts), Event(1, error=MemoryError("decoder")))
    assert (going._next(None), list(going.queue), going.unread) == (None, [], {})
    assert Temporal(store, source_id).pending("edges") == store.segments(source_id)


@pytest.mark.parametrize("raised", [StoreError, StoreFullError, StoreForbiddenError])
def test_what_a_store_cannot_take_is_said_as_on_ray_without_a_traceback(tmp_path, video, monkeypatch, raised):
    tries = []

    def fail(self, task):
        tries.append(task)
        raise RayTaskError("smooth", "Traceback", raised("no room")).as_instanceof_cause()

    store, _ = labelled(tmp_path / "a.zarr", video)
    monkeypatch.setattr(Smoother, "smooth", fail)
    monkeypatch.setattr(pace, "rest_s", lambda times: 0.0)
    with pytest.raises(RunStoppedError, match=r"^no room") as caught:
        run(store)
    assert "Traceback" not in str(caught.value)
    assert len(tries) == (1 if issubclass(raised, StoreClosedError) else 9), "a service may come back by itself"


def test_a_store_that_does_not_answer_for_a_while_stops_nothing(tmp_path, video, monkeypatch):
    monkeypatch.setattr(pace, "rest_s", lambda times: 0.0)
    whole, _ = labelled(tmp_path / "whole.zarr", video)
    run(whole, filter=True)
    store, name = labelled(tmp_path / "a.zarr", video)
    for owner, method in ((Smoother, "smooth"), (Temporal, "unread"), (Temporal, "write_edges")):
        real, times = getattr(owner, method), []

        def fails(self, *arguments, real=real, times=times):
            times.append(1)
            if len(times) in (3, 4):
                raise StoreError("503")
            return real(self, *arguments)

        monkeypatch.setattr(owner, method, fails)
    assert run(store, filter=True).smoothed == (name,)
    assert written(store) == written(whole)


@pytest.mark.parametrize(("raised", "times"), [(StoreError, 2), (StoreError, 99), (StoreForbiddenError, 99)])
def test_a_store_that_does_not_answer_at_the_start_is_waited_for(tmp_path, video, monkeypatch, raised, times):
    real, tries = Looks._look, []

    def fails(self, *arguments):
        tries.append(1)
        if len(tries) <= times:
            raise raised("503")
        return real(self, *arguments)

    store, name = labelled(tmp_path / "a.zarr", video)
    monkeypatch.setattr(Looks, "_look", fails)
    monkeypatch.setattr(pace, "rest_s", lambda times: 0.0)
    if times == 2:
        assert run(store).smoothed == (name,)
        return
    with pytest.raises(RunStoppedError, match=r"503[\s\S]*what was smoothed so far stays"):
        run(store)
    assert len(tries) == (9 if raised is StoreError else 1)


def test_a_signal_stops_it_and_what_was_smoothed_stays(tmp_path, video, monkeypatch):
    real = Smoother.smooth

    def stop(self, task):
        with suppress(KeyboardInterrupt):  # as a callback of Ray's does
            signal.raise_signal(signal.SIGTERM)
        return real(self, task)

    store, name = labelled(tmp_path / "a.zarr", video)
    monkeypatch.setattr(Smoother, "smooth", stop)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(RunStoppedError, match="stopped: what was smoothed so far stays"):
            run(store)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert Temporal(store, name).pending("edges") == store.segments(name)[1:]


@pytest.mark.parametrize(("phase", "other"), [("segment_edges", {"max_edge": 2}), ("filter_frames", {"leak": 0.5})])
def test_a_run_ends_when_another_smooths_with_other_options(tmp_path, video, monkeypatch, phase, other):
    """Else it would write its own into what that one has committed, for good."""
    alone, _ = labelled(tmp_path / "alone.zarr", video)
    run(alone, filter=True, **other)
    store, name = labelled(tmp_path / "a.zarr", video)
    real, calls = getattr(stage, phase), []

    def overtaken(given, *more, **options):
        read = list(given)
        calls.append(1)
        if len(calls) == 2:
            run(store, filter=True, **other)
        return real(iter(read), *more, **options)

    monkeypatch.setattr(stage, phase, overtaken)
    with pytest.raises(RunStoppedError, match=f"another run smooths {name} of .* with other options"):
        run(store, filter=True)
    assert run(store, filter=True, **other).smoothed == (name,)
    assert written(store) == written(alone)


def test_a_source_that_had_to_be_left_out_hides_no_other(tmp_path, video):
    gone = media.write_video(tmp_path / "gone.mp4", frames=FRAMES)
    store, name = labelled(tmp_path / "a.zarr", video)
    store, other = labelled(tmp_path / "a.zarr", gone)
    kept = gone.rename(tmp_path / "kept.mp4")
    done = run(store)
    assert (done.smoothed, list(done.left_out)) == ((name,), [other])
    assert list(open_datasets(store.uri, smooth=True)) == [name]
    assert not verify(store).damage
    with pytest.raises(StoreError, match="no smoothed source"):
        open_datasets(store.uri, sources=[other], smooth=True)
    kept.rename(gone)
    assert run(store).smoothed == tuple(sorted((name, other)))
    assert sorted(open_datasets(store.uri, smooth=True)) == sorted((name, other))
    assert "left_out" not in Temporal(store, other).attributes()


@pytest.mark.parametrize("phase", ["edges", "filter"])
def test_damage_leaves_one_source_out(tmp_path, video, phase):
    other = media.write_video(tmp_path / "other.mp4", frames=FRAMES)
    store, good = labelled(tmp_path / "a.zarr", video)
    store, bad = labelled(tmp_path / "a.zarr", other)
    if phase == "edges":
        files = [f"{bad}/checksum/c/0/0"]
    else:
        run(store)
        files = [f"{bad}/temporal/scale/c/0", f"{bad}/depth/c/1/0/0"]
    for name in files:
        (tmp_path / "a.zarr" / name).write_bytes(b"\xffnonsense")
        done = run(store, filter=phase == "filter", attempts=1)
        assert done.smoothed == (good,)
        assert "is damaged" in done.left_out[bad]
        verify(store, repair=True)
    with pytest.raises(StoreError, match="has no source 'typo'"):
        smooth(store.uri, SmoothConfig(workers=0), sources=[good, "typo"])


def test_damage_is_found_and_made_again(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video, failed=(13,))  # of a file that other frames need
    run(store, filter=True)
    before = written(store)
    assert not verify(store).damage
    scale, filtered = ["temporal/scale/c/0"], ["depth_smooth/c/3/0/0", "normals_smooth/c/0/0/0/0"]
    broken = (
        ["temporal/zarr.json"],
        ["temporal/edges/c/1/0/0", "temporal/score/c/1", *scale],
        ["temporal/filtered/c/2", *filtered],
    )
    for keys in (*broken, scale, filtered):
        for key in keys:
            path = tmp_path / "a.zarr" / name / key
            path.write_bytes(b"\xffnonsense") if keys in broken else path.unlink()
        found = verify(store, repair=True).damage
        assert {(one.file, one.repaired) for one in found} == {(f"{name}/{key}", True) for key in keys}
        run(store, filter=True)
        assert not verify(store).damage
        assert written(store) == before


def test_pictures_of_several_sizes_are_left_out(tmp_path):
    media.write_image_folder(tmp_path / "photos", count=4, sizes=[(48, 64), (64, 48)])
    source = open_source(str(tmp_path / "photos"))
    store = create(tmp_path / "a.zarr", Layout(shard_frames=4, segment_frames=4), samples.IDENTITY)
    about = source.probe()
    store.add(about)
    (segment,) = store.segments(about.id)
    writer = store.writer(segment)
    for frame in source.read(0, 4):
        height, width = frame.image.shape[:2]
        writer.put(frame.index, np.full((height, width), 0.5, np.float32), np.zeros((height, width, 3), np.float32))
    writer.commit()
    done = smooth(store.uri, SmoothConfig(workers=0), sources=[about.id], console=Console(file=io.StringIO()))
    assert "differ in size" in done.left_out[about.id]
