"""Whole sets, scored from `.npy`: the figures against NumPy by the definitions; what is skipped is counted."""

import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from depthmill.pipeline.config import Sampling
from depthmill.pipeline.errors import ConfigError, EvaluationError
from depthmill.pipeline.evaluation.datasets import SETS
from depthmill.pipeline.evaluation.predictions import Predictions, from_folder
from depthmill.pipeline.evaluation.report import paper_figures, reasons, table, write_report
from depthmill.pipeline.evaluation.samples import open_samples
from depthmill.pipeline.evaluation.score import score
from depthmill.tests.pipeline.evaluation import layouts

DEPTH_SETS = [name for name, wanted in SETS.items() if wanted.modality == "depth"]
NORMALS_SETS = [name for name, wanted in SETS.items() if wanted.modality == "normals"]


def expected_depth(one, prediction, low, high, columns=None):
    """Marigold's evaluation of a picture, by the definitions."""
    t, p = one.truth.astype(np.float64), prediction.astype(np.float64)
    fit = np.zeros_like(one.valid)
    fit[:, columns if columns is not None else slice(None)] = True
    fit &= one.valid
    system = np.stack([p[fit], np.ones(fit.sum())], axis=1)
    scale, shift = np.linalg.lstsq(system, t[fit], rcond=None)[0]
    p, t = np.maximum(np.clip(scale * p[one.valid] + shift, low, high), 1e-6), t[one.valid]
    worse = np.maximum(p / t, t / p)
    logs = np.log(p) - np.log(t)
    return {
        "abs_rel": np.mean(np.abs(p - t) / t),
        "delta1": np.mean(worse < 1.25),
        "delta2": np.mean(worse < 1.25**2),
        "delta3": np.mean(worse < 1.25**3),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(t))),
        "silog": 100 * np.sqrt(np.mean(logs**2) - np.mean(logs) ** 2),
    }


RANGES = {"nyuv2": (1e-3, 10), "kitti": (1e-5, 80), "eth3d": (1e-5, np.inf), "scannet": (1e-3, 10), "diode": (0.6, 350)}


@pytest.mark.parametrize("name", DEPTH_SETS)
def test_depth_by_the_definitions(name, tmp_path):
    rng = np.random.default_rng(1)
    wanted, files, written = layouts.LAYOUTS[name](rng)
    predictions = list(layouts.guesses(written, wanted, rng))
    archive, samples = open_samples(wanted, layouts.write_tar(tmp_path / "data.tar", files))
    folder = layouts.write_predictions(tmp_path / "npy", [one.name for one in written], predictions)
    scores = score(wanted, archive, samples, from_folder(folder, samples, "depth"))
    archive.close()
    columns = (np.arange(1024) * 2063 / 1024).astype(int) if name == "eth3d" else None
    each = [expected_depth(one, p, *RANGES[name], columns=columns) for one, p in zip(written, predictions, strict=True)]
    for row, expected, one in zip(scores.rows, each, written, strict=True):
        assert row.metrics == pytest.approx(expected, rel=1e-6)
        assert (row.name, row.pixels) == (one.name, one.valid.sum())
    assert scores.metrics == pytest.approx({key: np.mean([e[key] for e in each]) for key in each[0]}, rel=1e-6)
    assert not scores.skipped


@pytest.mark.parametrize("name", NORMALS_SETS)
def test_normals_by_the_definitions(name, tmp_path):
    rng = np.random.default_rng(1)
    wanted, files, written = layouts.LAYOUTS[name](rng)
    predictions = list(layouts.guesses(written, wanted, rng))
    archive, samples = open_samples(wanted, layouts.write_folder(tmp_path / "data", files))
    ours = [p * np.array([-1, 1, 1], np.float32) for p in predictions]
    folder = layouts.write_predictions(tmp_path / "npy", [one.name for one in written], ours)
    scores = score(wanted, archive, samples, from_folder(folder, samples, "normals"))
    angles = []
    for one, prediction in zip(written, predictions, strict=True):
        a, b = prediction[one.valid].astype(np.float64), one.truth[one.valid].astype(np.float64)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    for row, some in zip(scores.rows, angles, strict=True):
        assert row.metrics["mean"] == pytest.approx(some.mean(), abs=1e-5)
    every = np.concatenate(angles)
    expected = {"mean": every.mean(), "median": np.median(every), "rmse": np.sqrt((every**2).mean())}
    expected |= {f"under_{bound:g}": 100 * (every < bound).mean() for bound in (5, 7.5, 11.25, 22.5, 30)}
    assert scores.metrics == pytest.approx(expected, abs=6e-4)
    # The same predictions in the axes of the ground truth, and said to be.
    layouts.write_predictions(folder, [one.name for one in written], predictions)
    as_given = from_folder(folder, samples, "normals", "left-up-towards")
    assert score(wanted, archive, samples, as_given).metrics == scores.metrics
    wrong = from_folder(folder, samples, "normals", "right-up-towards")
    assert score(wanted, archive, samples, wrong).metrics["mean"] > scores.metrics["mean"] + 5


