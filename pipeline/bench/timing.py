"""Alternatives timed in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

Clock = Literal["wall_s", "cpu_s"]


@dataclass(frozen=True)
class Spent:
    """Time of one unit of work.

    Attributes:
        wall_s: Seconds on the clock: what a user waits for; on a shared machine others' work is in it.
        cpu_s: Seconds of this process's threads together; on a GPU, what the host does.
    """

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Ratio:
    """One alternative's time over another's of the same round: the median over rounds, the smallest, the largest."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """The median with its spread, each number as `spec` says; two decimals by default."""
        median, low, high = (format(value, spec or ".2f") for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def interleave(ways: Mapping[str, Callable[[], int]], rounds: int, device: torch.device) -> dict[str, list[Spent]]:
    """Run alternatives in turn, A B C A B C …, after a round that is not counted: first calls allocate and compile.

    Args:
        ways: Name -> what to run; it returns how many units of work it did.
        rounds: Counted ones.
        device: Waited for before the clock is read.

    Returns:
        Name -> for each round the time of one unit.
    """
    for _ in range(3 if device.type == "cuda" else 1):  # CUDA graphs are recorded in the second and third call
        for way in ways.values():
            way()
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            _finish(device)
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            units = way()
            _finish(device)
            spent[name].append(Spent((time.perf_counter() - wall_s) / units, (time.process_time() - cpu_s) / units))
    return spent


def typical(spent: Sequence[Spent]) -> Spent:
    """The median of each clock."""
    return Spent(median(one.wall_s for one in spent), median(one.cpu_s for one in spent))


def ratio(over: Sequence[Spent], under: Sequence[Spent], clock: Clock = "wall_s") -> Ratio:
    """How many times longer `over` takes than `under`, round by round."""
    ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(over, under, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def _finish(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()  # there is one
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
