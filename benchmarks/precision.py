"""What half precision does to labels: the folded network and diffusers' modules as they are, each against float32.

python benchmarks/precision.py [--checkpoint demo] [--normals-checkpoint demo] [--pictures FILE] [--frames 8]
    [--device auto]

Prints, as Markdown: of each dtype the mean error of the labels of real frames against diffusers' modules in float32, of
depth as AbsRel (of labels of at least 0.01), of normals in degrees; and of the folded network in float32.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import torch

from depthmill.pipeline.geometry import processed_size, to_network
from depthmill.pipeline.model.backend import pick_device
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.single_step import SingleStep, load_heads
from depthmill.pipeline.model.specialize import Specialized
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.types import Modality

CLIP = Path(__file__).parent.parent / "demo" / "pedestrians.mp4"
BATCH = 4


def read(path: Path, frames: int, resolution: int, factor: int) -> torch.Tensor:
    """Frames spread over an input, as the network sees them: (frames, 3, h, w)."""
    with closing(open_source(str(path))) as source:
        count = source.probe().frames
        images = [next(iter(source.read(at, at + 1))).image for at in range(0, count, max(1, count // frames))][:frames]
    pictures = [torch.from_numpy(image.copy()) for image in images if image is not None]
    size = processed_size(*pictures[0].shape[:2], resolution)
    return torch.stack([to_network(picture, size, factor) for picture in pictures])


def error(labels: torch.Tensor, exact: torch.Tensor, modality: Modality) -> float:
    """Mean AbsRel of depth, or mean angle of normals in degrees."""
    if modality == "depth":
        known = exact >= 0.01
        return ((labels - exact).abs() / exact)[known].mean().item()
    half = (labels.double() - exact.double()).norm(dim=1) / 2  # exact for small angles, where arccos is not
    return torch.rad2deg(2 * half.clip(max=1).asin()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--normals-checkpoint", default="demo")
    parser.add_argument("--pictures", type=Path, default=CLIP)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    checkpoints = [
        open_checkpoint(arguments.checkpoint, "depth"),
        open_checkpoint(arguments.normals_checkpoint, "normals"),
    ]
    factor = load_heads(checkpoints)[0].factor
    pictures = read(arguments.pictures, arguments.frames, checkpoints[0].processing_resolution, factor).to(device)

    def labels(kind: type[SingleStep] | type[Specialized], dtype: torch.dtype) -> dict[Modality, torch.Tensor]:
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32  # as labelers have it
        network = kind(load_heads(checkpoints), device, dtype)
        parts = [network(part) for part in pictures.split(BATCH)]
        return {modality: torch.cat([part[modality] for part in parts]) for modality in parts[0]}

    exact = labels(SingleStep, torch.float32)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    height, width = pictures.shape[2:]
    print(
        f"{len(pictures)} frames of {width}x{height} from {arguments.pictures.name}; {where}, torch {torch.__version__}"
    )
    print("\n| dtype | network | depth, AbsRel | normals, degrees |\n| --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, kind in (("diffusers' modules", SingleStep), ("folded", Specialized)):
            if (kind, dtype) == (SingleStep, torch.float32):
                continue
            found = labels(kind, dtype)
            depth, normals = (error(found[modality], exact[modality], modality) for modality in ("depth", "normals"))
            print(f"| {str(dtype).removeprefix('torch.')} | {name} | {depth:.2e} | {normals:.4f} |", flush=True)


if __name__ == "__main__":
    main()
