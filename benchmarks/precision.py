"""What half precision does to labels: the folded network and diffusers' modules as they are, each against float32.

    python benchmarks/precision.py [--checkpoint demo] [--normals-checkpoint demo] [--pictures FILE] [--frames 8]
        [--device auto] [--quick]

Of each dtype the mean error of the labels of real frames against diffusers' modules in float32: of depth as AbsRel (of
labels of at least 0.01), of normals in degrees; and how fast the folded network is in each, in turns. Writes
precision.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from depthmill.pipeline.bench.timing import interleave, ratio
from depthmill.pipeline.geometry import processed_size, to_network
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model.backend import named, pick_device
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.single_step import SingleStep, load_heads
from depthmill.pipeline.model.specialize import Specialized
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.types import Modality

OUT = Path(__file__).resolve().parent / "precision.md"
CLIP = Path(__file__).parent.parent / "demo" / "pedestrians.mp4"
BATCH = 8
Network = SingleStep | Specialized
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--normals-checkpoint", default="demo")
    parser.add_argument("--pictures", type=Path, default=CLIP)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="one small frame: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    checkpoints = [
        open_checkpoint(options.checkpoint, "depth"),
        open_checkpoint(options.normals_checkpoint, "normals"),
    ]
    folded = {dtype: Specialized(load_heads(checkpoints), device, dtype) for dtype in DTYPES}
    frames, resolution = (1, 96) if options.quick else (options.frames, checkpoints[0].processing_resolution)
    pictures = read(options.pictures, frames, resolution, folded[torch.float32].factor).to(device)

    def answer(network: Network, dtype: torch.dtype, part: torch.Tensor) -> dict[Modality, torch.Tensor]:
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32  # as labelers have it
        return network(part)

    def labels(network: Network, dtype: torch.dtype) -> dict[Modality, torch.Tensor]:
        parts = [answer(network, dtype, part) for part in pictures.split(BATCH)]
        return {modality: torch.cat([part[modality] for part in parts]) for modality in parts[0]}

    def timed(dtype: torch.dtype, batch: int) -> Callable[[], int]:
        def run() -> int:
            for part in pictures.split(batch):
                answer(folded[dtype], dtype, part)
            return len(pictures)

        return run

    exact = labels(SingleStep(load_heads(checkpoints), device, torch.float32), torch.float32)
    rows = []
    for dtype in DTYPES:
        half = dtype != torch.float32
        found = labels(folded[dtype], dtype)
        plain = labels(SingleStep(load_heads(checkpoints), device, dtype), dtype) if half else exact
        for modality, unit in (("depth", "AbsRel"), ("normals", "degrees")):
            ours, theirs = (error(one[modality], exact[modality], modality) for one in (found, plain))
            compared = f"{theirs:.2e} | {ours / theirs:.2f} | <= 1" if half else "0, the reference | |"
            rows.append(f"| {str(dtype).removeprefix('torch.')} | {modality}, {unit} | {ours:.2e} | {compared} |")
    rounds = 1 if options.quick else 9
    by_batch = [
        interleave({str(dtype): timed(dtype, batch) for dtype in DTYPES}, rounds, device) for batch in (1, BATCH)
    ]
    speeds = [
        f"| {str(dtype).removeprefix('torch.')} | "
        + " | ".join(f"{ratio(spent[str(DTYPES[0])], spent[str(dtype)]):.2f}" for spent in by_batch)
        + " |"
        for dtype in DTYPES[1:]
    ]
    height, width = pictures.shape[2:]
    report = f"""# Half precision

Written by `benchmarks/precision.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()},
{named(device)}, torch {torch.__version__}; frames of {options.pictures.name} as the network sees them,
{len(pictures)} of {width}x{height}, checkpoints {" and ".join(one.name for one in checkpoints)}. Mean error of the
labels against those of diffusers' modules in float32: of depth as AbsRel, of normals as the angle. *Ours* is the folded
network, *diffusers'* its modules as they are.

| dtype | labels | ours | diffusers' | ours over theirs | goal |
| --- | --- | ---: | ---: | ---: | --- |
{chr(10).join(rows)}

How many times as fast as in float32 the folded network is, the dtypes in turn, medians of {rounds} rounds, with the
smallest and the largest:

| dtype | a picture alone | batches of {BATCH} |
| --- | ---: | ---: |
{chr(10).join(speeds)}
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


if __name__ == "__main__":
    main()
