"""Time a step of training from scratch, by how the network's pictures lie in memory, at each precision.

python benchmarks/training.py [--device auto] [--batch 32] [--rounds 5]

The network and the pictures' size are those of `configs/train-demo.yaml`; a step is the forward and the backward pass
of a batch, on a CPU in two threads, on a GPU as one CUDA graph. Prints, as Markdown, pictures/s of:
- channels first: torch's layout, and its GroupNorm;
- channels last: the other one, and the same GroupNorm;
- kept: channels last, with the norms that `from_scratch/network.py` puts in GroupNorm's place.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from depthmill.pipeline.bench.timing import interleave, ratio, typical
from depthmill.pipeline.config import load_config
from depthmill.pipeline.model.backend import pick_device
from depthmill.pipeline.model.blocks import ChannelsLastNorm, replace
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.from_scratch import network
from depthmill.pipeline.training.from_scratch.config import StagedConfig
from depthmill.pipeline.training.from_scratch.train import _captured, _differentiated, _gradients, _trained
from depthmill.pipeline.training.raycast import Views

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    config = load_config(StagedConfig, CONFIG, {})
    stage = config.stages[-1]
    views = scenes.view(range(arguments.batch), stage.height, stage.width, device=device)
    print(f"{stage.width}x{stage.height}, batches of {arguments.batch}; {where}, torch {torch.__version__}\n")
    print("| mixed precision | layout | pictures/s | times channels first |\n| --- | --- | ---: | ---: |")
    for precision in ("no", "bf16"):
        told = config.model_copy(update={"mixed_precision": precision})
        ways = {name: steps_of(name, told, views, device) for name in ("channels first", "channels last", "kept")}
        spent = interleave(ways, arguments.rounds, device)
        for name, found in spent.items():
            times = ratio(spent["channels first"], found)
            print(f"| {precision} | {name} | {1 / typical(found).wall_s:.1f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
