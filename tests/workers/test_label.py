"""Runs in this process: the same code as on Ray, without it."""

import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import xarray
from PIL import Image
from rich.console import Console

from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.errors import ConfigError, RunStoppedError, SourceError, StoreMismatchError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.sources import video as reader
from depthmill.pipeline.store import open_datasets, open_store
from depthmill.pipeline.worker import Worker
from depthmill.tests import media, runs
from depthmill.tests.workers.labelling import only_source, run
from depthmill.workers.label import _options, label
from depthmill.workers.pool import InProcess
from depthmill.workers.progress import Rate
from depthmill.workers.smooth import smooth


def test_a_video_is_labelled_as_the_labeler_labels_it(video, tmp_path, config, checkpoints):
    summary = run([video], tmp_path / "out.zarr", config)
    assert (summary.frames, summary.labelled, summary.committed, summary.failures) == (19, 19, 19, ())
    source = only_source(tmp_path / "out.zarr")
    frames = np.stack([frame.image for frame in open_source(video).read(0, 19)])
    labeler = Labeler.from_pretrained(checkpoints / "depth", checkpoints / "normals", device="cpu", batch_size=4)
    labels = labeler(frames)
    assert np.abs(source.depth.values - labels.depth).max() <= 1.1e-4  # half a packing step, and rounding
    assert np.abs(source.normals.values - labels.normals).max() <= 0.5 / 127 + 1e-5
    assert np.allclose(source.time, np.arange(19) / 25)
    assert (source.status == 1).all()


def test_a_video_is_read_through_once_to_be_probed(tmp_path, config, monkeypatch):
    videos = [media.write_video(tmp_path / f"{name}.mp4", frames=9) for name in "abcd"]
    scans, closed = [], []
    scan, close = reader.scan, reader.VideoSource.close
    monkeypatch.setattr(reader, "scan", lambda uri, *most: scans.append(uri) or scan(uri, *most))
    monkeypatch.setattr(reader.VideoSource, "close", lambda self: closed.append(self) or close(self))
    assert run(videos, tmp_path / "out.zarr", config).labelled == 36
    # Two stay open from the probe on; for more there is no room, and they are opened again.
    assert [scans.count(str(video)) for video in videos] == [1, 1, 2, 2]
    assert len(set(closed)) == len(scans)


def test_what_waits_for_others_in_one_process_has_no_time_limit(tmp_path, config, monkeypatch):
    videos = [media.write_video(tmp_path / f"{name}.mp4", frames=9) for name in "abcdef"]
    clock_s = itertools.count(step=10_000.0)  # each call takes hours
    monkeypatch.setattr(InProcess, "now", lambda self: next(clock_s))
    summary = run(videos, tmp_path / "out.zarr", config)
    assert (summary.labelled, summary.deaths, summary.failures) == (54, 0, ())


@pytest.mark.parametrize(
    ("device", "compiled", "race", "least_s"),
    [("cpu", "auto", True, 1), ("cuda", "auto", False, 30), ("cuda", "on", False, 30), ("cuda", "off", False, 1)],
)
def test_workers_race_only_where_all_round_alike(device, compiled, race, least_s):
    options = _options(LabelConfig(device=device, compile=compiled, workers=2), ())
    assert (options.race, options.least_limit_s) == (race, least_s)


def test_each_step_of_each_member_has_the_time_of_a_frame():
    config = LabelConfig(checkpoint="x", labels=("depth",), noise="gaussian", steps=4, ensemble=10, frame_limit_s=3.0)
    options = _options(config, ())
    assert options.frame_limit_s == 120
    assert options.open_limit_s == 90, "opening a source takes no steps"


@pytest.mark.parametrize(
    ("device", "weights", "limit_s"), [("cpu", 10**8, 60), ("cpu", 10**8 + 1, 600), ("cuda", 10**9, 60)]
)
def test_a_large_network_has_more_time_for_a_frame_on_a_cpu(monkeypatch, device, weights, limit_s):
    monkeypatch.setattr("depthmill.workers.label.count_weights", lambda checkpoints: weights)
    options = _options(LabelConfig(device=device), ())
    assert options.frame_limit_s == limit_s
    assert options.open_limit_s == 1800, "as for any"