@pytest.fixture
def nyu(tmp_path):
    rng = np.random.default_rng(2)
    wanted, files, written = layouts.nyuv2(rng)
    archive, samples = open_samples(wanted, layouts.write_folder(tmp_path / "data", files))
    predictions = list(layouts.guesses(written, wanted, rng))
    folder = layouts.write_predictions(tmp_path / "npy", [one.name for one in written], predictions)
    return wanted, archive, samples, folder, predictions


def test_predictions_by_marigolds_own_names(nyu, tmp_path):
    wanted, archive, samples, folder, _ = nyu
    before = score(wanted, archive, samples, from_folder(folder, samples, "depth"))
    for path in list(folder.rglob("*.npy")):
        path.rename(path.with_name(path.name.replace("rgb_", "pred_")))
    assert score(wanted, archive, samples, from_folder(folder, samples, "depth")) == before


def test_missing_predictions_are_named(nyu):
    _, _, samples, folder, _ = nyu
    (folder / "test/kitchen_0004/rgb_0002.npy").unlink()
    with pytest.raises(EvaluationError, match=r"2 of 3.*test/kitchen_0004/rgb_0002\.npy are missing"):
        from_folder(folder, samples, "depth")
    with pytest.raises(ConfigError, match="left-up-towards"):
        from_folder(folder, samples, "normals", "left")


