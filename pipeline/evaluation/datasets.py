"""The sets that can be evaluated on. Adding one: an entry in `SETS`, and a test that writes it in its own layout.

Depth comes in the tars of Marigold's evaluation; ranges, crops and masks are those of its `src/dataset/` and
`config/dataset/`. Normals come in the layout of DSINE's `dsine_eval`, as in its `data/datasets/`. The
resolutions at which the model sees a picture, and at which ETH3D is aligned, are those of E2E-FT's `experiments/`;
the colours of pictures with normals are those that its `DSINE/` shows the model.

Two things differ. Where a side is no multiple of 8, E2E-FT's networks drop the rest, and stretch their answer over it;
ours pad the picture. At these resolutions that is so of Sintel's rows (436, there 432) and ETH3D's columns (756, 752).
Its GeoWizard is shown pictures that were resized by PIL's bicubic filter, and normals come back by nearest neighbours;
ours are resized as for all other networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import EvaluationError
from depthmill.pipeline.evaluation import decode
from depthmill.pipeline.evaluation.decode import Floats
from depthmill.pipeline.types import Domain, Modality

Found = TypeVar("Found")
Region = tuple[slice, slice]
Crop = Callable[[int, int], Region]
Colours = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]

_MARIGOLD = "Marigold's evaluation data (its README, section Evaluation)"
_DSINE = "DSINE's `dsine_eval.zip` (its README), unpacked"
# Outward normals in (right, down, front), says DSINE's README; seen from the other side of the surface, that is this.
_DSINE_AXES = "left-up-towards"
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def nyu_eigen(height: int, width: int) -> Region:
    """The part of NYUv2's 480x640 that its Kinect sees (Eigen et al., NIPS 2014)."""
    return slice(45, 471), slice(41, 601)


def kitti_eigen(height: int, width: int) -> Region:
    """The part of KITTI that is scored (Eigen et al., NIPS 2014)."""
    rows = slice(int(0.3324324 * height), int(0.91351351 * height))
    return rows, slice(int(0.0359477 * width), int(0.96405229 * width))


def kitti_benchmark(height: int, width: int) -> Region:
    """The crop of the KITTI benchmark: 352x1216, at the bottom, in the middle."""
    if height < 352 or width < 1216:
        raise ValueError(f"{height}x{width} pixels; expected 352x1216 at least, to which KITTI is cropped")
    left = (width - 1216) // 2
    return slice(height - 352, height), slice(left, left + 1216)


