"""`depthmill evaluate --video`, whole: in this process."""

import csv
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from depthmill.cli import app
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import DepthmillError, EvaluationError, RunStoppedError
from depthmill.pipeline.evaluation.clips import CLIP_SETS, open_clips, read_true_depth
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.clips import export_clips
from depthmill.workers import evaluate_clips as module

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    assert list(export_clips(folder, seeds=(3,), frames=3, height=48, width=64)) == ["static_3", "pan_3", "forward_3"]
    return folder


def evaluate(*arguments, name="rendered"):
    """Exit status and output; 2 and the message if nothing could start, as `depthmill` itself does it."""
    result = CliRunner().invoke(app, ["evaluate", name, *map(str, arguments), "--video"])
    if isinstance(result.exception, DepthmillError):
        return 2, f"{result.output}\n{result.exception}"
    return result.exit_code, result.output


def test_a_checkpoint_labels_smooths_and_is_scored(rendered, tmp_path):
    options = ("--checkpoint", "demo", "--processing-resolution", 64, "--workers", 0, "--out", tmp_path / "out")
    code, output = evaluate(rendered, *options)
    assert code == 0, output
    assert "smoothed" in output
    document = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(document["metrics"]) == {"raw", "smoothed"}
    assert document["checkpoint"] == "demo"
    assert document["config"]["round_aspect"] is False  # however long a clip is
    assert document["metrics"]["raw"] != document["metrics"]["smoothed"]
    assert all(value is not None for value in document["metrics"]["raw"].values())
    with (tmp_path / "out/per_clip.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["labels"], row["frames"]) for row in rows] == [
        (name, which, "3") for which in ("raw", "smoothed") for name in ("static_3", "pan_3", "forward_3")
    ]
    code, again = evaluate(rendered, "--store", tmp_path / "out/labels.zarr", "--out", tmp_path / "other")
    assert code == 2
    assert "are missing" in again  # its pictures are numbered, not called as in the index
    assert evaluate(rendered, *options)[0] == 0
    (tmp_path / "out").rename(tmp_path / "moved")  # to the store, its pictures are others there
    code, output = evaluate(rendered, *options[:-1], tmp_path / "moved")
    assert (code, "not smoothed" in output) == (0, False)
    assert json.loads((tmp_path / "moved/metrics.json").read_text())["metrics"] == document["metrics"]


@pytest.mark.parametrize(("name", "suffix"), [("rendered", ".png"), ("sintel", ".png"), ("scannet", ".jpg")])
def test_red_and_blue_are_put_back_where_the_benchmark_exchanged_them(rendered, tmp_path, monkeypatch, name, suffix):
    frames = json.loads((rendered / "rendered_video.json").read_text())["rendered"][0]["static_3"]
    for entry in frames:
        for file in ("image", "gt_depth"):
            (tmp_path / entry[file]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(rendered / entry[file], tmp_path / entry[file])
        path = tmp_path / entry["image"]
        Image.open(path).save(path.with_suffix(suffix))
        entry["image"] = entry["image"].replace(".png", suffix)
    index = tmp_path / f"{name}_video.json"
    index.write_text(json.dumps({name: [{"a": frames}]}))

    class PreparedError(Exception):
        """Pictures are where labelling would find them."""

    def stop(*_, **__):
        raise PreparedError

    monkeypatch.setattr(module, "label", stop)
    config = LabelConfig(checkpoint="demo", labels=("depth",))
    for overwrite in (False, False, True):
        with pytest.raises(PreparedError):
            module.evaluate_clips(name, index, tmp_path / "out", config, overwrite=overwrite)
        for i, entry in enumerate(frames):
            pixels = np.asarray(Image.open(tmp_path / entry["image"]))
            shown = np.asarray(Image.open(tmp_path / f"out/pictures/a/{i:06d}.png"))
            assert (shown == (pixels if name == "rendered" else pixels[..., ::-1])).all()
    assert len(list((tmp_path / "out/pictures/a").iterdir())) == len(frames)
    if name != "rendered":  # nor are labels kept of an earlier version, which did not
        monkeypatch.setitem(CLIP_SETS, name, replace(CLIP_SETS[name], colours=None))
        with pytest.raises(EvaluationError, match="another version"):
            module.evaluate_clips(name, index, tmp_path / "out", config)


def test_clips_that_share_pictures_are_labelled_and_scored_each(rendered, tmp_path):
    document = json.loads((rendered / "rendered_video.json").read_text())
    frames = document["rendered"][0]["static_3"]
    document["rendered"] = [{"whole": frames}, {"backwards": frames[::-1]}]
    index = rendered / "overlapping.json"
    index.write_text(json.dumps(document))
    options = ("--checkpoint", "demo", "--processing-resolution", 64, "--workers", 0)
    code, output = evaluate(index, *options, "--out", tmp_path / "out")
    assert code == 0, output
    with (tmp_path / "out/per_clip.csv").open() as file:
        one, other = (row for row in csv.DictReader(file) if row["labels"] == "raw")
    assert one["pixels"] == other["pixels"]
    assert float(one["abs_rel"]) == pytest.approx(float(other["abs_rel"]), abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "out/pictures").iterdir()) == ["backwards", "whole"]


