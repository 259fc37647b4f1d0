"""`depthmill evaluate`, whole: in this process, with networks of random weights."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from depthmill.cli import app
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import ConfigError, DepthmillError, EvaluationError, RunStoppedError, SourceError
from depthmill.pipeline.evaluation.datasets import SETS
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.sources import pictures
from depthmill.tests import runs
from depthmill.tests.pipeline.evaluation import layouts
from depthmill.workers import evaluate as module
from depthmill.workers.evaluate import Folder, LabelledStore, claim, evaluate, label_options
from depthmill.workers.label import label

pytestmark = pytest.mark.usefixtures("loaded_once")


def console():
    return Console(file=io.StringIO(), width=160, highlight=False)


def config(wanted, checkpoints, **options):
    given = {"checkpoint": str(checkpoints / wanted.modality), "device": "cpu", "workers": 0, "threads": 1}
    given["dtype"] = "float32"  # for those tests that also label by hand, on CPUs with bfloat16
    return LabelConfig(**label_options(wanted, given | options))


@pytest.mark.parametrize("name", ["kitti", "ibims"])
def test_a_checkpoint_is_labelled_and_scored_as_its_own_predictions_are(name, checkpoints, tmp_path, monkeypatch):
    wanted, files, written = layouts.LAYOUTS[name](np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "data", files)
    what = config(wanted, checkpoints)
    out = tmp_path / "out"
    shown = console()
    scores = evaluate(wanted, data, out, what, console=shown)
    assert not scores.skipped
    assert "Marigold + E2E FT" in shown.file.getvalue()

    labeler = Labeler(open_checkpoints(what), what)
    for one in written:
        labels = labeler((one.rgb if wanted.colours is None else wanted.colours(one.rgb))[None])
        path = tmp_path / "npy" / f"{one.name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (labels.depth if wanted.modality == "depth" else labels.normals)[0])
    exact = evaluate(wanted, data, tmp_path / "exact", Folder(tmp_path / "npy"), console=console())
    for key, value in exact.metrics.items():  # random weights answer in a narrow range: packing is felt
        assert scores.metrics[key] == pytest.approx(value, rel=0.02, abs=0.02)

    document = json.loads((out / "metrics.json").read_text())
    assert document["checkpoint"] == what.checkpoints[wanted.modality]
    assert len(document["predictions"]["identity"]["checkpoints"][wanted.modality]["sha256"]) == 64
    assert document["config"]["labels"] == [wanted.modality]

    before = runs.contents(out)
    monkeypatch.setattr(Labeler, "label", lambda *_: pytest.fail("labelled again"))
    assert repr(evaluate(wanted, data, out, what, console=console())) == repr(scores)  # NaN, of normals, equals nothing
    assert runs.contents(out).keys() == before.keys()


@pytest.mark.parametrize(
    ("name", "given", "domain"),
    [("sintel", None, "outdoor"), ("ibims", None, "indoor"), ("sintel", "object", "object")],
)
def test_a_joint_checkpoint_is_told_of_the_sets_domain(monkeypatch, name, given, domain):
    joint = SimpleNamespace(processing_resolution=768, domain=given or "indoor")
    monkeypatch.setattr(module, "open_checkpoints", lambda config: [joint])
    options = {"checkpoint": "joint", "domain": given}
    assert module._configure(SETS[name], LabelConfig(**label_options(SETS[name], options))).domain == domain
    joint.domain = None  # of another kind
    options["domain"] = None
    assert module._configure(SETS[name], LabelConfig(**label_options(SETS[name], options))).domain is None


def test_a_finished_store_is_scored(checkpoints, tmp_path):
    """Labelled by hand from a folder further up, with pictures of no concern in it."""
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "nyu", {k: v for k, v in files.items() if "train" not in k})
    what = config(wanted, checkpoints)
    label([str(tmp_path / "nyu")], tmp_path / "labels.zarr", what, console=console())
    stored = evaluate(wanted, data, tmp_path / "stored", LabelledStore(tmp_path / "labels.zarr"), console=console())
    prepared = evaluate(wanted, data, tmp_path / "out", what, console=console())
    assert stored.metrics == pytest.approx(prepared.metrics, rel=1e-4)  # other batches round otherwise

    (tmp_path / "out").rename(tmp_path / "moved")  # to the store, its pictures are others there
    assert evaluate(wanted, data, tmp_path / "moved", what, console=console()).metrics == prepared.metrics

    ibims, more, _ = layouts.ibims(np.random.default_rng(0))
    layouts.write_folder(tmp_path / "ibims", more)
    with pytest.raises(EvaluationError, match="holds depth; the set asks for normals"):
        evaluate(ibims, tmp_path / "ibims", tmp_path / "x", LabelledStore(tmp_path / "labels.zarr"), console=console())


def test_a_store_of_other_pictures_says_so(checkpoints, tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "nyu", files)
    what = config(wanted, checkpoints)
    store = tmp_path / "labels.zarr"
    label([str(data / "test" / "kitchen_0004")], store, what, console=console())
    message = r"has 2 of 3 pictures; test/office_0005/rgb_0009 are missing \(the last of its own is rgb_0002\.png\)"
    with pytest.raises(EvaluationError, match=message):
        evaluate(wanted, data, tmp_path / "x", LabelledStore(store), console=console())
    label([str(data / "test")], store, what, console=console())
    with pytest.raises(EvaluationError, match="two rows"):
        evaluate(wanted, data, tmp_path / "x", LabelledStore(store), console=console())


def test_a_damaged_picture_is_a_counted_skip(checkpoints, tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    files["./test/kitchen_0004/rgb_0002.png"] = b"no picture"
    files["./test/office_0005/depth_0009.png"] = layouts.png(np.zeros((480, 640), np.uint16))
    shown = console()
    data = layouts.write_tar(tmp_path / "nyu.tar", files)
    scores = evaluate(wanted, data, tmp_path / "out", config(wanted, checkpoints), console=shown)
    assert [row.name for row in scores.rows] == ["test/kitchen_0004/rgb_0001"]
    assert "has no labels: 10 bytes that are no picture" in scores.skipped[0].reason
    assert scores.skipped[1].reason == "its ground truth has no valid pixel"
    assert "2 skipped" in shown.file.getvalue()


def test_pictures_of_another_split_are_not_mixed_in(checkpoints, tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_tar(tmp_path / "nyu.tar", files)
    split = tmp_path / "split.txt"
    split.write_text("test/kitchen_0004/rgb_0001.png\n")
    what = config(wanted, checkpoints)
    evaluate(wanted, data, tmp_path / "out", what, console=console())
    with pytest.raises(EvaluationError, match="--overwrite"):
        evaluate(wanted, data, tmp_path / "out", what, split=split, console=console())
    scores = evaluate(wanted, data, tmp_path / "out", what, split=split, overwrite=True, console=console())
    assert len(scores.rows) == 1
    files["./test/kitchen_0004/rgb_0001.png"] = files["./test/kitchen_0004/rgb_0002.png"]
    layouts.write_tar(data, files)
    with pytest.raises(EvaluationError, match=r"other data: test/kitchen_0004/rgb_0001 changed since; .*--overwrite"):
        evaluate(wanted, data, tmp_path / "out", what, split=split, console=console())


def test_a_folder_is_of_the_same_pictures_or_claimed_anew(tmp_path):
    before, now = [("one", 1), ("two", 2)], [("one", 1), ("two", 3)]
    for _ in range(2):
        claim("nyuv2", None, before, tmp_path, overwrite=False)
    with pytest.raises(EvaluationError, match="other data: two changed since"):
        claim("nyuv2", None, now, tmp_path, overwrite=False)
    claim("nyuv2", None, now, tmp_path, overwrite=True)
    (tmp_path / "evaluation.json").write_text(json.dumps({"set": "nyuv2", "pictures": ["one", "two"]}))
    with pytest.raises(EvaluationError, match="by another version"):
        claim("nyuv2", None, before, tmp_path, overwrite=False)


def test_what_failed_is_tried_again(checkpoints, tmp_path, monkeypatch):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "nyu", files)
    split = tmp_path / "split.txt"
    split.write_text("test/kitchen_0004/rgb_0001.png\ntest/kitchen_0004/rgb_0002.png\n")
    what = config(wanted, checkpoints)
    read = pictures.decode_image

    def fail(picture, max_pixels):
        if picture.name == "rgb_0002.png":
            raise SourceError("cut off: replace it")
        return read(picture, max_pixels)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode_image", fail)
        scores = evaluate(wanted, data, tmp_path / "out", what, split=split, console=console())
    assert scores.skipped[0].reason == "it has no labels: cut off: replace it, and label its input anew"
    scores = evaluate(wanted, data, tmp_path / "out", what, split=split, console=console())
    assert (len(scores.rows), len(scores.skipped)) == (2, 0)


def test_figures_of_other_predictions_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, files, _ = layouts.ibims(np.random.default_rng(0))
    layouts.write_folder(tmp_path / "ibims", files)
    (tmp_path / "split.txt").write_text("ibims/corridor_01_img\n")
    for folder, towards in (("mine", 1), ("yours", -1)):
        (tmp_path / folder / "ibims").mkdir(parents=True)
        normals = np.full((480, 640, 3), (0, 0, towards), np.float32)
        np.save(tmp_path / folder / "ibims" / "corridor_01_img.npy", normals)

    def run(*options):
        app(["evaluate", "ibims", "ibims", "--split", "split.txt", *map(str, options)], standalone_mode=False)
        return (tmp_path / "evaluations/ibims/metrics.json").read_text()

    mine = run("--predictions", "mine")
    assert run("--predictions", tmp_path / "mine").replace(f"{tmp_path}/", "") == mine  # the same, called otherwise
    message = f"holds the figures of ibims, {tmp_path / 'mine'}; .* --overwrite"
    for options in (["--predictions", "yours"], ["--checkpoint", "demo", "--device", "cpu", "--workers", 0]):
        with pytest.raises(EvaluationError, match=message):
            run(*options)
    assert "yours" in run("--predictions", "yours", "--overwrite")
    (tmp_path / "evaluations/ibims/metrics.json").write_text('{"accuracy": 1}')
    with pytest.raises(EvaluationError, match="another program"):
        run("--predictions", "yours")


@pytest.mark.parametrize("written", ["write_atomically", "write_picture", "write_report"])
def test_a_full_disk_is_said_in_a_line(checkpoints, tmp_path, monkeypatch, written):
    def full(*_, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wanted, files, samples = layouts.ibims(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "data", files)
    what = config(wanted, checkpoints)
    if written == "write_report":
        for one in samples:
            (tmp_path / "npy" / one.name).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "npy" / f"{one.name}.npy", one.truth)
        what = Folder(tmp_path / "npy")
    monkeypatch.setattr(module, written, full)
    with pytest.raises(RunStoppedError, match=r"^.*/out cannot be written: the disk is full.*make room and run again"):
        evaluate(wanted, data, tmp_path / "out", what, console=console())


def test_labels_of_pictures_in_their_own_colours_are_not_taken_for_the_papers(checkpoints, tmp_path):
    wanted, files, _ = layouts.ibims(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "ibims", files)
    what = config(wanted, checkpoints)
    evaluate(replace(wanted, colours=None), data, tmp_path / "out", what, console=console())  # as it was done
    with pytest.raises(EvaluationError, match="another version"):
        evaluate(wanted, data, tmp_path / "out", what, console=console())


def test_a_folder_of_somebody_elses_is_not_touched(checkpoints, tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_tar(tmp_path / "nyu.tar", files)
    mine = tmp_path / "out" / "pictures" / "holiday.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"dear")
    with pytest.raises(EvaluationError, match="nothing was touched"):
        evaluate(wanted, data, tmp_path / "out", config(wanted, checkpoints), overwrite=True, console=console())
    assert mine.read_bytes() == b"dear"


def test_nothing_is_labelled_where_files_are_missing(checkpoints, tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    del files["./test/office_0005/rgb_0009.png"]
    data = layouts.write_tar(tmp_path / "nyu.tar", files)
    with pytest.raises(EvaluationError, match="rgb_0009"):
        evaluate(wanted, data, tmp_path / "out", config(wanted, checkpoints), console=console())
    assert not (tmp_path / "out").exists()


def test_a_configuration_for_other_labels_is_refused(tmp_path):
    wanted, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "nyu", files)
    with pytest.raises(ConfigError, match="asks for depth alone"):
        evaluate(wanted, data, tmp_path / "out", LabelConfig(), console=console())


def test_a_checkpoint_for_768_pixels_sees_what_the_papers_models_saw(tmp_path, monkeypatch):
    from depthmill.pipeline.model import scratch
    from depthmill.workers.evaluate import _configure

    architecture = scratch.Architecture(vae_channels=(8, 16), unet_channels=(16, 32), head_channels=8)
    wanted, _, _ = layouts.kitti(np.random.default_rng(0))
    for resolution, expected in ((768, 1216), (48, None)):
        path = tmp_path / str(resolution)
        scratch.create(path / "depth", architecture, "depth", seed=0, processing_resolution=resolution)
        configured = _configure(wanted, LabelConfig(checkpoint=str(path / "depth"), labels=("depth",)))
        assert configured.processing_resolution == expected
        assert configured.dtype == "float32"
        assert configured.round_aspect is False  # sets of 1024 pictures and more, too
        for dtype in ("auto", "bfloat16"):
            told = _configure(wanted, config(wanted, path, processing_resolution=64, dtype=dtype))
            assert (told.processing_resolution, told.dtype) == (64, dtype)


def evaluated(folder, *options):
    """What `depthmill evaluate` prints, run in a folder."""
    code = "from depthmill.cli import main; main()"
    command = [sys.executable, "-c", code, "evaluate", *options, "--device", "cpu", "--threads", 1]
    process = subprocess.run(map(str, command), capture_output=True, text=True, timeout=240, cwd=folder)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_command(checkpoints, tmp_path, monkeypatch):
    _, files, _ = layouts.ibims(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "ibims", files)
    split = tmp_path / "split.txt"
    split.write_text("ibims/corridor_01_img.png\nibims/lab_02_img.png\n")
    monkeypatch.chdir(tmp_path)
    options = ["--split", split, "--checkpoint", checkpoints / "normals", "--device", "cpu", "--workers", 0]
    done = CliRunner().invoke(app, ["evaluate", "ibims", *map(str, [data, *options])])
    assert done.exit_code == 0, done.output
    shown = done.stdout
    assert "15.8" in shown
    document = json.loads((tmp_path / "evaluations" / "ibims" / "metrics.json").read_text())
    assert document["pictures"] == 2
    assert f"{document['metrics']['mean']:.2f}" in shown
    assert document["predictions"]["packing"] == "int16"


@pytest.mark.slow
def test_a_ray_worker_s_figures_are_this_process_s(checkpoints, tmp_path):
    _, files, _ = layouts.nyuv2(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "nyu", files)
    split = tmp_path / "split.txt"
    split.write_text("test/kitchen_0004/rgb_0001.png\ntest/kitchen_0004/rgb_0002.png\ntest/office_0005/rgb_0009.png\n")
    options = ["--split", split, "--checkpoint", checkpoints / "depth"]
    figures = []
    for workers in (0, 1):
        out = tmp_path / f"out-{workers}"
        evaluated(tmp_path, "nyuv2", data, "--out", out, "--workers", workers, *options)
        figures.append(((out / "per_image.csv").read_text(), json.loads((out / "metrics.json").read_text())["metrics"]))
    assert figures[1] == figures[0]


def test_the_command_on_a_folder_exits_with_1_where_pictures_are_skipped(tmp_path):
    _, files, _ = layouts.ibims(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "ibims", files)
    split = tmp_path / "split.txt"
    split.write_text("ibims/corridor_01_img.png\nibims/lab_02_img.png\n")
    (tmp_path / "npy" / "ibims").mkdir(parents=True)
    np.save(tmp_path / "npy" / "ibims" / "corridor_01_img.npy", np.full((480, 640, 3), (0, 0, 1), np.float32))
    np.save(tmp_path / "npy" / "ibims" / "lab_02_img.npy", np.zeros((2, 2, 3)))
    out = tmp_path / "out\x1b[2J"  # which would clear a terminal
    options = ["--predictions", str(tmp_path / "npy"), "--out", str(out), "--split", str(split)]
    result = CliRunner().invoke(app, ["evaluate", "ibims", str(data), *options])
    assert result.exit_code == 1, result.output
    assert (out / "metrics.json").is_file()
    assert "\x1b" not in result.output
    assert "1 skipped: its prediction is of shape (2, 2, 3)" in result.output


@pytest.mark.parametrize("option", ["--predictions", "--store", "--checkpoint"])
def test_what_cannot_start_leaves_no_folder(option, tmp_path):
    _, files, _ = layouts.ibims(np.random.default_rng(0))
    data = layouts.write_folder(tmp_path / "ibims", files)
    split, nowhere, out = tmp_path / "split.txt", tmp_path / "nowhere", tmp_path / "out"
    split.write_text("ibims/corridor_01_img.png\n")
    options = ["--split", split, option, nowhere, "--out", out]
    with pytest.raises(DepthmillError, match="nowhere"):
        app(["evaluate", "ibims", str(data), *map(str, options)], standalone_mode=False)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nyu", "."), "nyuv2"),
        (("nyuv2", "."), "no ground truth of nyuv2"),
        (("nyuv2", ".", "--store", "a", "--predictions", "b"), "one of them"),
        (("nyuv2", ".", "--store", "a", "--checkpoint", "b", "--batch-size", "2"), "--checkpoint, --batch-size"),
        (("nyuv2", ".", "--predictions", "a", "--dtype", "float16"), "--dtype would label"),
        (("nyuv2", "data", "--workers", "0"), "data: no such file or folder"),
        (("nyuv2", ".", "--batch-size", "0"), "batch_size"),
    ],
)
def test_what_cannot_start_says_why(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DepthmillError, match=message):
        app(["evaluate", *arguments], standalone_mode=False)
