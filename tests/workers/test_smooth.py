"""Smoothing runs, in this process."""

import io
import pickle
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import xarray
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from depthmill.cli import app
from depthmill.pipeline import objects
from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import (
    RunStoppedError,
    StoreError,
    StoreFullError,
)
from depthmill.pipeline.preview import _labels
from depthmill.pipeline.smoothing.stage import Smoother
from depthmill.pipeline.sources import source_id
from depthmill.pipeline.store import create, open_datasets, open_store
from depthmill.pipeline.store.inspect import as_text, inspect
from depthmill.pipeline.store.temporal import Temporal
from depthmill.tests import media
from depthmill.tests.pipeline.store import samples
from depthmill.tests.workers.flickering import labelled, run, written
from depthmill.workers.resume import unsmoothed_videos
from depthmill.workers.smooth import _Run, smooth

FRAMES = 21


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return media.write_video(tmp_path_factory.mktemp("media") / "clip.mp4", frames=FRAMES)


def test_scales_are_written_beside_labels_that_stay(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)
    before = samples.files(store.uri)
    done = run(store)
    assert (done.smoothed, done.left_out, done.unread, done.frames) == ((name,), {}, {}, FRAMES)
    assert before.items() <= samples.files(store.uri).items()
    raw, smooth_ = open_datasets(store.uri)[name], open_datasets(store.uri, smooth=True)[name]
    scale, shift = Temporal(store, name).read("scale"), Temporal(store, name).read("shift")
    expected = raw.depth.values * scale[:, None, None] + shift[:, None, None]
    assert np.array_equal(smooth_.depth.values, expected)
    assert np.array_equal(smooth_.depth[7].values, expected[7])
    assert np.array_equal(smooth_.depth[[9, 2], 3, ::2].values, expected[[9, 2], 3, ::2])
    assert smooth_.depth.dtype == np.float32
    sent = pickle.loads(pickle.dumps(smooth_))  # as to the workers of a DataLoader
    assert np.array_equal(sent.depth[7].values, expected[7])


def test_bytes_depend_on_neither_segments_nor_a_stop(tmp_path, video, monkeypatch):
    def values(store, name):
        temporal = Temporal(store, name)
        own = [temporal.read(one) for one in ("edges", "score", "scale", "shift", "shot")]
        return own + [store.array(name, f"{one}_smooth")[:] for one in ("depth", "normals")]

    one, name = labelled(tmp_path / "one.zarr", video, 8)
    run(one, filter=True)
    other, _ = labelled(tmp_path / "other.zarr", video, 24)
    run(other, filter=True)
    assert all(
        np.array_equal(a, b, equal_nan=True) for a, b in zip(values(one, name), values(other, name), strict=True)
    )
    stopped, _ = labelled(tmp_path / "stopped.zarr", video, 8)
    for what in ("write_edges", "write_solution", "write_filtered"):
        with monkeypatch.context() as patch:
            calls = []
            real = getattr(Temporal, what)

            def fail(self, *arguments, calls=calls, real=real):
                calls.append(1)
                if len(calls) == 2 or real.__name__ == "write_solution":
                    raise StoreFullError("killed")
                real(self, *arguments)

            patch.setattr(Temporal, what, fail)
            with pytest.raises(RunStoppedError, match="killed"):
                run(stopped, filter=True)
    assert run(stopped, filter=True).smoothed == (name,)
    assert written(stopped) == written(one)


def test_again_does_nothing_and_another_leak_solves_alone(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)
    run(store)
    before = written(store)
    assert run(store).frames == 0
    assert written(store) == before
    scale = Temporal(store, name).read("scale")
    assert run(store, leak=0.5).frames == 0
    assert not np.array_equal(Temporal(store, name).read("scale"), scale)
    assert Temporal(store, name).attributes()["leak"] == 0.5
    assert Temporal(store, name).solved()
    assert run(store, flow="medium").frames == FRAMES