@pytest.mark.parametrize("name", ["rgb", "depth"])
def test_a_file_that_cannot_be_read_is_named(rendered, tmp_path, monkeypatch, name):
    read = Path.read_bytes

    def fail(path):
        if path.match(f"pan_3/{name}/000001.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    code, output = evaluate(rendered, "--checkpoint", "demo", "--workers", 0, "--out", tmp_path / "out")
    assert code == 2
    assert f"pan_3/{name}/000001.png cannot be read (Input/output error); expected it whole" in output


def test_exact_predictions_are_exact_and_missing_ones_named(rendered, tmp_path):
    wanted = CLIP_SETS["rendered"]
    files = []
    for clip in open_clips(wanted, rendered):
        for frame in clip.frames:
            path = tmp_path / "npy/rendered" / f"{frame.sample.name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, 3 * read_true_depth(wanted, frame) + 1)
            files.append(path)
    code, output = evaluate(rendered, "--predictions", tmp_path / "npy", "--out", tmp_path / "out")
    assert code == 0, output
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())["metrics"]["raw"]
    assert metrics["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert metrics["delta1"] == 1
    assert metrics["scale_spread"] == pytest.approx(0, abs=1e-6)
    assert metrics["tae"] < 2  # pixels of 48 rows are large
    (tmp_path / "npy").rename(tmp_path / "moved")
    arguments = (rendered, "--predictions", tmp_path / "moved", "--out", tmp_path / "out")
    code, output = evaluate(*arguments)
    assert code == 2
    assert f"holds the figures of rendered, {tmp_path / 'npy/rendered'}" in " ".join(output.split())
    assert evaluate(*arguments, "--overwrite")[0] == 0
    (tmp_path / "moved").rename(tmp_path / "npy")
    files[4].unlink()
    code, output = evaluate(rendered, "--predictions", tmp_path / "npy", "--out", tmp_path / "out")
    assert code == 2
    assert "8 of 9 pictures; pan_3/rgb/000001.npy are missing" in " ".join(output.split())


def test_clips_are_rendered_where_there_are_none(tmp_path, monkeypatch):
    from depthmill.pipeline.training import clips

    monkeypatch.setattr(clips.export_clips, "__defaults__", ((3,), 2, 32, 48))
    code, output = evaluate(tmp_path / "made", "--predictions", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "rendering 12 clips to" in output
    assert "0 of 6 pictures" in " ".join(output.split())
    assert (tmp_path / "made/rendered_video.json").is_file()


@pytest.mark.parametrize("written", ["made", "pictures"])
def test_a_full_disk_is_said_in_a_line(rendered, tmp_path, monkeypatch, written):
    from depthmill.pipeline.training import clips

    def full(*_, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clips.export_clips, "__defaults__", ((3,), 2, 32, 48))
    monkeypatch.setattr(*((clips, "write_atomically") if written == "made" else (module, "write_picture")), full)
    data, out = (tmp_path / "made", "made") if written == "made" else (rendered, "out")
    with pytest.raises(RunStoppedError, match=rf"^.*/{out} cannot be written: the disk is full"):
        module.evaluate_clips(
            "rendered", data, tmp_path / "out", LabelConfig(checkpoint="demo", labels=("depth",), workers=0)
        )


def test_clips_of_another_version_of_the_scenes_are_not_taken_for_these(rendered, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "VERSION", scenes.VERSION + 1)
    code, output = evaluate(rendered, "--predictions", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert f"version {scenes.VERSION - 1} of the scenes; expected {scenes.VERSION}: remove" in output


def test_options_that_make_no_sense_are_refused(rendered, tmp_path):
    assert "--split names pictures" in evaluate(rendered, "--split", tmp_path)[1]
    assert "no set of clips 'diode'" in evaluate(rendered, name="diode")[1]
