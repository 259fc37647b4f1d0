"""Time depth ensembling beside diffusers', on the same members; prints both and their ratio.

python benchmarks/ensemble.py [--members 10] [--height 576] [--width 768]
"""

from __future__ import annotations

import argparse
import time

import diffusers
import torch
from torch.nn import functional as F

from depthmill.pipeline.model.ensemble import ensemble_depth


def members_of(count: int, height: int, width: int) -> torch.Tensor:
    """One smooth scene seen by `count` estimators, (E, H, W): scale, shift and coarse noise are each one's own."""
    draws = torch.Generator().manual_seed(0)
    scene = F.interpolate(torch.rand(1, 1, 5, 6, generator=draws), (height, width), mode="bicubic")[0]
    wrong = F.interpolate(torch.randn(count, 1, 8, 8, generator=draws), (height, width), mode="bilinear")[:, 0]
    scales, shifts = 0.3 + 0.4 * torch.rand(2, count, 1, 1, generator=draws)
    return (scene * scales + 0.4 * shifts + 0.02 * wrong).clip(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--height", type=int, default=576)
    parser.add_argument("--width", type=int, default=768)
    arguments = parser.parse_args()
    members = members_of(arguments.members, arguments.height, arguments.width)
    seconds = []
    for solve in (ensemble_depth, lambda each: diffusers.MarigoldDepthPipeline.ensemble_depth(each[:, None])):
        started = time.perf_counter()
        solve(members)
        seconds.append(time.perf_counter() - started)
    ours, theirs = seconds
    print(f"depthmill {ours:.2f} s, diffusers {theirs:.2f} s: ratio {theirs / ours:.0f}")


if __name__ == "__main__":
    main()
