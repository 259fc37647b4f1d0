"""What probing makes of an input."""

import os
import shutil
import time
from pathlib import Path

import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.plan import Prober
from depthmill.pipeline.sources.video import VideoSource
from depthmill.pipeline.store import Layout, records
from depthmill.tests import media
from depthmill.tests.pipeline.store.samples import write


def test_limits_are_those_that_were_given(tmp_path):
    media.write_image_folder(tmp_path / "photos", count=3, sizes=[(30, 40), (40, 30), (60, 80)])
    for name, max_pixels, size in (("some", 2000, [40, 40]), ("all", 4800, [60, 80])):
        store = stores.create(tmp_path / name, Layout(), {})
        prober = Prober(store.uri, max_pixels, 3, False)
        prober.load()
        planned = prober.probe(str(tmp_path / "photos"))
        assert (planned.frames, store.attributes(planned.id)["size"]) == (3, size)
    few = Prober(store.uri, 4800, 2, False)
    few.load()
    with pytest.raises(SourceError, match="more than 2 frames"):
        few.probe(str(tmp_path / "photos"))


def test_an_input_of_which_nothing_is_left_to_do_is_read_only_if_it_may_have_changed(tmp_path, monkeypatch):
    clip = media.write_video(tmp_path / "clip.mp4", frames=3)
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 10**10)
    store = stores.create(tmp_path / "labels.zarr", Layout(), {})
    read, probe = [], VideoSource.probe
    monkeypatch.setattr(VideoSource, "probe", lambda source: read.append(1) or probe(source))

    def planned(max_pixels=1 << 27, max_frames=3, **options):
        read.clear()
        prober = Prober(store.uri, max_pixels, max_frames, options.get("retry_failed", False))
        prober.load()
        return prober.probe(str(clip))

    first = planned()
    records.write_stamps(store.directory, {first.id: first.stamp})
    assert first.stamp
    assert planned() == first
    assert read, "what is left to do is worth a look at what it is to be done with"
    (segment,) = store.segments(first.id)
    write(store, segment, failed={2}, size=(media.HEIGHT, media.WIDTH))
    done = planned()
    assert (done.labelled, done.failed, done.segments, done.stamp) == (2, 1, 0, first.stamp)
    assert done.frames_left == 0
    assert not read
    prober = Prober(store.uri, 1 << 27, 3, False)
    prober.load()
    assert prober.probe(str(clip), anew=True) == done
    assert read
    again = planned(retry_failed=True)
    assert (again.segments, again.frames_left) == (1, 1)
    assert read
    with pytest.raises(SourceError, match="more than 2 frames"):
        planned(max_frames=2)
    assert planned(max_pixels=1 << 26).stamp != first.stamp
    assert read
    touched = os.utime(clip, (1e9, 1e9)) or planned()
    assert read
    assert touched.stamp != first.stamp
    records.write_stamps(store.directory, {first.id: touched.stamp})
    assert planned() == touched
    assert not read
    # Of another input, whose source took the place of the one that was stamped, or was put back since.
    records.write_stamps(store.directory, {first.id: touched.stamp.partition(" ")[0] + " another fingerprint"})
    assert planned() == touched
    assert read
    records.write_stamps(store.directory, {first.id: touched.stamp})
    records.write_stamps(store.directory, {first.id: ""})
    assert records.read_stamps(store.directory) == {}
    records.write_stamps(store.directory, {first.id: touched.stamp})
    Path(store.uri, "stamps.json").write_text("[broken")
    assert planned() == touched
    assert read
    records.write_stamps(store.directory, {first.id: touched.stamp})
    shutil.rmtree(Path(store.uri, first.id))
    assert planned().segments == 1, "what was removed by hand is labelled anew"
