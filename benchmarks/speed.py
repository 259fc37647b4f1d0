"""Measure the labeler against diffusers' Marigold pipelines, against many-step ensembles, and against the machine.

    python benchmarks/speed.py [--sizes small demo sd2] [--labels depth] [--dtypes float32] [--compiled] [--quick]

Writes one section a size and device to speed.md; those of other sizes and devices stay. `sd2` has random weights of
Stable Diffusion 2's sizes, made in a temporary directory: 8 GB of memory for each label that is asked for, in float32.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from depthmill.pipeline.bench import peers
from depthmill.pipeline.bench.bench import BATCHED, COMPILED, DOCUMENTED, OURS, Speed, machine, measure_speed
from depthmill.pipeline.bench.timing import interleave, ratio, typical
from depthmill.pipeline.config import DEMO
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.backend import cpu_bfloat16, pick_device
from depthmill.pipeline.model.labeler import Labeler
from depthmill.workers.progress import quiet_libraries

OUT = Path(__file__).resolve().parent / "speed.md"
STABLE_DIFFUSION_2 = scratch.Architecture(
    vae_channels=(128, 256, 512, 512),
    vae_layers=2,
    unet_channels=(320, 640, 1280, 1280),
    unet_layers=2,
    unet_attention=(True, True, True, False),
    head_channels=64,
    cross_attention_dim=1024,
    norm_groups=32,
)
ARCHITECTURES = {"small": scratch.Architecture(), "sd2": STABLE_DIFFUSION_2}
# Height and width of the pictures, and how many are in a batch.
PICTURES = {
    ("small", "cpu"): (96, 128, 8),
    ("demo", "cpu"): (576, 768, 8),
    ("sd2", "cpu"): (576, 768, 1),
    ("small", "cuda"): (576, 768, 8),
    ("demo", "cuda"): (576, 768, 8),
    ("sd2", "cuda"): (576, 768, 16),
}
TITLE = """# Speed: against diffusers, against ensembles, against the machine

Written by `benchmarks/speed.py`, a section a size and device. All alternatives of a row ran in turn in one process, A B
C A B C …, after a round that is not counted (three on CUDA, which record graphs); a ratio is the median over rounds,
with the smallest and the largest.
*Wall* is what a user waits for. *CPU* is the time of the process's own threads, which other work on the machine does
not stretch as much; on a GPU it is the host's and says nothing of the network. A picture's time is from uint8 to labels
of its own size, in all the modalities of the row. On CPUs the process keeps the memory that it frees, as workers do:
diffusers' pipelines profit from that here, and would not by themselves. In half precision on CPUs they stop at their
antialiased resizing, which torch lacks there; here they are given it in float32.