def test_one_gpu_of_several_is_for_this_process_alone(video, tmp_path, config):
    with pytest.raises(ConfigError, match=r"cuda:1.*--workers 0.*CUDA_VISIBLE_DEVICES=1 and --device cuda"):
        run([video], tmp_path / "out.zarr", config.model_copy(update={"device": "cuda:1", "workers": None}))
    assert not (tmp_path / "out.zarr").exists()


def test_run_json_says_what_was_done(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    values = json.loads((tmp_path / "out.zarr" / "run.json").read_text())
    assert values["labelled"] == values["committed"] == 19
    assert values["frames_per_s"] > 0
    assert re.match(r"cpu \(.+\), float32, batches of ", values["device"])
    assert len(values["checkpoints"]["depth"]["sha256"]) == 64
    assert (tmp_path / "out.zarr" / "failures.jsonl").read_text() == ""


def test_the_rate_of_a_run_is_not_that_of_closing_its_workers(video, tmp_path, config, monkeypatch):
    rates = []

    def rate():
        rates.append(Rate())
        return rates[0]

    def close_slowly(self):
        rates[0].started_s -= 1e6

    monkeypatch.setattr("depthmill.workers.label.Rate", rate)
    monkeypatch.setattr(InProcess, "close", close_slowly)
    assert run([video], tmp_path / "out.zarr", config).frames_per_s > 0.01


def test_the_one_worker_is_called_this_process_on_every_line(video, tmp_path, config, monkeypatch):
    monkeypatch.setattr("depthmill.workers.progress._LINE_EVERY_S", 0)
    console = Console(file=io.StringIO(), highlight=False, width=200)
    label([str(video)], tmp_path / "out.zarr", config, console=console)
    options = SmoothConfig(workers=0, max_edge=2)
    smooth(tmp_path / "out.zarr", options, console=console)
    words = re.findall("failed; (.*)", console.file.getvalue())
    assert any("edges" in word for word in words)
    assert {word[: len("this process ")] for word in words if word} == {"this process "}


def test_a_finished_run_is_not_done_again(video, tmp_path, config, monkeypatch):
    run([video], tmp_path / "out.zarr", config)
    before = runs.contents(tmp_path / "out.zarr")
    monkeypatch.setattr(Worker, "load", lambda self: pytest.fail("the model was loaded for nothing"))
    summary = run([video], tmp_path / "out.zarr", config)
    assert (summary.labelled, summary.committed) == (19, 0)
    assert runs.contents(tmp_path / "out.zarr") == before


def test_a_stopped_run_goes_on_where_it_was(video, tmp_path, config, monkeypatch):
    run([video], tmp_path / "whole.zarr", config)
    original, calls = Worker.label, []

    def stop_at_the_second(self, task, following=None):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, task, following)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "label", stop_at_the_second)
        with pytest.raises(RunStoppedError, match=r"8 of 19 frames are committed.*same command"):
            run([video], tmp_path / "out.zarr", config)
    summary = run([video], tmp_path / "out.zarr", config)
    assert summary.committed == 11
    assert runs.contents(tmp_path / "out.zarr") == runs.contents(tmp_path / "whole.zarr")


