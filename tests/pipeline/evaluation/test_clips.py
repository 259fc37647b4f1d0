"""Every set of clips, in its own layout, against figures computed by their definition."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from depthmill.pipeline.errors import EvaluationError, UnscorableError
from depthmill.pipeline.evaluation.clip_report import clip_table, write_clip_report
from depthmill.pipeline.evaluation.clip_score import score_clips
from depthmill.pipeline.evaluation.clips import CLIP_SETS, open_clips, read_true_depth
from depthmill.pipeline.evaluation.predictions import Predictions

# Height and width of a set's truth, its factor, where its pictures lie, the part of the truth that they show, and its
# cap in metres.
LAYOUTS = {
    "sintel": ((436, 1024), 65535 / 650, "clean/frame_{:04d}.png", np.s_[:436, :1024], 70),
    "scannet": ((120, 160), 1000, "color/{}.jpg", np.s_[8:112, 11:149], 10),
    "kitti": ((375, 1242), 256, "rgb/{:010d}.png", np.s_[:374, :1242], 80),
    "bonn": ((480, 640), 5000, "rgb/{:.2f}.png", np.s_[:480, :640], 10),
    "nyuv2": ((480, 640), 6000, "rgb/{}.png", np.s_[45:471, 41:601], 10),
    "rendered": ((60, 80), 500, "rgb/{:06d}.png", np.s_[:, :], 1000),
}
FRAMES = 3


def write(folder, name, *, sequences=("a", "b"), **more):
    """Truth and predictions, {picture: (H, W)}, of a set that is written to a folder; `more` of every frame's entry."""
    rng = np.random.default_rng(0)
    (height, width), factor, picture, crop, _ = LAYOUTS[name]
    truths, found, index = {}, {}, []
    for sequence in sequences:
        entries = []
        for i in range(FRAMES):
            image, depth = f"{sequence}/{picture.format(i)}", f"{sequence}/depth/{i}.png"
            steps = rng.uniform(1, 8, (height, width)) * factor
            steps[rng.random(steps.shape) < 0.1] = 0
            steps = np.minimum(np.rint(steps), 65535).astype(np.uint16)
            for path in (folder / image, folder / depth):
                path.parent.mkdir(parents=True, exist_ok=True)
            (folder / image).write_bytes(b"a picture")
            Image.fromarray(steps).save(folder / depth)
            truths[image] = (steps / factor)[crop]
            found[image.rpartition(".")[0]] = 0.1 * rng.uniform(0.9, 1.1) * truths[image] * rng.uniform(
                0.9, 1.1, truths[image].shape
            ) + rng.uniform(0, 0.1)
            found[image.rpartition(".")[0]][5, 20:30] *= 20  # beyond what is valid, once it is aligned
            entries.append({"image": image, "gt_depth": depth, "factor": factor, **more})
        index.append({sequence: entries})
    (folder / f"{name}_video.json").write_text(json.dumps({name: index}))
    return list(truths.values()), found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_is_scored_by_the_definition(name, tmp_path):
    folder = tmp_path / name
    wanted = CLIP_SETS[name]
    assert wanted.cap_m == LAYOUTS[name][-1]
    truths, found = write(folder, name)
    clips = open_clips(wanted, tmp_path)
    scores = score_clips(wanted, clips, lambda sample: found[sample.name])
    assert [row.name for row in scores.rows] == ["a", "b"]
    assert np.isnan(scores.metrics["tae"])
    rels, shares = [], []
    for k in range(2):
        t = np.stack(truths[k * FRAMES : (k + 1) * FRAMES])
        p = np.stack(list(found.values())[k * FRAMES : (k + 1) * FRAMES])
        valid = (t > 1e-3) & (t < wanted.cap_m)
        a, b = np.polyfit(p[valid], t[valid], 1)
        aligned = np.clip(a * p + b, 1e-3, wanted.cap_m)
        assert (scores.rows[k].scale, scores.rows[k].shift) == pytest.approx((a, b))
        assert scores.rows[k].pixels == valid.sum()
        for one, other, mask in zip(aligned, t, valid, strict=True):
            x, y = one[mask], other[mask]
            rels.append(np.mean(np.abs(x - y) / y))
            shares.append(np.mean(np.maximum(x / y, y / x) < 1.25))
    assert scores.metrics["abs_rel"] == pytest.approx(np.mean(rels))
    assert scores.metrics["delta1"] == pytest.approx(np.mean(shares))


def test_intrinsics_follow_the_crop_and_lost_poses_are_left_out(tmp_path):
    four = np.eye(4)
    four[0, 0] = four[1, 1] = 100
    four[:2, 2] = 80, 60
    write(tmp_path, "scannet", sequences=("a", "b", "c"), K=four.tolist(), pose=np.eye(4).tolist())
    index = tmp_path / "scannet_video.json"
    document = json.loads(index.read_text())
    for frame in (document["scannet"][0]["a"][0], *document["scannet"][2]["c"]):
        frame["pose"] = np.full((4, 4), -np.inf).tolist()
    index.write_text(json.dumps(document))
    clips = open_clips(CLIP_SETS["scannet"], index)
    assert clips[0].frames[0].pose is None
    assert clips[0].frames[1].intrinsics.tolist() == [[100, 0, 69], [0, 100, 52], [0, 0, 1]]
    scores = score_clips(CLIP_SETS["scannet"], clips, lambda _: np.linspace(1, 2, 138) * np.ones((104, 1)))
    assert [(row.pairs, row.unpaired) for row in scores.rows] == [(1, 1), (2, 0), (0, 2)]
    # It says the same of each frame, and no camera moves; the clip that has no figure does not count.
    assert scores.metrics["tae"] == pytest.approx(0, abs=1e-9)


