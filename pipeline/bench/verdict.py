"""What sets the pace of a run, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthmill.pipeline.bench.feed import Feed

Bound = Literal["device", "decode", "write", "cores"]

ADVICE: dict[Bound, str] = {
    "device": "a faster device, another worker on a further one, or a smaller --processing-resolution",
    "decode": "several workers, each of which reads; or a copy of the input that is cheaper to decode",
    "write": "several workers, each of which writes; or a faster disk for the store",
    "cores": "more CPU cores, or a copy of the input that is cheaper to decode",
}


@dataclass(frozen=True)
class Verdict:
    """What sets the pace of a run of one worker.

    Attributes:
        bound: What does: the device, one reader, one writer, or the cores that all share.
        cores: That a run may use.
        cores_needed: To read and write as fast as a GPU labels, its own host work included; None if the network
            runs on the cores itself.
        shares: Of the CPU's time that each part takes; they add up to 1.
    """

    bound: Bound
    cores: int
    cores_needed: float | None
    shares: dict[str, float]

    def __str__(self) -> str:
        shares = ", ".join(f"{part} {share:.1%}" for part, share in self.shares.items())
        needed = (
            f"Its {self.cores} cores spend their time so"
            if self.cores_needed is None
            else f"To label at the device's rate takes {self.cores_needed:.2g} cores, of {self.cores} here; their time"
        )
        return f"A run here is {self.bound}-bound; what helps: {ADVICE[self.bound]}.\n{needed}: {shares}."


def judge(feed: Feed, cores: int, *, on_cpu: bool) -> Verdict:
    """Say what sets the pace.

    A GPU's labelling, one reader's decoding and one writer's writing go on side by side, each at its own rate, and
    share the cores. Where the network runs on the CPU, it takes its time from the same cores: whichever part takes most
    of that time sets the pace, unless one reader or one writer takes longer than the cores need for all.

    Args:
        feed: As measured.
        cores: That a run may use.
        on_cpu: Whether the network runs on them.
    """
    cpu_s = {"decode": feed.decode.cpu_s, "label": feed.label.cpu_s, "write": feed.write.cpu_s}
    total_s = sum(cpu_s.values())
    frame_s: dict[Bound, float] = {
        "device": feed.label.wall_s,
        "decode": feed.decode.wall_s,
        "write": feed.write.wall_s,
        "cores": total_s / cores,
    }
    if on_cpu:
        cores_s: dict[Bound, float] = {"device": cpu_s["label"], "decode": cpu_s["decode"], "write": cpu_s["write"]}
        busiest = max(cores_s, key=lambda part: cores_s[part])
        # A network waits for nothing: what it takes beyond its CPU time is others' work.
        frame_s["device"] = min(feed.label.wall_s, cpu_s["label"])
        frame_s[busiest] = max(frame_s[busiest], frame_s.pop("cores"))
    return Verdict(
        bound=max(frame_s, key=lambda part: frame_s[part]),
        cores=cores,
        cores_needed=None if on_cpu else total_s / feed.label.wall_s,
        shares={part: spent_s / total_s for part, spent_s in cpu_s.items()},
    )