def test_progress_counts_scale_and_filter_from_the_beginning(tmp_path, video, monkeypatch):
    store, _ = labelled(tmp_path / "a.zarr", video, 8)
    seen = []

    def display(*_):
        return nullcontext(lambda counts, states: seen.append((counts.done, counts.total)))

    monkeypatch.setattr("depthmill.workers.smooth.open_display", display)
    assert run(store, filter=True).frames == 2 * FRAMES
    assert {total for _, total in seen} == {2 * FRAMES}
    assert seen[-1] == (2 * FRAMES, 2 * FRAMES)


def test_other_options_cost_nothing_before_a_source_can_be_made_anew(tmp_path, video):
    kept = media.write_video(tmp_path / "kept.mp4", frames=FRAMES)
    store, name = labelled(tmp_path / "a.zarr", video)
    store, gone = labelled(tmp_path / "a.zarr", kept)
    run(store)
    before = {one: written(store, one) for one in (name, gone)}
    kept.rename(tmp_path / "away.mp4")
    done = run(store, flow="medium")
    assert (done.smoothed, list(done.left_out)) == ((name,), [gone])
    assert written(store, gone) == before[gone], "its old smoothing stays"
    assert written(store, name) != before[name]
    assert sorted(open_datasets(store.uri, smooth=True)) == sorted((name, gone))


@pytest.mark.parametrize("options", [{"flow": "ultrafast"}, {"leak": 0.5}])
def test_a_source_is_smoothed_anew_before_the_next_is_begun(tmp_path, video, options):
    store, first = labelled(tmp_path / "a.zarr", video)
    store, other = labelled(tmp_path / "a.zarr", shutil.copy(video, tmp_path / "other.mp4"))
    run(store)
    before = written(store, other)
    config = SmoothConfig(workers=0, max_edge=4, **options)
    going, worker = _Run(store, config, [first, other]), Smoother(config, store.uri)
    worker.load()

    def planned():
        while going.looks.left:
            going.plan()
        return going.queue

    while planned()[0].segment.source_id == first:
        task = going.queue.popleft()
        worker.smooth(task)
        going._finished(task)
    assert task.phase == "solve"
    assert Temporal(store, first).current()
    assert Temporal(store, first).attributes() != Temporal(store, other).attributes()
    assert written(store, other) == before, "a run that is stopped now has removed nothing else"
    worker.close()
    going.looks.close()


def test_labels_done_again_make_it_stale(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)
    run(store)
    segment = store.segments(name)[0]
    writer = store.writer(segment)
    for index in range(segment.start, segment.stop):
        writer.fail(index, "now broken")
    writer.commit()
    with pytest.raises(StoreError, match="labelled again since"):
        open_datasets(store.uri, smooth=True)
    assert run(store).frames == FRAMES
    assert np.isnan(open_datasets(store.uri, smooth=True)[name].depth[0]).all()


def test_workers_are_given_signed_urls_and_the_store_is_not(tmp_path, monkeypatch):
    store = create(tmp_path / "a.zarr", samples.LAYOUT, samples.IDENTITY)
    url, secret = "https://host/clip.mp4", "X-Amz-Signature=0123456789abcdef"
    monkeypatch.setattr(objects, "_signed", {})
    store.add(replace(samples.VIDEO, id=source_id(url), uri=url))
    for segment in store.segments(source_id(url)):
        samples.write(store, segment)
    going = _Run(store, SmoothConfig(), unsmoothed_videos([f"{url}?{secret}"], store.uri))
    assert going.plan(wait=True)
    assert {task.uri for task in going.queue} == {f"{url}?{secret}"}
    assert not any(secret.encode() in data for data in samples.files(store.uri).values())
    going.looks.close()


def test_an_inspection_says_what_is_smoothed(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)

    def said():
        found = inspect(open_store(store.uri))
        assert ("smoothing" in as_text(found)) == (found.sources[0].smoothing != "none")
        return found.sources[0].smoothing

    assert said() == "none"
    run(store)
    assert said() == "smoothed"
    run(store, filter=True)
    assert said() == "filtered"
    Temporal(store, name).uncommit_solution()
    assert said() == "unfinished"
    run(store)
    writer = store.writer(store.segments(name)[0])
    for index in range(8):
        writer.fail(index, "now broken")
    writer.commit()
    assert said() == "stale"


