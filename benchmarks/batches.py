"""Measure how full batches are where pictures differ in size, and what each way of filling them does to the labels.

    python benchmarks/batches.py [--pictures 14]

Writes the tables to batches.md. `coco_sizes.csv` has the sizes of the 5,000 pictures of COCO val2017
(COCO Consortium, from its annotations, CC BY 4.0) and how many have each.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from depthmill.pipeline.batches import MOST_WAITING_BYTES, in_batches
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.evaluation.metrics import angles_deg
from depthmill.pipeline.geometry import from_network, padded_size, processed_size, rounded_size, to_network
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.labeler import open_checkpoints
from depthmill.pipeline.model.single_step import SingleStep, load_heads, unit
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.training import scenes
from depthmill.pipeline.types import Frame

HERE = Path(__file__).resolve().parent
RESOLUTION, FACTOR, BATCH, SHARD = 768, 8, 16, 16
PICTURES = 3 * 4096
LABEL_BYTES = 2 + 3  # of a pixel of depth and normals, packed

Size = tuple[int, int]  # height, width


def mixes() -> dict[str, list[Size]]:
    """Sizes of the pictures of two corpora, in a random order."""
    draw = random.Random(0)
    with (HERE / "coco_sizes.csv").open() as file:
        rows = [[int(value) for value in row] for row in list(csv.reader(file))[1:]]
    coco = draw.choices([(height, width) for width, height, _ in rows], [row[2] for row in rows], k=PICTURES)
    ratios = [2 ** draw.uniform(-1, 1) for _ in range(PICTURES)]
    return {"COCO": coco, "any": [(round((6e5 / ratio) ** 0.5), round((6e5 * ratio) ** 0.5)) for ratio in ratios]}


SHAPES: dict[str, Callable[[int, int], Size]] = {
    "padded to 8": lambda height, width: padded_size(processed_size(height, width, RESOLUTION), 8),
    "padded to 64": lambda height, width: padded_size(processed_size(height, width, RESOLUTION), 64),
    "rounded to twelfths": lambda height, width: rounded_size(height, width, RESOLUTION, FACTOR),
}


class Rows:
    """What a segment's writer would hold: labels of frames whose shard is not complete."""

    def __init__(self, sizes: list[Size]):
        self.bytes_of = [height * width * LABEL_BYTES for height, width in sizes]
        self.missing = [len(sizes[start : start + SHARD]) for start in range(0, len(sizes), SHARD)]
        self.held = [0] * len(self.missing)
        self.waiting_bytes = 0

    def put(self, index: int) -> None:
        """A frame's labels are there."""
        shard = index // SHARD
        self.missing[shard] -= 1
        self.held[shard] += self.bytes_of[index]
        self.waiting_bytes += self.bytes_of[index]
        if not self.missing[shard]:
            self.waiting_bytes -= self.held[shard]


def fill(sizes: list[Size], shape: Callable[[int, int], Size], segment: int, most: int) -> tuple[float, int]:
    """Mean fill of the batches, and the most bytes of pictures and labels that waited at once."""
    batches = peak = 0
    for start in range(0, len(sizes), segment):
        part = sizes[start : start + segment]
        rows, pictures = Rows(part), 0

        def frames(part: list[Size] = part, rows: Rows = rows) -> Iterator[Frame]:
            nonlocal pictures, peak
            for index, size in enumerate(part):
                image = np.broadcast_to(np.uint8(0), (*size, 3))  # its bytes are counted, but not there
                pictures += image.nbytes
                peak = max(peak, pictures + rows.waiting_bytes)
                yield Frame(index, image)

        for batch in in_batches(
            frames(), lambda frame: shape(*frame.image.shape[:2]), BATCH, lambda rows=rows: rows.waiting_bytes, most
        ):
            batches += 1
            for frame in batch:
                pictures -= frame.image.nbytes
                rows.put(frame.index)
    return len(sizes) / (batches * BATCH), peak