def test_what_another_run_left_out_of_the_root_is_named_in_it(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    other = open_source(media.write_video(tmp_path / "other.mp4", frames=3)).probe()
    open_store(tmp_path / "out.zarr").add_source(other)
    with pytest.raises(KeyError):
        xarray.open_zarr(tmp_path / "out.zarr", group=other.id)
    run([media.write_video(tmp_path / "more.mp4", frames=3)], tmp_path / "out.zarr", config)
    assert xarray.open_zarr(tmp_path / "out.zarr", group=other.id).sizes["frame"] == 3


def test_batches_and_other_inputs_may_change_between_runs(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    more = media.write_video(tmp_path / "more.mp4", frames=3)
    summary = run([video, more], tmp_path / "out.zarr", config.model_copy(update={"batch_size": 2}))
    assert (summary.sources, summary.labelled, summary.committed) == (2, 22, 3)


def test_another_configuration_is_not_mixed_in(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    before = runs.contents(tmp_path / "out.zarr")
    for change, named in (
        ({"processing_resolution": 64}, "processing_resolution"),
        ({"labels": ("depth",)}, "labels"),
        ({"round_aspect": True}, "round_aspect"),
        ({"normals_axes": "left-up-towards"}, "left-up-towards"),
        ({"steps": 4}, "sampling: absent there.*steps"),
        ({"noise": "gaussian", "ensemble": 3}, "layout.uncertainty: absent there, true now"),
        ({"segment_frames": 4}, "segment_frames"),
    ):
        other = config.model_copy(update=change)
        with pytest.raises(StoreMismatchError, match=rf"(?s){named}.*overwrite"):
            run([video], tmp_path / "out.zarr", other)
    assert runs.contents(tmp_path / "out.zarr") == before
    assert run([video], tmp_path / "out.zarr", other, overwrite=True).committed == 19


def test_a_changed_file_is_not_mixed_in_and_is_told_of_once(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    media.write_video(video, frames=18)
    out = io.StringIO()
    with pytest.raises(SourceError, match=r"^1 input given, and none can be used: nothing to label$"):
        label([str(video)], tmp_path / "out.zarr", config, console=Console(file=out))
    said = out.getvalue()
    assert re.match(r"(?s)left out: .* changed since .* remove .* and run the same command again", said)
    assert "frames/s" not in said, "there was no progress"


def test_pictures_of_many_sizes_fill_their_batches(tmp_path, config, monkeypatch):
    """Landscape and portrait alternate, some twice as large: two shapes for the network, six batches of four."""
    sizes = [(30, 40), (40, 30), (60, 80), (80, 60)]
    media.write_image_folder(tmp_path / "photos", count=24, sizes=sizes)
    batches, original = [], Labeler.submit

    def submit(self, frames, *arguments, **options):
        batches.append(len(frames))
        return original(self, frames, *arguments, **options)

    monkeypatch.setattr(Labeler, "submit", submit)
    options = {"segment_frames": 24}
    run([tmp_path / "photos"], tmp_path / "out.zarr", config.model_copy(update=options))
    assert batches == [4] * 6
    source = only_source(tmp_path / "out.zarr")
    assert source.sizes["y"] == source.sizes["x"] == 80
    labeler = Labeler(config_checkpoints(config), config)
    for row in (0, 1, 2, 3, 23):
        height, width = source["size"].values[row]
        assert (height, width) == sizes[row % 4]
        assert str(source.key.values[row]) == f"{row:03d}.png"
        with Image.open(tmp_path / "photos" / f"{row:03d}.png") as picture:
            alone = original(labeler, [np.asarray(picture)]).result()[0]
        assert np.abs(source.depth.values[row, :height, :width] - alone.depth[0]).max() < 3e-4
        assert np.isnan(source.depth.values[row, height:]).all()
        assert np.isnan(source.depth.values[row, :, width:]).all()


def config_checkpoints(config):
    from depthmill.pipeline.model.labeler import open_checkpoints

    return open_checkpoints(config)


@pytest.mark.slow
def test_a_50_megapixel_picture_among_small_ones(tmp_path, config):
    Image.new("RGB", (8192, 6144), (90, 120, 150)).save(tmp_path / "photos-large.png", compress_level=1)
    photos = tmp_path / "photos"
    media.write_image_folder(photos, count=2)
    (tmp_path / "photos-large.png").rename(photos / "999.png")
    summary = run([photos], tmp_path / "out.zarr", config.model_copy(update={"labels": ("depth",)}))
    assert (summary.labelled, summary.failures) == (3, ())
    over = config.model_copy(update={"labels": ("depth",), "max_pixels": 10_000_000})
    summary = run([photos], tmp_path / "limited.zarr", over)
    assert summary.labelled == 2
    assert "10" in summary.failures[0].reason


SAMPLED = {"steps": 2, "noise": "gaussian", "ensemble": 3}


def test_an_ensemble_s_uncertainty_is_stored_and_opens(video, tmp_path, config, checkpoints):
    run([video], tmp_path / "out.zarr", config.model_copy(update=SAMPLED))
    source = only_source(tmp_path / "out.zarr")
    assert source.uncertainty.dims == ("frame", "y", "x")
    frames = np.stack([frame.image for frame in open_source(video).read(0, 19)])
    keys = [f"{depthmill_id(tmp_path / 'out.zarr')}/{index}" for index in range(19)]
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=7, **SAMPLED)
    labels = labeler(frames, keys)
    assert labels.uncertainty.mean() > 1e-3
    assert np.abs(source.uncertainty.values - labels.uncertainty).max() <= 1.5e-4  # packing, and other batches
    assert np.abs(source.depth.values - labels.depth).max() <= 1.5e-4
    opened = open_datasets(tmp_path / "out.zarr")[depthmill_id(tmp_path / "out.zarr")]
    assert opened.uncertainty.dtype == np.float32


def depthmill_id(store):
    (source,) = open_store(store).sources()
    return source


def test_sampled_labels_do_not_depend_on_segments_or_batches(tmp_path, config):
    video, stores = media.write_video(tmp_path / "clip.mp4", frames=11), []
    for name, cut in (("a", {}), ("b", {"segment_frames": 4, "batch_size": 3})):
        stores.append(tmp_path / name)
        run([video], stores[-1], config.model_copy(update=SAMPLED | cut))
    one, other = [only_source(store) for store in stores]
    assert np.abs(one.depth.values - other.depth.values).max() <= 4.1e-4  # two packing steps: rounding
    assert np.abs(one.uncertainty.values - other.uncertainty.values).max() <= 4.1e-4
    assert (np.abs(one.normals.values - other.normals.values).max(axis=-1) < 0.02).mean() > 0.99


def test_a_seed_where_nothing_is_random_changes_no_store(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    assert run([video], tmp_path / "out.zarr", config.model_copy(update={"seed": 1})).committed == 0
    gaussian = config.model_copy(update={"noise": "gaussian"})
    run([video], tmp_path / "noisy.zarr", gaussian)
    with pytest.raises(StoreMismatchError, match="seed: 0 there, 1 now"):
        run([video], tmp_path / "noisy.zarr", gaussian.model_copy(update={"seed": 1}))


def test_the_default_store_does_not_know_of_sampling(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    header = json.loads((tmp_path / "out.zarr" / "zarr.json").read_text())["attributes"]["depthmill"]
    assert set(header["layout"]) == {"labels", "shard_frames", "segment_frames", "normals_dtype"}
    assert set(header["identity"]) == {"checkpoints", "processing_resolution", "dtype"}
    assert "uncertainty" not in only_source(tmp_path / "out.zarr")


def test_a_source_that_is_removed_by_hand_meanwhile_is_left_out_and_ends_no_run(tmp_path, config, monkeypatch):
    videos = [media.write_video(tmp_path / f"{name}.mp4", frames=9) for name in "abc"]
    begin = Worker.load

    def removed(self):
        backend = begin(self)
        for folder in (tmp_path / "out.zarr").glob("b-*"):
            shutil.rmtree(folder)
        return backend

    run(videos[:1], tmp_path / "out.zarr", config)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "load", removed)
        store = open_store(tmp_path / "out.zarr")
        store.add(*(open_source(video).probe() for video in videos[1:]))  # so that they are planned before it loads
        summary = run(videos, store.uri, config)
    assert (summary.labelled, len(summary.failures)) == (18, 1)
    assert "has no source 'b-" in summary.failures[0].reason
    assert run(videos, store.uri, config).labelled == 27