def test_filtered_labels_are_unit_and_plain_xarray_reads_them(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)
    run(store, filter=True)
    source = open_datasets(store.uri, smooth=True)[name]
    assert np.allclose(np.linalg.norm(source.normals.values, axis=-1), 1, atol=0.02)
    plain = xarray.open_zarr(store.uri, group=name, consolidated=False, chunks=None)
    assert np.allclose(plain.depth_smooth.values, source.depth.values, atol=1e-6)


def test_depth_alone_and_pictures_of_one_size(tmp_path):
    media.write_image_folder(tmp_path / "photos", count=9, sizes=[(48, 64)])
    store, name = labelled(tmp_path / "a.zarr", tmp_path / "photos", labels=("depth",), failed=(4,))
    assert run(store).smoothed == ()  # pictures are no video, unless they are named
    console = Console(file=io.StringIO())
    done = smooth(store.uri, SmoothConfig(workers=0, filter=True), sources=[name, name], console=console)
    assert done.smoothed == (name,)
    assert "smoothing" not in console.file.getvalue()  # lines say what each worker does
    found = open_datasets(store.uri, smooth=True)[name]
    assert np.isfinite(found.depth.values).all((1, 2)).tolist() == [frame != 4 for frame in range(9)]
    assert not (tmp_path / "a.zarr" / name / "normals_smooth").exists()


def test_sources_that_are_no_videos_are_named(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 24), (80 * i, 0, 0)).save(folder / f"{i}.png")
    store, name = labelled(tmp_path / "a.zarr", folder)
    result = CliRunner().invoke(app, ["smooth", store.uri, "--workers", "0"])
    assert f"no videos, and left as they are: 1 source, {name};" in result.output
    result = CliRunner().invoke(app, ["smooth", store.uri, "--workers", "0", "--source", name, "--max-frames", "2"])
    assert (result.exit_code, "no videos" in result.output) == (1, False)
    assert "more than 2 frames" in result.output


def test_the_command_line_labels_smooths_and_previews(tmp_path, video):
    def depthmill(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    store = tmp_path / "a.zarr"
    options = ("--checkpoint", "demo", "--processing-resolution", 64, "--workers", 0, "--segment-frames", 16)
    assert "1 source smoothed in" in depthmill("label", video, store, *options, "--smooth")
    (name,) = open_store(store).sources()
    before = written(open_store(store))
    again = depthmill("smooth", store, "--workers", 0, "--source", name)
    assert "0 frames done in this run" in again
    assert written(open_store(store)) == before
    filtered = depthmill("smooth", store, "--workers", 0, "--filter", "--leak", 0.2)
    assert f"{FRAMES} frames done in this run (one that is solved and filtered counts twice)" in filtered
    sizes = []
    for out, more in ((tmp_path / "plain", ()), (tmp_path / "smooth", ("--smooth",))):
        depthmill("preview", store, "--out", out, *more)
        (path,) = out.glob("*.png")
        with Image.open(path) as picture:
            sizes.append(picture.size)
    # More columns; and below, the slices over time and the curves.
    assert sizes[1][0] > sizes[0][0]
    raw, found = (open_datasets(store, smooth=smooth)[name] for smooth in (False, True))
    drawn = _labels(open_store(store), name, raw, found)
    assert list(drawn) == ["depth", "depth\nsmoothed", "normals", "normals\nsmoothed"]
    assert sizes[1][1] > sizes[0][1] + 400


def test_smoothed_depth_moves_less(tmp_path, video):
    store, name = labelled(tmp_path / "a.zarr", video)
    run(store, max_edge=8)
    raw = open_datasets(store.uri)[name].depth.values[:, 20, 30]
    found = open_datasets(store.uri, smooth=True)[name].depth.values[:, 20, 30]
    assert np.abs(np.diff(found)).mean() < 0.5 * np.abs(np.diff(raw)).mean()
