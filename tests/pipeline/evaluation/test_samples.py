"""Each set's reader on a small archive in that set's exact layout; and what is said of broken ones."""

import gzip
import io
import os
import re
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from depthmill.pipeline.errors import EvaluationError, RunStoppedError, UnscorableError
from depthmill.pipeline.evaluation.clips import CLIP_SETS, find_index
from depthmill.pipeline.evaluation.datasets import SETS, find
from depthmill.pipeline.evaluation.predictions import from_folder
from depthmill.pipeline.evaluation.samples import open_samples, read_truth, write_picture
from depthmill.tests.pipeline.evaluation import layouts


@pytest.fixture
def nyu(tmp_path):
    return (*layouts.nyuv2(np.random.default_rng(0)), tmp_path / "nyu_labeled_extracted.tar")


def names(*arguments):
    """Names of the pictures that are found."""
    archive, samples = open_samples(*arguments)
    archive.close()
    return [sample.name for sample in samples]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("write", [layouts.write_tar, layouts.write_folder])
def test_a_set_is_read_as_it_was_written(name, write, tmp_path):
    wanted, files, written = layouts.LAYOUTS[name](np.random.default_rng(0))
    archive, samples = open_samples(wanted, write(tmp_path / "data", files))
    assert [sample.name for sample in samples] == [one.name for one in written]
    for sample, one in zip(samples, written, strict=True):
        truth = read_truth(wanted, archive, sample)
        assert (truth.mask == one.valid).all()
        # True normals have x to the left, here as in E2E-FT's checkpoints; what is scored has it to the right.
        expected = one.truth * (-1, 1, 1) if wanted.modality == "normals" else one.truth
        assert np.abs(truth.values - expected)[one.valid].max() < 1e-6
        shown = {"crop": wanted.crop, "colours": wanted.colours}
        path = write_picture(archive.read(sample.picture), tmp_path / "pictures" / sample.picture, **shown)
        with Image.open(path) as picture:
            assert (np.asarray(picture) == (one.rgb if wanted.colours is None else wanted.colours(one.rgb))).all()
    archive.close()


def test_pictures_with_normals_have_the_colours_that_the_papers_evaluation_gives_them():
    """By DSINE's loader and E2E-FT's `projects/dsine/test.py`, step by step, in torch as there."""
    assert all((one.colours is not None) == (one.modality == "normals") for one in SETS.values())
    rgb = layouts.rgb(np.random.default_rng(0), (30, 40)) // 2
    image = torch.from_numpy(rgb.astype(np.float32) / 255.0).permute(2, 0, 1)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    image = (image.clip(0.0, 1.0) - mean) / deviation
    low, high = image.min().item(), image.max().item()
    expected = ((image - low) / (high - low) * 255.0).permute(1, 2, 0).numpy().astype(np.uint8)
    shown = SETS["sintel"].colours(rgb)
    assert (shown == expected).all()
    assert shown.max() == 255
    black = SETS["sintel"].colours(np.zeros((2, 2, 3), np.uint8))
    assert black[0, 0].tolist() == [0, 66, 255]  # one colour, stretched: there, too


def test_sets_have_the_pictures_and_the_resolution_of_the_papers():
    assert {one.name: (one.count, one.resolution) for one in SETS.values()} == {
        "nyuv2": (654, 640),
        "kitti": (652, 1216),
        "eth3d": (454, 756),
        "scannet": (800, 640),
        "diode": (771, 640),
        "nyuv2-normals": (654, 640),
        "scannet-normals": (300, 640),
        "ibims": (100, 640),
        "sintel": (1064, 1024),
    }


@pytest.mark.parametrize("name", SETS)
def test_examples_are_of_their_set(name):
    assert re.fullmatch(SETS[name].truth, SETS[name].example)


def test_a_set_is_found_in_the_whole_download(tmp_path, nyu):
    wanted, files, written, _ = nyu
    (tmp_path / "nyuv2").mkdir()
    layouts.write_tar(tmp_path / wanted.archive, files)
    ibims, more, also = layouts.ibims(np.random.default_rng(0))
    layouts.write_folder(tmp_path / "ibims", more)
    assert names(wanted, tmp_path) == [one.name for one in written]
    assert names(ibims, tmp_path) == names(ibims, tmp_path / "ibims") == [one.name for one in also]


def test_a_set_of_linked_folders_is_found_and_circles_of_links_are_none(tmp_path):
    wanted, files, written = layouts.ibims(np.random.default_rng(0))
    layouts.write_folder(tmp_path / "disk", files)
    data = tmp_path / "data"
    data.mkdir()
    (data / "ibims").symlink_to(tmp_path / "disk/ibims")
    (tmp_path / "disk/ibims/back").symlink_to(tmp_path)  # by way of which `data` is below itself
    (data / "itself").symlink_to(".")
    assert names(wanted, data) == [one.name for one in written]


