"""Time a step of training from scratch, by how the network's pictures lie in memory, at each precision.

    python benchmarks/training.py [--device auto] [--batch 32] [--rounds 5] [--quick]

The network and the pictures' size are those of `configs/train-demo.yaml`; a step is the forward and the backward pass
of a batch, on a CPU in two threads, on a GPU as one CUDA graph. Writes training.md, pictures/s of:
- channels first: torch's layout, and its GroupNorm;
- channels last: the other one, and the same GroupNorm;
- kept: channels last, with the norms that `from_scratch/network.py` puts in GroupNorm's place.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from depthmill.pipeline.bench.timing import interleave, ratio, typical
from depthmill.pipeline.config_files import load_config
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model.backend import named, pick_device
from depthmill.pipeline.model.blocks import ChannelsLastNorm, replace
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.from_scratch import network
from depthmill.pipeline.training.from_scratch.config import StagedConfig
from depthmill.pipeline.training.from_scratch.train import _captured, _differentiated, _gradients, _trained
from depthmill.pipeline.training.raycast import Views

OUT = Path(__file__).resolve().parent / "training.md"
CONFIG = Path(__file__).parents[1] / "configs" / "train-demo.yaml"
STEPS = 3  # of each in a round


def plain(norm: network.TurnedNorm | ChannelsLastNorm) -> nn.Module:
    """The GroupNorm that it took the place of."""
    group_norm = nn.GroupNorm(norm.groups, len(norm.weight), norm.eps)
    group_norm.weight, group_norm.bias = norm.weight, norm.bias
    return group_norm


def steps_of(layout: str, config: StagedConfig, views: Views, device: torch.device) -> Callable[[], int]:
    """Something that does `STEPS` steps, and returns how many pictures they were of."""
    net, stage = network.build(config.architecture, 0, device), config.stages[-1]
    if layout != "kept":
        replace(net.modules, network.TurnedNorm, plain)
        replace(net.modules, ChannelsLastNorm, plain)
    if layout == "channels first":
        net.modules.to(memory_format=torch.contiguous_format)
    run = _differentiated(net, stage, config)
    if device.type == "cuda":
        run = _captured(run, views)

    def steps() -> int:
        for _ in range(STEPS):
            _gradients(run, _trained(net, stage), views, config.cpu_threads)
        return STEPS * len(views.rgb)

    return steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small and once: that it runs, not what it says")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    batch, rounds = (2, 1) if options.quick else (options.batch, options.rounds)
    load = os.getloadavg()[0]
    device = pick_device(options.device)
    config = load_config(StagedConfig, CONFIG, {})
    if options.quick:
        config = config.model_copy(update={"stages": config.stages[:1]})
    stage = config.stages[-1]
    views = scenes.view(range(batch), stage.height, stage.width, device=device)
    rows = []
    for precision in ("no", "bf16"):
        told = config.model_copy(update={"mixed_precision": precision})
        ways = {name: steps_of(name, told, views, device) for name in ("channels first", "channels last", "kept")}
        spent = interleave(ways, rounds, device)
        for name, found in spent.items():
            times = ratio(spent["channels first"], found)
            rows.append(f"| {precision} | {name} | {1 / typical(found).wall_s:.1f} | {times} |")
    report = f"""# Training from scratch: a step, by layout and precision

Written by `benchmarks/training.py`, {datetime.date.today()}, on {cores()} cores of {platform.machine()},
{named(device)}, torch {torch.__version__}; load average {load:.1f} when it began. The forward and the backward
pass of a batch of {batch} pictures of {stage.width}x{stage.height}, with the network of `configs/train-demo.yaml`;
medians of {rounds} rounds in turn, with the smallest and the largest. *Kept*: channels last, with the norms that
`from_scratch/network.py` puts in GroupNorm's place; the other two are torch's.

| mixed precision | layout | pictures/s | times channels first |
| --- | --- | ---: | ---: |
{chr(10).join(rows)}
"""
    if options.quick and options.out == OUT:
        print(report)
    else:
        options.out.write_text(report)


if __name__ == "__main__":
    main()