def test_pictures_that_are_not_cut_are_cut_with_the_truth(tmp_path):
    k = [[577, 0, 79.5], [0, 577, 59.5], [0, 0, 1]]
    write(tmp_path, "scannet", K=k, pose=np.eye(4).tolist())
    index = tmp_path / "scannet_video_tae.json"
    index.write_text((tmp_path / "scannet_video.json").read_text().replace("/color/", "/color_origin/"))
    steps = np.linspace(1000, 4000, 160) * np.linspace(1, 2, 120)[:, None]
    for sequence in "ab":
        (tmp_path / sequence / "color").rename(tmp_path / sequence / "color_origin")
        for i in range(FRAMES):
            Image.fromarray(steps.astype(np.uint16)).save(tmp_path / f"{sequence}/depth/{i}.png")
    wanted = CLIP_SETS["scannet"]
    clips = open_clips(wanted, index)
    assert clips[0].frames[0].intrinsics.tolist() == [[577, 0, 68.5], [0, 577, 51.5], [0, 0, 1]]

    def said(sample):
        depth = steps.astype(np.uint16) / 1000
        depth[:8] = depth[:, -11:] = 10 * int(sample.name[-1])  # beside what is scored it says what it wants
        return depth

    row = score_clips(wanted, clips, said).rows[0]
    assert row.pixels == FRAMES * 104 * 138
    assert row.metrics["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert row.metrics["tae"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("unit", "dtype"), [(1, np.float64), (2**-17, np.float16)])  # whose scale float16 has not
def test_tae_is_the_mean_of_both_ways_in_per_cent(tmp_path, unit, dtype):
    k = [[50, 0, 39.5], [0, 50, 29.5], [0, 0, 1]]
    write(tmp_path, "rendered", sequences=("a",), K=k, pose=np.eye(4).tolist())
    for i, metres in enumerate((2, 4, 6)):
        Image.fromarray(np.full((60, 80), 500 * metres, np.uint16)).save(tmp_path / f"a/depth/{i}.png")
    # Predicted are 1, 3 and 2: of truths 2, 4 and 6 the fit makes 3, 5 and 4.
    said = dict(zip(("a/rgb/000000", "a/rgb/000001", "a/rgb/000002"), (1.0, 3.0, 2.0), strict=True))
    wanted = CLIP_SETS["rendered"]
    clips = open_clips(wanted, tmp_path)
    (row,) = score_clips(wanted, clips, lambda s: np.full((60, 80), unit * said[s.name], dtype)).rows
    assert (row.scale, row.shift) == pytest.approx((1 / unit, 2))
    assert row.metrics["tae"] == pytest.approx(100 * np.mean([2 / 5, 2 / 3, 1 / 4, 1 / 5]))


def test_a_camera_that_zooms_sees_the_same_wall(tmp_path):
    write(tmp_path, "rendered", sequences=("a",), pose=np.eye(4).tolist())
    index = tmp_path / "rendered_video.json"
    document = json.loads(index.read_text())
    for i, entry in enumerate(document["rendered"][0]["a"]):
        entry["K"] = [[50 * 2**i, 0, 39.5], [0, 50 * 2**i, 29.5], [0, 0, 1]]
        slanted = np.ones((60, 1)) * 4 / (1 + (np.arange(80) - 39.5) / (50 * 2**i))
        Image.fromarray(np.rint(500 * slanted).astype(np.uint16)).save(tmp_path / f"a/depth/{i}.png")
    index.write_text(json.dumps(document))
    wanted = CLIP_SETS["rendered"]
    clips = open_clips(wanted, tmp_path)
    exact = {frame.sample.name: np.nan_to_num(read_true_depth(wanted, frame)) for frame in clips[0].frames}
    (row,) = score_clips(wanted, clips, lambda sample: exact[sample.name]).rows
    assert row.pairs == 2
    assert row.metrics["tae"] < 0.5  # half a pixel; with the other's focal length 19


def test_tae_is_not_that_of_pixels_put_behind_the_camera(tmp_path):
    write(tmp_path, "rendered", sequences=("a",), K=[[50, 0, 39.5], [0, 50, 29.5], [0, 0, 1]], pose=np.eye(4).tolist())
    truth = np.full((60, 80), 4.0)
    truth[:, :40] = 2.0
    for i in range(3):
        Image.fromarray((500 * truth).astype(np.uint16)).save(tmp_path / f"a/depth/{i}.png")

    def said(sample):
        depth = truth.copy()
        depth[0, 0] = -4.0 if sample.name.endswith("1") else 2.0
        return depth

    wanted = CLIP_SETS["rendered"]
    (row,) = score_clips(wanted, open_clips(wanted, tmp_path), said).rows
    assert row.metrics["tae"] < 0.1


def test_a_smaller_prediction_is_resized(tmp_path):
    write(tmp_path, "rendered", sequences=("a",))
    wanted = CLIP_SETS["rendered"]
    clips = open_clips(wanted, tmp_path)
    ramp = np.linspace(0.25, 1.75, 40)  # whose bilinear enlargement NumPy knows
    large = np.interp(np.arange(80) / 2 - 0.25, np.arange(40), ramp) * np.ones((60, 1))
    for i in range(FRAMES):
        Image.fromarray(np.rint(500 * (2 + large)).astype(np.uint16)).save(tmp_path / f"a/depth/{i}.png")
    (small,) = score_clips(wanted, clips, lambda _: ramp * np.ones((30, 1))).rows
    assert small.metrics["abs_rel"] < 5e-4  # the truth is rounded to 2 mm; the nearest pixel would be off by 3e-3


@pytest.mark.parametrize("value", [np.nan, 1e200])
def test_a_clip_that_cannot_be_scored_is_skipped_with_the_reason(tmp_path, value):
    _, found = write(tmp_path, "rendered")
    wanted = CLIP_SETS["rendered"]
    clips = open_clips(wanted, tmp_path)
    bad = {**found, "a/rgb/000001": np.full((60, 80), value)}
    scores = score_clips(wanted, clips, lambda sample: bad[sample.name])
    assert [row.name for row in scores.rows] == ["b"]
    assert "a/rgb/000001 is NaN, infinite or above 3.4e38 at" in scores.skipped[0].reason

    bad["a/rgb/000001"] = np.zeros((0, 80))
    assert "of shape (0, 80)" in score_clips(wanted, clips, lambda sample: bad[sample.name]).skipped[0].reason

    def none(sample):
        raise UnscorableError("it has no labels")

    with pytest.raises(EvaluationError, match="none of the 2 clips of rendered can be scored; a: a/rgb/000000: it has"):
        score_clips(wanted, clips, none)


def test_frames_without_truth_are_counted(tmp_path):
    _, found = write(tmp_path, "rendered", sequences=("a",))
    Image.fromarray(np.zeros((60, 80), np.uint16)).save(tmp_path / "a/depth/1.png")
    wanted = CLIP_SETS["rendered"]
    (row,) = score_clips(wanted, open_clips(wanted, tmp_path), lambda sample: found[sample.name]).rows
    assert (row.frames, row.empty) == (2, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"kitti": d["rendered"]}, "KeyError: 'rendered'"),
        (lambda d: {"rendered": [{"a": [{"image": "a/rgb/000000.png"}]}]}, "gt_depth"),
        (lambda d: {"rendered": [{"a": [{**d["rendered"][0]["a"][0], "K": [1, 2]}]}]}, "expected 3x3 or 4x4"),
        (lambda d: {"rendered": [{"a": [{**d["rendered"][0]["a"][0], "pose": [1, 2]}]}]}, "expected 4x4"),
        (lambda d: {"rendered": [{"a": [{**d["rendered"][0]["a"][0], "factor": 0}]}]}, "expected more than 0"),
        (lambda d: {"rendered": [{"a": [{**d["rendered"][0]["a"][0], "image": "a/x.png"}]}]}, "x.png that are not"),
        (lambda d: {"rendered": []}, "lists no frame"),
        (lambda d: {"rendered": d["rendered"][:1] * 2}, "calls sequences a: expected names that differ"),
        (lambda d: {"rendered": [{"../a": d["rendered"][0]["a"]}]}, r"calls sequences \.\./a: expected"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path, change, message):
    write(tmp_path, "rendered")
    index = tmp_path / "rendered_video.json"
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises(EvaluationError, match=message):
        open_clips(CLIP_SETS["rendered"], tmp_path)


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"has no kitti_video\.json; expected the index"):
        open_clips(CLIP_SETS["kitti"], tmp_path)


def test_clips_of_any_name_are_reported(tmp_path):
    _, found = write(tmp_path, "rendered", sequences=("a",))
    wanted = CLIP_SETS["rendered"]
    scores = score_clips(wanted, open_clips(wanted, tmp_path), lambda sample: found[sample.name])
    scores = {"raw": replace(scores, rows=(replace(scores.rows[0], name="caf\udce9"),))}
    predictions = {"raw": Predictions(pytest.fail, "mine[v2][/x]", {"predictions": "caf\udce9"})}
    write_clip_report(tmp_path / "out", wanted, scores, predictions, None)
    assert json.loads((tmp_path / "out/metrics.json").read_text())["predictions"] == {"predictions": "caf\udce9"}
    assert "\ncaf\\udce9,raw," in (tmp_path / "out/per_clip.csv").read_text()
    shown = Console(file=io.StringIO(), width=120)
    shown.print(clip_table(wanted, scores, "mine[v2][/x]"))
    assert "mine[v2][/x]" in shown.file.getvalue()
