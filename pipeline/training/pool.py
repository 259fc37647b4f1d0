"""Rendered scenes on disk, so that several epochs, stages and runs share the price of rendering them.

A pool is a folder of shards, each `SHARD` consecutive seeds at one size, of one version of the scenes, or the first few
of them; a shard appears under its name only when it is complete, so that any number of processes may fill one pool and
any may be killed. What a killed one had begun to write goes when the pool is opened an hour later.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from depthmill.pipeline.config import make_folder
from depthmill.pipeline.errors import RunStoppedError, TrainingError
from depthmill.pipeline.room import room_in
from depthmill.pipeline.store import write_atomically
from depthmill.pipeline.training import scenes
from depthmill.pipeline.training.raycast import MEASURED_M, Views

logger = logging.getLogger(__name__)

SHARD = 100
_LEFT_S = 3600  # after which what was being written is no longer: that takes seconds
# One row is one pixel, 8 bytes; float16 keeps depth to 0.05 %, int8 keeps normals to 0.4 degrees.
_PIXEL = np.dtype([("rgb", np.uint8, 3), ("depth", np.float16), ("normals", np.int8, 3)])


@dataclass(frozen=True, eq=False)
class Pool:
    """Rendered scenes of consecutive seeds.

    Attributes:
        paths: Of shards, `SHARD` scenes each, in the order of their seeds; the last may be shorter, or longer than
            asked for.
        count: How many scenes.
        resident: All of them in a GPU's memory, (scenes, H, W, 8) uint8, if they were put there.
    """

    paths: tuple[Path, ...]
    count: int
    resident: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device) -> Pool:
        """The same in a GPU's memory, 150 kB a scene of 120x160, from where it gives its scenes; on a CPU itself."""
        if device.type == "cpu":
            return self
        shards = [_bytes(np.array(_mapped(path))).to(device) for path in self.paths]
        return replace(self, resident=torch.cat(shards)[: self.count])

    def pixels(self, index: int) -> npt.NDArray[np.void]:
        """A scene as it is stored: (H, W) of `_PIXEL`."""
        pixels: npt.NDArray[np.void] = _mapped(self.paths[index // SHARD])[index % SHARD]
        return pixels

    def read(self, indices: npt.NDArray[np.integer]) -> Views:
        """Scenes by index, all at the pool's size."""
        if self.resident is not None:
            raw = self.resident[torch.from_numpy(indices).to(self.resident.device)]
        else:
            raw = _bytes(np.stack([self.pixels(i) for i in indices.tolist()]))
        rgb, depth, normals = raw[..., :3], raw[..., 3:5].contiguous().view(torch.float16)[..., 0].float(), raw[..., 5:]
        mask = depth <= MEASURED_M
        unit = torch.nn.functional.normalize(normals.view(torch.int8).permute(0, 3, 1, 2).float(), dim=1)
        return Views(
            rgb=rgb.permute(0, 3, 1, 2).float() / 255,
            depth=torch.where(mask, depth, torch.inf),
            normals=unit * mask[:, None],
            mask=mask,
        )


def open_pool(
    directory: Path, count: int, height: int, width: int, *, processes: int, first: int = 0, device: str = "cpu"
) -> Pool:
    """Open the scenes of the seeds [first, first + count), rendering those that are missing.

    Args:
        directory: Of the pool; made if missing.
        count: How many scenes.
        height: Rows.
        width: Columns.
        processes: How many processes render, each on one core, or on a GPU what one core makes up.
        first: Seed of the first scene; a multiple of `SHARD`.
        device: Where scenes are rendered; another one's differ in a few pixels.

    Raises:
        ConfigError: If scenes are missing, and the pool cannot be written.
        RunStoppedError: If a process that renders was killed, or the disk is full.
        TrainingError: If a shard is damaged.
    """
    folder = directory / f"v{scenes.VERSION}-{height}x{width}"
    _clear(folder)
    seeds = [range(start, min(start + SHARD, first + count)) for start in range(first, first + count, SHARD)]
    paths = [folder / f"{each.start:07d}.npy" for each in seeds]
    if len(seeds[-1]) < SHARD and not paths[-1].exists():
        paths[-1] = folder / f"{seeds[-1].start:07d}-{len(seeds[-1])}.npy"
    jobs = [(path, each, height, width, device) for path, each in zip(paths, seeds, strict=True)]
    missing = [job for job in jobs if not job[0].exists()]
    random.Random().shuffle(missing)  # processes that fill one pool, as those of a run do, share the work so
    if missing:
        make_folder(folder, "data.pool or the set's path:")
        started = time.monotonic()
        # Spawned, since a forked child of a process that has used OpenMP may hang.
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(processes, mp_context=spawn, initializer=end_with_parent)
        with room_in(directory), executor:
            try:
                # They start with the first job, and inherit this: Ctrl-C, which all get, is for this process to answer.
                heard = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                try:
                    futures = [executor.submit(_fill, *job) for job in missing]
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, heard)
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    pace = done * len(missing[0][1]) / (time.monotonic() - started)
                    logger.info("rendered %d of %d shards, %.1f scenes/s", done, len(missing), pace)
            except BrokenProcessPool as error:
                raise RunStoppedError(
                    "a process that renders scenes was killed: is memory too small? Lower render_processes, and run "
                    "again; rendered scenes stay"
                ) from error
            except BaseException:  # nobody waits for the shards that are left
                for process in (getattr(executor, "_processes", None) or {}).values():  # public from Python 3.14 on
                    process.terminate()
                raise
    for path in paths:
        _mapped(path)
    return Pool(tuple(paths), count)


def render(seeds: Sequence[int], height: int, width: int, device: str = "cpu") -> npt.NDArray[np.void]:
    """Scenes of some seeds as a shard holds them: (len(seeds), H, W) of `_PIXEL`."""
    pixels = np.empty((len(seeds), height, width), _PIXEL)
    views = scenes.view(seeds, height, width, device=torch.device(device))
    pixels["rgb"] = views.frames()
    pixels["depth"] = views.depth.cpu().numpy()
    pixels["normals"] = (views.normals * 127).round().permute(0, 2, 3, 1).cpu().numpy()
    return pixels


@lru_cache(maxsize=512)  # each holds its file open, of which a process may have 1024, as a rule
def _mapped(path: Path) -> npt.NDArray[np.void]:
    try:
        shard: npt.NDArray[np.void] = np.load(path, mmap_mode="r")
    except (EOFError, ValueError) as error:
        raise TrainingError(f"{path} is damaged ({error}): remove it, and its scenes are rendered anew") from error
    return shard


def _bytes(pixels: npt.NDArray[np.void]) -> Tensor:
    """(…) of `_PIXEL` as (…, 8) uint8, without a copy."""
    return torch.from_numpy(pixels.view(np.uint8).reshape(*pixels.shape, _PIXEL.itemsize))


def end_with_parent() -> None:
    """See that this process, which renders or reads, ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _clear(folder: Path) -> None:
    """Remove what killed processes left half written, and nothing that another may still be writing."""
    for left in folder.glob(".*.npy.*/*"):
        with suppress(OSError):  # it is another's, or gone
            if time.time() - left.stat().st_mtime > _LEFT_S:
                left.unlink()
                left.parent.rmdir()


def _fill(path: Path, seeds: range, height: int, width: int, device: str = "cpu") -> None:
    if path.exists():
        return
    torch.set_num_threads(1)
    shard = io.BytesIO()  # to a file itself, numpy does not say that it was the disk that was full
    np.save(shard, render(seeds, height, width, device))
    write_atomically(path, shard.getvalue())