- **as documented**: `pipe(image)`, one picture at a time, each modality by its own pipeline, in one step, same dtype.
- **in batches**: all pictures of the batch at once. **compiled**: the same, after `torch.compile` of UNet and VAE.
- **share of peak**: operations of the network as published (`torch.utils.flop_counter`; an encoder that two modalities
  share once) a second, over those of large matrix products in the same dtype, threads and rounds. What ours spares of
  them (Winograd's products, a UNet that two modalities share) counts as done.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["small", "demo", "sd2"], default=["small", "demo"])
    parser.add_argument("--labels", nargs="+", choices=["depth", "normals", "depth,normals"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="time diffusers compiled, too")
    parser.add_argument("--quick", action="store_true", help="tiny pictures, one round: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    quiet_libraries()
    torch.set_num_threads(cores())
    device = pick_device(options.device)
    # Where a CPU multiplies bfloat16, a run takes that by itself.
    unit = cpu_bfloat16() if device.type == "cpu" else ""
    kind = f"cpu with {unit}" if unit else device.type
    for size in options.sizes:
        text = section(size, device, kind, options)
        if options.quick and options.out == OUT:
            print(text)
        else:
            write_section(options.out, f"{size}, {kind}", text)


def section(size: str, device: torch.device, kind: str, options: Any) -> str:
    height, width, batch = (32, 48, 2) if options.quick else PICTURES[size, device.type]
    rounds = 1 if options.quick else options.rounds
    frames = list(np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8))
    dtypes = options.dtypes or ["float32" if kind == "cpu" else "bfloat16"]
    wanted = options.labels or ["depth", "depth,normals"]
    rows, lines = [], []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        names = checkpoints(size, Path(folder), {label for labels in wanted for label in labels.split(",")}, width)
        for labels in wanted:
            for dtype in dtypes:
                labeler = load_labeler(names, labels, batch, device, dtype)
                speed = measure_speed(labeler, frames, rounds, compiled=options.compiled)
                rows.append(row(labels, dtype, speed))
                seen = labeler.batch_shape(height, width)
                lines.append(f"- {labels}, {dtype}: {machine(labeler.device, labeler.dtype)}")
        many = "" if size == "sd2" else many_steps(names, frames[:1], device, dtypes[0], options.quick)
    return f"""{datetime.date.today()}, {platform.system()}, load average {load:.1f} when it began; {rounds} rounds.
Batches of {batch} pictures of {height}x{width}, seen by the network at {seen[0]}x{seen[1]}.
{chr(10).join(lines)}

| labels | dtype | ours, pictures/s | as documented, wall | CPU | in batches, wall | CPU | compiled, wall | of peak |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}
{many}"""


def checkpoints(size: str, folder: Path, labels: Iterable[str], resolution: int) -> dict[str, str]:
    """Name of the checkpoint of each label; random ones, which share a VAE and no UNet, are made."""
    if size == "demo":
        return dict.fromkeys(labels, DEMO)
    parts = scratch.build(ARCHITECTURES[size], seed=0)
    for seed, label in enumerate(labels):
        if seed:  # a UNet of its own, as published pairs have
            parts = replace(parts, unet=scratch.build(ARCHITECTURES[size], seed=seed).unet)
        # Half-precision files: their weights are random, and both sides load the same.
        scratch.save(parts, folder / label, label, processing_resolution=resolution, dtype=torch.bfloat16)
    return {label: str(folder / label) for label in labels}


def load_labeler(
    names: dict[str, str], labels: str, batch: int, device: torch.device, dtype: str, **more: Any
) -> Labeler:
    wanted = tuple(labels.split(","))
    return Labeler.from_pretrained(
        names.get("depth", DEMO),
        names["normals"] if "normals" in wanted else None,
        labels=wanted,
        batch_size=batch,
        device=str(device),
        dtype=dtype,
        compile="auto",  # as `depthmill label` has it
        **more,
    )


def row(labels: str, dtype: str, speed: Speed) -> str:
    def over(name: str, clock: str = "wall_s") -> str:
        return f"{speed.over(name, clock)}" if name in speed.spent else "not run"

    rate = 1 / speed.picture.wall_s
    return (
        f"| {labels} | {dtype} | {rate:.3g} | {over(DOCUMENTED)} | {over(DOCUMENTED, 'cpu_s')} | {over(BATCHED)} | "
        f"{over(BATCHED, 'cpu_s')} | {over(COMPILED)} | {speed.share:.1%} |"
    )


def many_steps(names: dict[str, str], frames: peers.Pictures, device: torch.device, dtype: str, quick: bool) -> str:
    """One step against 50 steps of an ensemble of 10, depth if it is asked for, one picture: all really done."""
    if "depth" not in names:
        return ""
    steps, members = (2, 3) if quick else (50, 10)
    one = load_labeler(names, "depth", 1, device, dtype)
    one.compile_at_once()
    many = load_labeler(names, "depth", members, device, dtype, steps=steps, ensemble=members, noise="gaussian")
    documented = peers.as_documented(peers.load_pipelines(many), many, frames)
    ways = {OURS: peers.ours(one, frames), "many": peers.ours(many, frames), "theirs": documented}
    rounds = 1 if quick else 3
    spent = interleave(ways, rounds, device)
    lines = [f"| one step, one member | {1e3 * typical(spent[OURS]).wall_s:,.4g} | 1 | 1 |"]
    for name, what in (("many", "ours"), ("theirs", "diffusers, as documented")):
        lines.append(
            f"| {steps} steps, {members} members, {what} | {1e3 * typical(spent[name]).wall_s:,.4g} | "
            f"{ratio(spent[name], spent[OURS]):.0f} | {ratio(spent[name], spent[OURS], 'cpu_s'):.0f} |"
        )
    return f"""
One picture's depth, one step against {steps} steps of an ensemble of {members}, in {dtype}; {rounds} rounds:

| | ms | times, wall | times, CPU |
| --- | ---: | ---: | ---: |
{chr(10).join(lines)}
"""


def sections(path: Path) -> dict[str, str]:
    """Heading -> text of the sections that are there."""
    text = path.read_text() if path.is_file() else ""
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def write_section(path: Path, heading: str, text: str) -> None:
    found = {**sections(path), heading: f"\n{text.strip()}\n"}
    path.write_text(TITLE + "".join(f"\n## {name}\n{found[name].rstrip()}\n" for name in found))


if __name__ == "__main__":
    main()
