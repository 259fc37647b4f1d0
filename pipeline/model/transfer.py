"""The way to a device and back: pictures go as uint8, labels can come packed as a store keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from depthmill.pipeline.geometry import from_network
from depthmill.pipeline.model.single_step import unit
from depthmill.pipeline.store.layout import DEPTH_INVALID, DEPTH_STEP, NORMALS_FULL_SCALE
from depthmill.pipeline.types import Labels, Modality, NormalsDtype


@dataclass(frozen=True, eq=False)
class Staged:
    """Labels of a frame on their way back; with those before them they are there when `arrived` has happened."""

    labels: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None = None


class Pending:
    """Labels that were asked for: `Labeler.submit`."""

    def __init__(self, staged: Sequence[Staged], asked: torch.cuda.Event | None, seconds: float):
        """The labels of a batch.

        Args:
            staged: One a frame.
            asked: Happens when the device comes to the batch; None where the work is done.
            seconds: That it took to ask for them, or there, to do it.
        """
        self._staged = staged
        self._asked = asked
        self._seconds = seconds

    @property
    def seconds(self) -> float:
        """That the device took; known after `result`."""
        last = self._staged[-1].arrived if self._staged else None
        if self._asked is None or last is None:
            return self._seconds
        return float(self._asked.elapsed_time(last)) / 1e3

    def result(self) -> list[Labels]:
        """Wait for them: one `Labels` a frame, B = 1, at that frame's size."""
        for one in self._staged:
            if one.arrived is not None:
                one.arrived.synchronize()
        done = [{name: label.numpy() for name, label in one.labels.items()} for one in self._staged]
        return [Labels(one.get("depth"), one.get("normals"), one.get("uncertainty")) for one in done]


def to_device(frame: npt.NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """A frame on `device`; to CUDA by way of pinned memory, without waiting until it is there."""
    if device.type == "cuda":
        pinned = torch.empty(frame.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        np.copyto(pinned.numpy(), frame)
        return pinned.to(device, non_blocking=True)
    # torch warns of arrays that cannot be written to, such as views of a Pillow image, though nothing writes here; it
    # refuses those that are read backwards, such as `bgr[..., ::-1]`.
    usable = frame.flags.writeable and min(frame.strides) >= 0
    return torch.from_numpy(frame if usable else frame.copy()).to(device)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event that happens when CUDA has done all that it was asked for so far; None elsewhere.

    Who waits for it sleeps: by itself CUDA would keep a core busy with asking.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def stage(
    answers: Mapping[Modality, torch.Tensor | list[torch.Tensor]],
    uncertainties: list[torch.Tensor] | None,
    sizes: Sequence[tuple[int, int]],
    originals: Sequence[tuple[int, ...]],
    packing: NormalsDtype | None,
) -> list[Staged]:
    """Send a batch's labels on their way back, at the frames' own sizes.

    Args:
        answers: Of each modality, (C, h', w') float32 a frame: the network's.
        uncertainties: The same of the depth's, C = 1, if there are.
        sizes: Height and width of each frame as the network saw it, without the padding.
        originals: Its own.
        packing: As for `Labeler.submit`.
    """
    labels: dict[str, torch.Tensor | list[torch.Tensor]] = dict(answers.items())
    if uncertainties is not None:
        labels["uncertainty"] = uncertainties
    staged = []
    for i, (size, (height, width)) in enumerate(zip(sizes, originals, strict=True)):
        found = {name: from_network(label[i], size, (height, width)) for name, label in labels.items()}  # (C, H, W)
        if "normals" in found:
            found["normals"] = unit(found["normals"]).permute(1, 2, 0)[None]  # (1, H, W, 3)
        if packing is None:
            found = {name: label.contiguous() for name, label in found.items()}
        else:  # x, y and z stay apart in memory, as they are compressed
            found = {
                name: pack_normals(label, packing) if name == "normals" else pack_depth(label)
                for name, label in found.items()
            }
        staged.append(Staged({name: from_device(label) for name, label in found.items()}))
    staged[-1] = replace(staged[-1], arrived=mark(next(iter(labels.values()))[0].device))
    return staged


def from_device(label: torch.Tensor) -> torch.Tensor:
    """A label on the CPU; from CUDA into pinned memory, there once an event recorded after this has happened."""
    if label.device.type != "cuda":
        return label.cpu()
    pinned = torch.empty_strided(label.shape, label.stride(), dtype=label.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(label, non_blocking=True)


def pack_depth(depth: torch.Tensor) -> torch.Tensor:
    """Depth, or its uncertainty, packed to the bit as `store.layout.pack_depth` does it.

    Args:
        depth: float32 in [0, 1], clipped to it; NaN where invalid.

    Returns:
        uint16 of the same shape.
    """
    steps = (depth.clip(0, 1) * (1 / DEPTH_STEP)).round()
    return steps.nan_to_num(nan=DEPTH_INVALID).to(torch.uint16)


def pack_normals(normals: torch.Tensor, dtype: str) -> torch.Tensor:
    """Normals packed to the bit as `store.layout.pack_normals` does it.

    Args:
        normals: (…, 3) float32 vectors that `unit` made: unit, or all three 0 or NaN where invalid.
        dtype: One of `NORMALS_FULL_SCALE`.

    Returns:
        The same shape, of `dtype`.
    """
    full_scale = NORMALS_FULL_SCALE[dtype]
    if full_scale is not None:  # in place: on CPUs each new array costs more than what is done to it
        normals = (normals * full_scale).round_().clip_(-full_scale, full_scale)
    return normals.nan_to_num(nan=0.0).to(getattr(torch, dtype))
