"""Micro-batches, each a function of its number alone: read, cut, flipped, degraded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from depthmill.pipeline.errors import DepthmillError, RunStoppedError, TrainingError
from depthmill.pipeline.training.batch import Batch, TrainingSet, concatenate, cut, flip
from depthmill.pipeline.training.config import Augment, TrainConfig
from depthmill.pipeline.training.degrade import degrade
from depthmill.pipeline.training.mixing import plan, read_usable
from depthmill.pipeline.training.pool import end_with_parent
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.types import Modality


@dataclass(frozen=True, eq=False)
class Loaded:
    """A micro-batch as it comes out of the loader.

    Attributes:
        batch: Pictures and truth.
        skipped: Set and index of the pictures that were newly found unusable, and passed over for others.
    """

    batch: Batch
    skipped: tuple[tuple[int, int], ...]

    def pin_memory(self) -> Loaded:
        """The same in page-locked memory."""
        return Loaded(self.batch.pin_memory(), self.skipped)


class MicroBatches(Dataset[Loaded | DepthmillError]):
    """Item n is micro-batch number n, of however many are asked for, in whatever process."""

    def __init__(self, config: TrainConfig):
        """Open the sets.

        Raises:
            TrainingError: If one of them lacks files.
        """
        # The autoencoder has to draw both; whatever estimates, one.
        modalities: Sequence[Modality] = (
            ("depth", "normals") if config.objective == "autoencoder" else (config.modality,)
        )
        self.sets: list[TrainingSet] = [open_set(each, modality) for each in config.sets for modality in modalities]
        self.ratios = [each.ratio for each in config.sets for _ in modalities]
        self.config = config
        self._skipped: list[dict[int, str]] = [{} for _ in self.sets]

    def __getitem__(self, number: int) -> Loaded | DepthmillError:
        """Micro-batch `number`, or why it cannot be read: what a process raises, torch makes a traceback's text."""
        try:
            return self._read(number)
        except DepthmillError as error:
            return error

    def _read(self, number: int) -> Loaded:
        config = self.config
        which, indices = plan([len(each) for each in self.sets], self.ratios, config.batch_size, config.seed, number)
        rng = np.random.default_rng((config.seed, number))
        unusable = self._skipped[which]
        known = set(unusable)
        parts = [read_usable(self.sets[which], index, unusable) for index in indices]
        batch = concatenate([augmented(part, config.augment, rng) for part in parts])
        return Loaded(batch, tuple((which, index) for index in unusable.keys() - known))


def augmented(batch: Batch, augment: Augment, rng: np.random.Generator) -> Batch:
    """Cut, flip and degrade one picture as the configuration says."""
    if augment.height is not None and augment.width is not None:
        batch = _cut(batch, augment.height, augment.width, float(rng.uniform(augment.smallest_cut, 1)), rng)
    if augment.flip and rng.random() < 0.5:
        batch = flip(batch, torch.tensor([True]))
    return Batch(degrade(batch.rgb, rng), batch.target, batch.mask) if augment.degrade else batch


def _cut(picture: Batch, height: int, width: int, share: float, rng: np.random.Generator) -> Batch:
    """Cut a piece out of a picture: anywhere, or, if that has no truth (only sky, say), around a pixel that has."""
    piece = cut(picture, height, width, share, rng)
    if piece.mask.any():
        return piece
    row, column = rng.choice(picture.mask[0].nonzero().numpy())
    piece = cut(picture, height, width, 1.0, rng, (row, column))
    if piece.mask.any():
        return piece
    # Between the pixels that were taken: at the picture's own size, or larger, all are.
    H, W = picture.mask.shape[1:]
    return cut(picture, height, width, min(1, max(height / H, width / W)), rng, (row, column))


def load(batches: MicroBatches, numbers: Iterable[int], *, workers: int, pin: bool) -> Iterator[Loaded]:
    """Read the micro-batches with these numbers, in this order, ahead of whoever takes them.

    Args:
        batches: The run's.
        numbers: Which.
        workers: Processes that read; 0 reads in this one.
        pin: Put them into page-locked memory, for a GPU.

    Raises:
        TrainingError: If one of them cannot be read.
        RunStoppedError: If a process that reads was killed.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        # Spawned: a forked child of a process that has used OpenMP or CUDA may hang.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=pin,
        worker_init_fn=_begin if workers else None,
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        stream = iter(loader)
    except OSError as error:
        raise TrainingError(
            f"processes that read pictures cannot be started ({error.strerror or error}): see that /dev/shm can be "
            "written, or set loader_workers: 0"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)  # torch's raises wherever the run is by then
    while True:
        try:
            loaded = next(stream)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            said = str(error).partition("\n")[0]
            by_itself = "in DataLoader worker process" in said
            if by_itself or (isinstance(error, RuntimeError) and "DataLoader worker" not in said):
                raise
            raise RunStoppedError(
                f"a process that reads pictures was killed ({said or type(error).__name__}): is memory, or /dev/shm, "
                "too small? Lower loader_workers, and run again to go on from the last saved state"
            ) from error
        if isinstance(loaded, DepthmillError):
            raise loaded
        yield loaded


def _begin(worker: int) -> None:
    torch.set_num_threads(1)
    end_with_parent()  # torch looks whether it has changed since now, which is too late for one that is gone by then
