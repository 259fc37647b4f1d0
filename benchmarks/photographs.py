"""Label real photographs with the embedded checkpoint; writes `photographs.md` and `photographs.jpg`, to look at.

    pip install scikit-image scikit-learn
    python benchmarks/photographs.py [--checkpoint demo] [--normals-checkpoint demo] [--out FOLDER]

The photographs are those that scikit-image and scikit-learn are installed with, and a frame of the demo's clip. One has
a known depth, scikit-image's `stereo_motorcycle` (Middlebury 2014): beside the model's figures on it stand those of a
ramp from the bottom up, which is what most photographs' depth is like and takes no look at the picture.
"""

from __future__ import annotations

import argparse
import os
import platform
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from depthmill.pipeline.colours import depth_rgb, normals_rgb
from depthmill.pipeline.evaluation.metrics import Moments, depth_metrics
from depthmill.pipeline.model.labeler import Labeler, Labels
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M

HERE = Path(__file__).resolve().parent
CLIP = HERE.parent / "demo" / "pedestrians.mp4"
_HEIGHT, _GAP = 160, 4  # of a picture on the sheet; between two
# Of stereo_motorcycle, as its docstring says: focal length and offset of the principal points in pixels, baseline.
_FOCAL_PX, _OFFSET_PX, _BASELINE_M = 994.978, 31.086, 0.193001

Rgb = npt.NDArray[np.uint8]


def photographs() -> dict[str, Rgb]:
    """What is drawn, by name: (H, W, 3) uint8."""
    import skimage.data
    import sklearn.datasets

    grey = skimage.data.camera()
    with closing(open_source(str(CLIP))) as source:
        frame = next(iter(source.read(0, 1))).image
    assert frame is not None
    return {
        "astronaut": skimage.data.astronaut(),
        "camera": np.repeat(grey[..., None], 3, axis=2),
        "chelsea": skimage.data.chelsea(),
        "coffee": skimage.data.coffee(),
        "rocket": skimage.data.rocket(),
        "china": sklearn.datasets.load_sample_image("china.jpg"),
        "flower": sklearn.datasets.load_sample_image("flower.jpg"),
        "pedestrians": frame,
    }


def motorcycle() -> tuple[Rgb, npt.NDArray[np.float32]]:
    """A photograph (H, W, 3) uint8 and its depth (H, W) float32 in metres, NaN where it is not known."""
    import skimage.data

    left, _, disparity = skimage.data.stereo_motorcycle()
    depth = _FOCAL_PX * _BASELINE_M / (np.where(np.isfinite(disparity), disparity, np.nan) + _OFFSET_PX)
    return left, depth.astype(np.float32)


def column(picture: Rgb, labels: Labels) -> Image.Image:
    """A picture, its depth and its normals, one below the other."""
    assert labels.depth is not None
    assert labels.normals is not None
    depth = labels.depth[0]
    rows = [picture, depth_rgb(depth, *map(float, np.percentile(depth, (1, 99)))), normals_rgb(labels.normals[0])]
    width = round(_HEIGHT * picture.shape[1] / picture.shape[0])
    drawn = Image.new("RGB", (width, 3 * _HEIGHT + 2 * _GAP), "white")
    for i, row in enumerate(rows):
        drawn.paste(Image.fromarray(row).resize((width, _HEIGHT), Image.Resampling.LANCZOS), (0, i * (_HEIGHT + _GAP)))
    return drawn


def sheet(columns: list[Image.Image]) -> Image.Image:
    """Columns side by side."""
    drawn = Image.new("RGB", (sum(c.width + _GAP for c in columns) - _GAP, columns[0].height), "white")
    left = 0
    for one in columns:
        drawn.paste(one, (left, 0))
        left += one.width + _GAP
    return drawn


def figures(depth: npt.NDArray[np.float32], truth: npt.NDArray[np.float32]) -> tuple[float, float]:
    """AbsRel and δ1 after affine least-squares alignment."""
    known = np.isfinite(truth)
    p, t = depth[known], truth[known]
    result = depth_metrics(p, t, *Moments.of(p, t).affine, DEPTH_RANGE_M)
    return result["abs_rel"], result["delta1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--normals-checkpoint")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    labeler = Labeler.from_pretrained(options.checkpoint, options.normals_checkpoint, labels=("depth", "normals"))
    pictures = photographs()
    drawn = sheet([column(picture, labeler(picture[None])) for picture in pictures.values()])

    picture, truth = motorcycle()
    depth = labeler(picture[None]).depth
    assert depth is not None
    ramp = np.broadcast_to(np.linspace(1, 0, len(truth), dtype=np.float32)[:, None], truth.shape)
    (abs_rel, delta1), (ramp_abs_rel, ramp_delta1) = figures(depth[0], truth), figures(ramp, truth)
    report = f"""# Photographs

`python benchmarks/photographs.py`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of {platform.machine()},
torch {torch.__version__}, checkpoint `{options.checkpoint}`, {labeler.processing_resolution} pixels.

![Photographs, their depth and their normals](photographs.jpg)

From left to right: {", ".join(f"`{name}`" for name in pictures)}.
Depth is warm where near, its colours between the 1st and the 99th percentile; of normals x to the right is red, y up
green, z towards the viewer blue.

A photograph of known depth, `stereo_motorcycle` (not shown), after affine alignment:

| | model | a ramp from the bottom up |
| --- | ---: | ---: |
| AbsRel | {abs_rel:.3f} | {ramp_abs_rel:.3f} |
| δ1 | {delta1:.3f} | {ramp_delta1:.3f} |

Sources: scikit-image (`astronaut`: NASA, public domain; `camera`, `chelsea`, `coffee`, `rocket`: CC0), scikit-learn
(`china` by danielbuechele, flickr.com/photos/danielbuechele/6061409035, and `flower` by vultilion,
flickr.com/photos/vultilion/6056698931, both CC BY 2.0, creativecommons.org/licenses/by/2.0, here scaled down and
labelled), `demo/pedestrians.mp4` (`demo/README.md`). `stereo_motorcycle`: Scharstein et al., GCPR 2014.
"""
    print(report)
    options.out.mkdir(parents=True, exist_ok=True)
    drawn.save(options.out / "photographs.jpg", quality=90)
    (options.out / "photographs.md").write_text(report)


if __name__ == "__main__":
    main()
