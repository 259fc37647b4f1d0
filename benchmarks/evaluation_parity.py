"""Score small archives of every set with the reference's own code and with ours: how far the figures differ.

    git clone https://github.com/VisualComputingInstitute/diffusion-e2e-ft
    python benchmarks/evaluation_parity.py diffusion-e2e-ft

What is compared: Marigold's data set classes (crops, masks, ranges), alignment and metrics, and DSINE's metrics. The
archives are the tests', with noisy predictions. The reference imports pandas. Writes the table to evaluation_parity.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import platform
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthmill.pipeline.evaluation.predictions import from_folder
from depthmill.pipeline.evaluation.samples import open_samples
from depthmill.pipeline.evaluation.score import score
from depthmill.tests.pipeline.evaluation import layouts

HERE = Path(__file__).resolve().parent
# Our set and figures by the reference's names, with the options of its config/dataset/*.yaml and eval_args/.
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "nyuv2": ("nyu_v2", {"eigen_valid_mask": True}),
    "kitti": ("kitti", {"kitti_bm_crop": True, "valid_mask_crop": "eigen"}),
    "eth3d": ("eth3d", {}),
    "scannet": ("scannet", {}),
    "diode": ("diode", {}),
}
DEPTH = {
    "abs_rel": "abs_relative_difference",
    "delta1": "delta1_acc",
    "delta2": "delta2_acc",
    "delta3": "delta3_acc",
    "rmse": "rmse_linear",
    "log10": "log10",
    "silog": "silog_rmse",
}


def load(checkout: Path) -> tuple[Any, Any, Any, Any]:
    """The reference's modules: data sets, alignment, depth metrics, normals metrics."""
    # It imports torchvision to resize pictures in training, which is not done here.
    transforms: Any = types.ModuleType("torchvision.transforms")
    transforms.InterpolationMode = transforms.Resize = object
    sys.modules |= {"torchvision": types.ModuleType("torchvision"), "torchvision.transforms": transforms}
    # `utils` of DSINE is loaded without its package, which imports OpenCV to draw.
    sys.path[:0] = [str(checkout / "Marigold"), str(checkout / "DSINE" / "utils")]
    modules = ("src.dataset", "src.util.alignment", "src.util.metric", "utils")
    datasets, alignment, depth, normals = (importlib.import_module(name) for name in modules)
    return datasets, alignment, depth, normals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    datasets, alignment, depth, normals = load(parser.parse_args().checkout.resolve())
    rng = np.random.default_rng(0)
    lines = []
    for name, write in layouts.LAYOUTS.items():
        wanted, files, written = write(rng)
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            tar = layouts.write_tar(root / "set.tar", files)
            predictions = list(layouts.guesses(written, wanted, rng))
            layouts.write_predictions(root / "npy", [one.name for one in written], predictions)
            archive, samples = open_samples(wanted, tar)
            ours = score(
                wanted, archive, samples, from_folder(root / "npy", samples, wanted.modality, wanted.axes)
            ).metrics
            archive.close()
            if wanted.modality == "normals":
                pooled = torch.cat(
                    [
                        normals.compute_normal_error(_planes(prediction), _planes(one.truth))[0, 0][one.valid]
                        for one, prediction in zip(written, predictions, strict=True)
                    ]
                )
                theirs = dict(zip(ours, normals.compute_normal_metrics(pooled).values(), strict=True))
            else:
                split = root / "split.txt"
                split.write_text("\n".join(f"{s.picture} {s.truth} {s.mask or s.truth}" for s in samples))
                kind, options = SETS[name]
                loader = datasets.dataset_name_class_dict[kind]
                if name == "eth3d":
                    loader.HEIGHT, loader.WIDTH = written[0].truth.shape  # the archive's are smaller
                truths = loader(
                    mode=datasets.DatasetMode.EVAL,
                    filename_ls_path=str(split),
                    dataset_dir=str(tar),
                    disp_name=name,
                    **options,
                )
                rows = []
                for i, prediction in enumerate(predictions):
                    truth, mask = (truths[i][key].squeeze() for key in ("depth_raw_linear", "valid_mask_raw"))
                    aligned = alignment.align_depth_least_square(
                        truth.numpy(),
                        prediction,
                        mask.numpy(),
                        return_scale_shift=False,
                        max_resolution=wanted.fit_columns,
                    )
                    aligned = torch.from_numpy(np.clip(aligned, truths.min_depth, truths.max_depth).clip(min=1e-6))
                    rows.append(
                        [getattr(depth, f)(aligned.clone(), truth.clone(), mask).item() for f in DEPTH.values()]
                    )
                theirs = dict(zip(DEPTH, np.mean(rows, axis=0).tolist(), strict=True))
        apart = {key: abs(ours[key] - theirs[key]) / abs(theirs[key]) for key in ours}
        worst = max(apart, key=lambda key: apart[key])
        shown = f"{worst} | {ours[worst]:.6f} | {theirs[worst]:.6f} | {apart[worst]:.1e}"
        lines.append(f"| {name} | {len(written)} | {len(ours)} | {shown} |")
    rows = "\n".join(lines)
    text = f"""# `depthmill evaluate` against the paper's evaluation code

Written by `benchmarks/evaluation_parity.py`, {datetime.date.today()}, on {os.cpu_count()} cores of
{platform.machine()}, torch {torch.__version__}. Small archives in each set's layout, with noisy predictions (both from
`tests/pipeline/evaluation/layouts.py`), are scored by the paper's code (Marigold's data set classes, alignment and
metrics, DSINE's metrics) and by ours. Of each set, the figure that is furthest apart, relatively; depths in metres,
angles in degrees, shares of normals in per cent.

| set | pictures | figures | furthest apart | ours | theirs | relative difference |
| --- | ---: | ---: | --- | ---: | ---: | ---: |
{rows}

What is left is rounding: theirs computes in float32, where a pixel may fall on the other side of a share's bound; our
medians of angles are from bins of 0.001°.
"""
    (HERE / "evaluation_parity.md").write_text(text)
    print(text)


def _planes(vectors: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(vectors.astype(np.float32).transpose(2, 0, 1))[None]


if __name__ == "__main__":
    main()