def test_a_split_says_which_pictures(tmp_path):
    wanted, files, _ = layouts.kitti(np.random.default_rng(0))
    data = layouts.write_tar(tmp_path / "kitti.tar", files)
    day, drive = "2011_09_26", "2011_09_26_drive_0009_sync"
    split = tmp_path / "split.txt"
    first = f"{day}/{drive}/image_02/data"
    split.write_text(
        f"{first}/0000000001.png {drive}/proj_depth/groundtruth/image_02/0000000001.png 721.5\n\n"
        f"{first}/0000000075.png None 721.5\n"
    )
    assert names(wanted, data, split) == [f"{first}/0000000001"]
    split.write_text(f"{first}/0000000001\n{first}/0000000001.png\n")  # a name as in per_image.csv, once
    assert names(wanted, data, split) == [f"{first}/0000000001"]
    split.write_text(f"{first}/0000000001.png\n{first}/0000000002.png\n")
    with pytest.raises(EvaluationError, match=r"lacks 2011.*0002\.png, or.*--split"):
        open_samples(wanted, data, split)
    split.write_text("\n")
    with pytest.raises(EvaluationError, match="names no picture"):
        open_samples(wanted, data, split)
    with pytest.raises(EvaluationError, match="cannot be read"):
        open_samples(wanted, data, tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    "opened",
    [
        partial(open_samples, SETS["nyuv2"]),
        partial(find_index, CLIP_SETS["kitti"]),
        partial(from_folder, samples=(), modality="depth"),
    ],
    ids=["data", "clips", "predictions"],
)
def test_a_place_that_may_not_be_looked_into_is_refused_in_a_line(tmp_path, monkeypatch, opened):
    look = os.stat

    def refuse(path, *args, **options):
        if str(path).startswith(str(tmp_path / "set")):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(EvaluationError, match="set"):
        opened(tmp_path / "set")


def test_missing_files_are_named_before_anything_is_done(tmp_path, nyu):
    wanted, files, _, path = nyu
    del files["./test/kitchen_0004/rgb_0002.png"]
    with pytest.raises(EvaluationError, match=r"lacks test/kitchen_0004/rgb_0002\.png.*anew.*Marigold"):
        open_samples(wanted, layouts.write_tar(path, files))
    del files["./test/kitchen_0004/depth_0002.png"]
    with pytest.raises(EvaluationError, match=r"has 2 pictures.*expected 3.*--split"):
        open_samples(wanted, layouts.write_tar(path, files))


def test_a_missing_mask_is_named(tmp_path):
    wanted, files, written = layouts.diode(np.random.default_rng(0))
    del files[f"./{written[0].name}_depth_mask.npy"]
    with pytest.raises(EvaluationError, match=r"200_010_depth_mask\.npy"):
        open_samples(wanted, layouts.write_tar(tmp_path / "diode.tar", files))


def test_another_set_is_not_taken_for_it(tmp_path, nyu):
    _, files, _, path = nyu
    with pytest.raises(EvaluationError, match=r"no ground truth of diode.*indoors/.*_depth\.npy"):
        open_samples(SETS["diode"], layouts.write_tar(path, files))
    with pytest.raises(EvaluationError, match="nyuv2, kitti"):
        find(SETS, "nyu")


def test_a_tar_that_cannot_be_read(tmp_path, nyu):
    wanted, files, _, path = nyu
    whole = layouts.write_tar(path, files).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EvaluationError, match="cannot be read as a tar"):
        open_samples(wanted, path)
    path.write_bytes(gzip.compress(whole[:100_000]))
    with pytest.raises(EvaluationError, match="uncompressed"):
        open_samples(wanted, path)
    with pytest.raises(EvaluationError, match="no such file"):
        open_samples(wanted, tmp_path / "nowhere.tar")


def truth_of(wanted, files, folder):
    """The ground truth of the first picture."""
    archive, samples = open_samples(wanted, layouts.write_folder(folder, files))
    return read_truth(wanted, archive, samples[0])


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (np.zeros((480, 640), np.uint16), "no valid pixel"),
        (np.pad(np.zeros((300, 300), np.uint16), ((0, 180), (0, 340)), constant_values=20_000), "no valid pixel"),
        (np.zeros((480, 640), np.uint8), "16 bits"),
        (None, "cannot be read"),
    ],
)
def test_depth_that_cannot_be_scored(tmp_path, nyu, steps, message):
    wanted, files, _, _ = nyu
    files["./test/kitchen_0004/depth_0001.png"] = b"no picture" if steps is None else layouts.png(steps)
    with pytest.raises(UnscorableError, match=message):
        truth_of(wanted, files, tmp_path)


def test_an_eth3d_depth_of_another_size(tmp_path):
    _, files, _ = layouts.eth3d(np.random.default_rng(0))
    with pytest.raises(UnscorableError, match=rf"expected {4 * 4032 * 6048}: 4032x6048"):
        truth_of(replace(SETS["eth3d"], count=2), files, tmp_path)