@pytest.mark.parametrize("value", [(np.nan, np.inf), 1e200, np.finfo(np.float64).max], ids=str)
def test_what_cannot_be_scored_is_skipped_counted_and_reported(nyu, tmp_path, value):
    wanted, archive, samples, folder, predictions = nyu
    bad = predictions[1].astype(np.float64)
    bad[100, 300:302] = value
    np.save(folder / "test/kitchen_0004/rgb_0002.npy", bad)
    np.save(folder / "test/office_0005/rgb_0009.npy", bad[:-1])
    taken = from_folder(folder, samples, "depth")
    advanced = []
    scores = score(wanted, archive, samples, taken, advance=lambda: advanced.append(1))
    assert len(advanced) == 3
    assert [row.name for row in scores.rows] == ["test/kitchen_0004/rgb_0001"]
    assert scores.metrics == scores.rows[0].metrics
    assert "NaN, infinite or above 3.4e38 at 2 of" in scores.skipped[0].reason
    assert "(479, 640)" in scores.skipped[1].reason
    assert len(reasons(scores)) == 2

    write_report(tmp_path / "report", wanted, scores, taken, None)
    document = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert document["metrics"] == scores.metrics
    assert (document["pictures"], len(document["skipped"])) == (1, 2)
    assert document["predictions"] == {"predictions": str(folder)}
    with (tmp_path / "report" / "per_image.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [sample.name for sample in samples]
    assert float(lines[0]["abs_rel"]) == scores.rows[0].metrics["abs_rel"]
    assert lines[1]["abs_rel"] == ""
    assert "NaN" in lines[1]["skipped"]


def test_nothing_to_score_is_an_error_and_no_figure(nyu):
    wanted, archive, samples, folder, _ = nyu
    for path in folder.rglob("*.npy"):
        path.write_bytes(b"no array")
    with pytest.raises(EvaluationError, match=r"none of the 3 pictures of nyuv2.*cannot be read"):
        score(wanted, archive, samples, from_folder(folder, samples, "depth"))


@pytest.mark.parametrize("away", ["depth_0009.png", "rgb_0009.npy"])
def test_a_disk_that_does_not_answer_leaves_no_picture_out(nyu, monkeypatch, away):
    wanted, archive, samples, folder, _ = nyu
    opened = Path.open

    def fail(path, *args, **options):
        if path.name == away:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(EvaluationError, match=f"{away} .*cannot be read.*Input/output error"):
        score(wanted, archive, samples, from_folder(folder, samples, "depth"))


def test_normals_of_another_shape_are_skipped(tmp_path):
    wanted, files, written = layouts.ibims(np.random.default_rng(0))
    archive, samples = open_samples(wanted, layouts.write_folder(tmp_path / "data", files))
    shapes = [written[0].truth, written[1].truth.transpose(2, 0, 1)]
    folder = layouts.write_predictions(tmp_path / "npy", [one.name for one in written], shapes)
    scores = score(wanted, archive, samples, from_folder(folder, samples, "normals", "left-up-towards"))
    assert scores.metrics["mean"] < 1e-3
    assert "expected (H, W, 3)" in scores.skipped[0].reason


def test_truth_beside_the_columns_of_the_fit_alone_is_skipped(tmp_path):
    rng = np.random.default_rng(0)
    wanted, files, written = layouts.eth3d(rng)
    truth = np.full_like(written[0].truth, np.inf)
    truth[:, 1] = 2  # the fit has about every other column, from 0 on
    files[next(name for name in files if "ground_truth" in name)] = truth.tobytes()
    archive, samples = open_samples(wanted, layouts.write_folder(tmp_path / "data", files))
    guesses = layouts.guesses(written, wanted, rng)
    folder = layouts.write_predictions(tmp_path / "npy", [one.name for one in written], guesses)
    scores = score(wanted, archive, samples, from_folder(folder, samples, "depth"))
    assert "none of its 42 valid pixels is in the columns" in scores.skipped[0].reason
    assert np.isfinite(list(scores.metrics.values())).all()


ENSEMBLE = {"steps": 50, "ensemble": 10}


@pytest.mark.parametrize(
    ("name", "checkpoint", "drawn", "model", "figures"),
    [
        ("nyuv2", "GonzaloMG/marigold-e2e-ft-depth", {}, "Marigold + E2E FT", (0.052, 0.966)),
        ("diode", "GonzaloMG/stable-diffusion-e2e-ft-depth", {}, "Stable Diffusion + E2E FT", (0.303, 0.776)),
        ("kitti", "GonzaloMG/geowizard-e2e-ft", {}, "GeoWizard + E2E FT", (0.098, 0.914)),
        ("scannet-normals", "/models/marigold-e2e-ft-normals", {}, "Marigold + E2E FT", (14.7, 66.0)),
        ("sintel", "GonzaloMG/geowizard-e2e-ft", {}, "GeoWizard + E2E FT", (33.4, 22.4)),
        ("eth3d", "prs-eth/marigold-depth-v1-0", {}, "Marigold, 1 trailing step", (0.069, 0.955)),
        ("eth3d", "prs-eth/marigold-depth-v1-0", {"steps": 50}, "Marigold, 50 leading steps", (0.071, 0.951)),
        ("kitti", "marigold-depth-v1-0", ENSEMBLE, "Marigold, 50 leading steps x 10", (0.099, 0.916)),
        ("ibims", "GonzaloMG/marigold-normals", {"steps": 4}, "Marigold, 1 trailing step", (18.1, 62.9)),
        ("ibims", "marigold-normals", ENSEMBLE, "Marigold, 50 leading steps x 10", (18.4, 64.3)),
        ("kitti", "lemonaddie/Geowizard@refs/pr/1", {}, "GeoWizard, 1 trailing step", (0.133, 0.847)),
        ("kitti", "/@home/geowizard", {}, "GeoWizard, 1 trailing step", (0.133, 0.847)),
        ("kitti", "lemonaddie/geowizard", {}, "GeoWizard, 1 trailing step", (0.133, 0.847)),
        ("nyuv2", "GonzaloMG/marigold-e2e-ft-normals", {}, "Marigold + E2E FT", (0.052, 0.966)),
        ("nyuv2", "prs-eth/marigold-depth-v1-1", {"steps": 4, "ensemble": 10}, "Marigold + E2E FT", (0.052, 0.966)),
        ("sintel", "runs/mine", {}, "Marigold + E2E FT", (33.5, 21.5)),
        ("ibims", "", {}, "Marigold + E2E FT", (15.8, 69.9)),
    ],
)
def test_the_papers_figures_are_those_of_the_checkpoint_as_it_was_sampled(name, checkpoint, drawn, model, figures):
    wanted = SETS[name]
    keys = ("abs_rel", "delta1") if wanted.modality == "depth" else ("mean", "under_11.25")
    origin = {"identity": {"sampling": Sampling(noise="gaussian", **drawn).identity}} if drawn else {}
    assert paper_figures(wanted, Predictions(pytest.fail, checkpoint, origin)) == (
        model,
        dict(zip(keys, figures, strict=True)),
    )


def test_the_papers_figures_stand_beside_ours(nyu, tmp_path):
    wanted, archive, samples, folder, _ = nyu
    taken = from_folder(folder, samples, "depth")
    scores = score(wanted, archive, samples, taken)
    shown = Console(file=io.StringIO(), width=120)
    shown.print(table(wanted, scores, taken))
    rows = shown.file.getvalue().splitlines()
    assert any("paper: Marigold + E2E FT" in row for row in rows)
    assert next(row for row in rows if "AbsRel" in row).split("│")[3].strip() == "0.052"
    assert next(row for row in rows if "δ1" in row).split("│")[3].strip() == "0.966"
    assert next(row for row in rows if "δ2" in row).split("│")[3].strip() == ""
    write_report(tmp_path / "report", wanted, scores, taken, None)
    paper = json.loads((tmp_path / "report" / "metrics.json").read_text())["paper"]
    assert paper["metrics"] == {"abs_rel": 0.052, "delta1": 0.966}
    assert "arXiv 2409.11355" in paper["source"]


def test_names_of_any_bytes_and_of_markup_are_reported_as_they_are(nyu, tmp_path):
    wanted, archive, samples, folder, _ = nyu
    scores = score(wanted, archive, samples, from_folder(folder, samples, "depth"))
    rows = (replace(scores.rows[0], name="caf\udce9"), *scores.rows[1:])
    taken = Predictions(pytest.fail, "runs/mine[v2][/x]", {"store": "caf\udce9.zarr"})
    write_report(tmp_path / "report", wanted, replace(scores, rows=rows), taken, None)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["predictions"]["store"] == "caf\udce9.zarr"
    assert "\ncaf\\udce9," in (tmp_path / "report/per_image.csv").read_text()
    shown = Console(file=io.StringIO(), width=120)
    shown.print(table(wanted, scores, taken))
    assert "runs/mine[v2][/x]" in shown.file.getvalue()