def fill_table() -> str:
    corpora = mixes()
    lines = [
        "| shapes | segment | fill, COCO | waiting, COCO | fill, any ratio | waiting, any ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, shape in SHAPES.items():
        for segment in (64, 256, 1024, 2048, 4096):
            for most in (MOST_WAITING_BYTES, 1 << 60) if segment == 2048 else (MOST_WAITING_BYTES,):
                cells = [fill(sizes, shape, segment, most) for sizes in corpora.values()]
                default = name == "rounded to twelfths" and segment == 2048 and most == MOST_WAITING_BYTES
                mark, bound = "**" if default else "", "" if most == MOST_WAITING_BYTES else ", no bound"
                shown = " | ".join(f"{mark}{full:.1%}{mark} | {peak / 2**20:,.0f} MiB" for full, peak in cells)
                lines.append(f"| {mark}{name}{mark} | {segment}{bound} | {shown} |")
    return "\n".join(lines)


def stretched() -> str:
    """How much rounding stretches COCO's pictures, in words."""
    shares = []
    for height, width in mixes()["COCO"]:
        side, exact = min(rounded_size(height, width, RESOLUTION, FACTOR)), min(height, width) / max(height, width)
        shares.append(abs(side / RESOLUTION / exact - 1))
    stretch = np.array(shares)
    mean, most = stretch.mean(), stretch.max()
    return (
        f"Rounded, {np.mean(stretch < 0.005):.0%} of COCO's pictures are stretched by less than 0.5 %, and "
        f"{np.mean(stretch < 0.02):.0%} by less\nthan 2 %; the mean is {mean:.1%}, the most {most:.1%}."
    )


def pictures(count: int) -> list[torch.Tensor]:
    """Crops (H, W, 3) uint8 of the demo's clip and of rendered scenes, their ratios from 1:2 to 2:1."""
    source = open_source(HERE.parent / "demo" / "pedestrians.mp4")
    whole = [torch.from_numpy(frame.image.copy()) for i in (0, 30, 59) for frame in source.read(i, i + 1)]
    source.close()
    whole += list(torch.from_numpy(scenes.view(range(10**6, 10**6 + 4), 576, 768).frames()))
    draw, crops = random.Random(1), []
    for i in range(count):
        picture, ratio = whole[i % len(whole)], 2 ** draw.uniform(-1, 1)
        H, W = picture.shape[:2]
        height, width = min(H, round(W / ratio)), min(W, round(H * ratio))
        top, left = draw.randint(0, H - height), draw.randint(0, W - width)
        crops.append(picture[top : top + height, left : left + width].contiguous())
    return crops


@torch.inference_mode()
def label(network: SingleStep, picture: torch.Tensor, size: Size, multiple: int) -> dict[str, torch.Tensor]:
    answers = network(to_network(picture, size, multiple)[None])
    original = (picture.shape[0], picture.shape[1])
    labels = {name: from_network(answer[0], size, original) for name, answer in answers.items()}
    return labels | ({"normals": unit(labels["normals"])} if "normals" in labels else {})


def nearest(size: Size, factor: int) -> Size:
    """The size that needs no padding and is nearest to one that does."""
    return max(factor, round(size[0] / factor) * factor), max(factor, round(size[1] / factor) * factor)


def change_table(name: str, network: SingleStep, resolution: int, crops: list[torch.Tensor]) -> list[str]:
    """Rows: how far labels are from those at the nearest size that needs no padding."""
    factor = network.factor
    coarse = round(resolution / 12 / factor) * factor
    changes: dict[str, list[list[float]]] = {}
    for crop in crops:
        height, width = crop.shape[:2]
        exact = processed_size(height, width, resolution)
        smaller = nearest(processed_size(height, width, resolution - factor), factor)
        reference = label(network, crop, nearest(exact, factor), factor)
        ways = {
            f"padded to the VAE's {factor}": (exact, factor),
            f"padded to {coarse}": (exact, coarse),
            "rounded to twelfths": (rounded_size(height, width, resolution, factor), factor),
            f"no padding, at {resolution - factor}": (smaller, factor),
        }
        for way, (size, multiple) in ways.items():
            labels = label(network, crop, size, multiple)
            depth = (labels["depth"] - reference["depth"]).abs()
            row = [depth.mean().item(), depth.quantile(0.99).item(), depth.max().item()]
            if "normals" in labels:
                angles = angles_deg(*(one["normals"].flatten(1).T.numpy() for one in (labels, reference)))
                row += [angles.mean(), np.quantile(angles, 0.99)]
            changes.setdefault(way, []).append(row)
    lines = []
    for way, rows in changes.items():
        mean = np.mean(rows, axis=0)
        normals = f"{mean[3]:.2f}° | {mean[4]:.1f}°" if len(mean) == 5 else "|"
        lines.append(f"| {name}, {resolution} | {way} | {mean[0]:.4f} | {mean[1]:.3f} | {mean[2]:.3f} | {normals} |")
    return lines


def change_tables(count: int) -> str:
    crops, device = pictures(count), torch.device("cpu")
    demo = SingleStep(load_heads(open_checkpoints(LabelConfig())), device, torch.float32)
    lines = [
        "| network | pictures are | depth, mean | 99 % | most | normals, mean | 99 % |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for resolution in (128, 256):
        lines += change_table("`demo`", demo, resolution, crops)
    architecture = scratch.Architecture(
        vae_channels=(8, 8, 16, 16),
        unet_channels=(16, 16, 32, 32),
        unet_attention=(True, True, True, False),
        head_channels=8,
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch.create(Path(folder) / "random", architecture, "depth", seed=3, processing_resolution=384)
        config = LabelConfig(checkpoint=str(Path(folder) / "random"), labels=("depth",))
        network = SingleStep(load_heads(open_checkpoints(config)), device, torch.float32)
    lines += change_table("random weights, SD's levels", network, 384, crops[: max(1, count // 4)])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=14)
    options = parser.parse_args()
    text = f"""# Full batches of pictures of many sizes

Written by `benchmarks/batches.py` on {os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}, in
float32.

## Fill

Mean fill of batches of {BATCH} at {RESOLUTION} pixels, by what frames must share to meet in one, and by the frames of a
segment; {PICTURES:,} pictures with the sizes of COCO val2017, which has 603, or of any aspect ratio from 1:2 to 2:1
alike. *Waiting* is the most bytes of decoded pictures and packed labels held at once, bounded to
{MOST_WAITING_BYTES >> 20:,} MiB unless said. The default of a corpus is set in bold.

{fill_table()}

{stretched()}

## Labels

How far the labels of {options.pictures} pictures (the demo's clip and rendered scenes, of aspect ratios from 1:2 to 2:1
alike) are from those at the nearest size that needs no padding: means over the pictures, of depth in [0, 1]. The last
way of each network is a yardstick, a slightly smaller processing resolution. Random weights answer noise, which any
resampling changes.

{change_tables(options.pictures)}
"""
    (HERE / "batches.md").write_text(text)


if __name__ == "__main__":
    main()