def test_nan_in_the_ground_truth_is_counted_and_not_scored(tmp_path):
    wanted, files, written = layouts.eth3d(np.random.default_rng(0))
    depth = written[0].truth.copy()
    depth[20, 10:14] = np.nan
    name = next(name for name in files if name.startswith("./depth/office"))
    truth = truth_of(wanted, {**files, name: depth.tobytes()}, tmp_path)
    assert truth.nan_pixels == 4
    assert (truth.mask == (written[0].valid & ~np.isnan(depth))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0, -1])
def test_a_depth_that_the_mask_calls_valid_and_is_none(tmp_path, bad):
    wanted, files, written = layouts.diode(np.random.default_rng(0))
    depth = written[0].truth.copy()
    depth[tuple(np.argwhere(written[0].valid)[0])] = bad
    with pytest.raises(UnscorableError, match="calls 1 pixels valid"):
        truth_of(wanted, {**files, f"./{written[0].name}_depth.npy": layouts.npy(depth)}, tmp_path)


def test_a_mask_of_another_size(tmp_path):
    wanted, files, written = layouts.diode(np.random.default_rng(0))
    files[f"./{written[0].name}_depth_mask.npy"] = layouts.npy(np.ones((768, 1023)))
    with pytest.raises(UnscorableError, match="768x1023"):
        truth_of(wanted, files, tmp_path)


def test_nan_normals_are_counted_and_not_scored(tmp_path):
    wanted, files, written = layouts.ibims(np.random.default_rng(0))
    normals = written[0].truth.copy()
    normals[100, 50:53, 1] = np.nan
    truth = truth_of(wanted, {**files, "ibims/corridor_01_normal.exr": layouts.exr(normals)}, tmp_path)
    assert truth.nan_pixels == 3
    assert not truth.mask[100, 50:53].any()
    assert truth.mask.sum() == written[0].valid.sum() - 3


def test_a_kitti_picture_too_small_for_its_crop(tmp_path):
    wanted, files, _ = layouts.kitti(np.random.default_rng(0))
    name = next(name for name in files if "groundtruth" in name)
    with pytest.raises(UnscorableError, match="352x1216"):
        truth_of(wanted, {**files, name: layouts.png(np.ones((350, 1242), np.uint16))}, tmp_path)


def test_pictures_are_shown_as_their_pixels_lie(tmp_path):
    """A turned JPEG would be turned by labelling, and its ground truth is not."""
    pixels = layouts.rgb(np.random.default_rng(0), (30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif)
    path = write_picture(buffer.getvalue(), tmp_path / "a" / "DSC_0219.JPG")
    assert path.suffix == ".png"
    from depthmill.pipeline.sources.pictures import decode_image

    assert (decode_image(path, 10_000) == np.asarray(Image.open(buffer))).all()
    damaged = write_picture(b"no picture", tmp_path / "b.png", crop=SETS["kitti"].crop)
    assert damaged.read_bytes() == b"no picture"
    small = layouts.png(np.zeros((350, 1242, 3), np.uint8))
    assert write_picture(small, tmp_path / "c.png", crop=SETS["kitti"].crop).read_bytes() == small


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("decoded", MemoryError()),
        ("decoded", OSError("out of memory when reading image file")),
        ("coloured", MemoryError("Unable to allocate 34.3 MiB")),
        ("encoded", MemoryError()),
    ],
)
def test_a_picture_for_which_memory_does_not_suffice_is_not_shown_otherwise(tmp_path, monkeypatch, where, error):
    """Reruns keep what is written, and a model that sees other colours has other figures."""

    def fail(*_, **more):
        raise error

    data = layouts.png(np.zeros((4, 4, 3), np.uint8))
    if where != "coloured":
        monkeypatch.setattr(Image.Image, "convert" if where == "decoded" else "save", fail)
    with pytest.raises(RunStoppedError, match=r"^a\.png cannot be prepared, since no memory is left: "):
        write_picture(data, tmp_path / "a.png", colours=fail if where == "coloured" else SETS["ibims"].colours)
    assert not list(tmp_path.iterdir())


def test_truth_is_not_damaged_for_lack_of_memory(nyu):
    """It would be missing in the figures."""
    wanted, files, _, data = nyu
    archive, samples = open_samples(wanted, layouts.write_tar(data, files))
    with pytest.raises(MemoryError, match="no memory is left"):
        read_truth(replace(wanted, decode=Mock(side_effect=MemoryError())), archive, samples[0])
    archive.close()


@pytest.mark.parametrize("shown", ["crop", "colours"])
def test_a_mistake_in_what_prepares_a_picture_shows_no_other(tmp_path, shown):
    def mistaken(*_):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        write_picture(layouts.png(np.zeros((4, 4, 3), np.uint8)), tmp_path / "a.png", **{shown: mistaken})
    assert not list(tmp_path.iterdir())