def dsine_colours(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Colours (H, W, 3) as E2E-FT's evaluation of normals shows them to its models: white is a little blue.

    DSINE's loader standardises each channel by ImageNet's mean and deviation (`data/augmentations/basic.py`), which
    E2E-FT's `projects/dsine/test.py` undoes by one minimum and maximum of all three.
    """
    values = (rgb.astype(np.float32) / 255 - _IMAGENET_MEAN) / _IMAGENET_DEVIATION
    low, high = float(values.min()), float(values.max())
    return ((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)


@dataclass(frozen=True)
class EvaluationSet:
    """How a set is laid out and scored.

    Attributes:
        name: On the command line.
        title: For people, with the split.
        modality: What its ground truth is.
        count: Pictures in the split.
        truth: Pattern of the ground truth's path in the set; what matches is the list of pictures.
        picture: Path of the picture that belongs to it, as a template of the pattern's groups.
        example: A path that `truth` matches.
        decode: Turns a ground-truth file into (H, W) metres, or (H, W, 3) vectors whose invalid ones are 0.
        archive: Where the set lies in the whole download.
        home: Where to have it from.
        resolution: Longer side in pixels at which the paper's models saw it.
        mask: Path template of a `.npy` that is not 0 where depth is valid; it stands in for `valid_range` then.
        valid_range: Valid depth in metres, both ends excluded; aligned predictions are clipped to it, whole.
        crop: What part of the picture the model is shown, and ground truth is cut to.
        colours: What the model is shown of the picture's colours, (H, W, 3) uint8; None for the picture's own.
        region: What part of the (cropped) picture is scored; None for all.
        fit_columns: Columns that the alignment is fitted on (`metrics.thin_columns`); None for all.
        axes: Where the x, y and z of true normals point.
        domain: The scene that E2E-FT's evaluation tells GeoWizard of.
    """

    name: str
    title: str
    modality: Modality
    count: int
    truth: str
    picture: str
    example: str
    decode: Callable[[bytes], Floats]
    archive: str
    home: str
    resolution: int
    mask: str | None = None
    valid_range: tuple[float, float] = (0.0, np.inf)
    crop: Crop | None = None
    colours: Colours | None = None
    region: Crop | None = None
    fit_columns: int | None = None
    axes: str = _DSINE_AXES
    domain: Domain = "indoor"


_MILLIMETRES = partial(decode.depth_png, steps_per_m=1000)
_depth = partial(EvaluationSet, modality="depth", home=_MARIGOLD)
_normals = partial(EvaluationSet, modality="normals", home=_DSINE, colours=dsine_colours)

SETS: dict[str, EvaluationSet] = {
    one.name: one
    for one in (
        _depth(
            name="nyuv2",
            title="NYUv2, Eigen test",
            count=654,
            truth=r"(test/[^/]+)/depth_(\d+)\.png",
            picture=r"\1/rgb_\2.png",
            example="test/kitchen_0004/depth_0001.png",
            decode=_MILLIMETRES,
            archive="nyuv2/nyu_labeled_extracted.tar",
            resolution=640,
            valid_range=(1e-3, 10.0),
            region=nyu_eigen,
        ),
        _depth(
            name="kitti",
            title="KITTI, Eigen test",
            count=652,
            truth=r"((\d{4}_\d\d_\d\d)_drive_\d+_sync)/proj_depth/groundtruth/image_02/(\d+)\.png",
            picture=r"\2/\1/image_02/data/\3.png",
            example="2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000069.png",
            decode=partial(decode.depth_png, steps_per_m=256),
            archive="kitti/kitti_eigen_split_test.tar",
            resolution=1216,
            valid_range=(1e-5, 80.0),
            crop=kitti_benchmark,
            region=kitti_eigen,
        ),
        _depth(
            name="eth3d",
            title="ETH3D, high resolution",
            count=454,
            truth=r"depth/([^/]+)_dslr_depth/\1/ground_truth_depth/dslr_images/([^/]+\.JPG)",
            picture=r"rgb/\1/images/dslr_images/\2",
            example="depth/office_dslr_depth/office/ground_truth_depth/dslr_images/DSC_0219.JPG",
            decode=partial(decode.depth_raw, height=4032, width=6048),
            archive="eth3d/eth3d.tar",
            resolution=756,
            valid_range=(1e-5, np.inf),
            fit_columns=1024,
        ),
        _depth(
            name="scannet",
            title="ScanNet, 800 of validation",
            count=800,
            truth=r"([^/]+)/depth/(\d+)\.png",
            picture=r"\1/color/\2.jpg",
            example="scene0406_02/depth/000300.png",
            decode=_MILLIMETRES,
            archive="scannet/scannet_val_sampled_800_1.tar",
            resolution=640,
            valid_range=(1e-3, 10.0),
        ),
        _depth(
            name="diode",
            title="DIODE, validation",
            count=771,
            truth=r"((?:indoors|outdoor)/.+)_depth\.npy",
            picture=r"\1.png",
            mask=r"\1_depth_mask.npy",
            example="indoors/scene_00021/scan_00189/00021_00189_indoors_200_010_depth.npy",
            decode=decode.array,
            archive="diode/diode_val.tar",
            resolution=640,
            valid_range=(0.6, 350.0),
        ),
        _normals(
            name="nyuv2-normals",
            title="NYUv2 test",
            count=654,
            truth=r"(test/\d+)_normal\.png",
            picture=r"\1_img.png",
            example="test/000000_normal.png",
            decode=decode.normals_png,
            archive="nyuv2",
            resolution=640,
        ),
        _normals(
            name="scannet-normals",
            title="ScanNet, 300 of test",
            count=300,
            truth=r"(scene[^/]+/\d+)_normal\.png",
            picture=r"\1_img.png",
            example="scene0532_00/000000_normal.png",
            decode=decode.normals_png,
            archive="scannet",
            resolution=640,
        ),
        _normals(
            name="ibims",
            title="iBims-1",
            count=100,
            truth=r"(ibims/[^/]+)_normal\.exr",
            picture=r"\1_img.png",
            example="ibims/corridor_01_normal.exr",
            decode=decode.normals_exr,
            archive="ibims",
            resolution=640,
        ),
        _normals(
            name="sintel",
            title="Sintel",
            count=1064,
            truth=r"([^/]+/frame_\d+)_normal\.exr",
            picture=r"\1_img.png",
            example="alley_1/frame_0001_normal.exr",
            decode=decode.normals_exr,
            archive="sintel",
            resolution=1024,
            domain="outdoor",
        ),
    )
}


def find(sets: Mapping[str, Found], name: str, what: str = "set") -> Found:
    """The one of some sets (`SETS`, or `clips.CLIP_SETS`) of that name.

    Raises:
        EvaluationError: If there is none; `what` they are.
    """
    if name not in sets:
        raise EvaluationError(f"there is no {what} {name!r}; expected one of {', '.join(sets)}")
    return sets[name]
