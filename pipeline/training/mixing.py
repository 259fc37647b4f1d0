"""Which pictures a micro-batch is made of: a function of its number alone, so that no run has a sampler to remember."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import SampleError, TrainingError
from depthmill.pipeline.training.batch import Batch, TrainingSet

_PERIOD = 100  # micro-batches in which every set has had its share, to a hundredth


def plan(
    sizes: Sequence[int], ratios: Sequence[float], batch_size: int, seed: int, number: int
) -> tuple[int, list[int]]:
    """Which set micro-batch `number` comes from, and which of its pictures.

    Sets come in turn within a period, in an order that is drawn anew for each, every one as often as its ratio says.
    Every picture of a set is shown once before any is shown again, in an order that is drawn anew each time.

    Args:
        sizes: Pictures of each set.
        ratios: Share of each set, relative to the others'.
        batch_size: Pictures in a micro-batch, all from one set: sets differ in size.
        seed: Of the run.
        number: From 0.

    Returns:
        The set's number, and `batch_size` indices into it.
    """
    period, place = divmod(number, _PERIOD)
    turns = _turns(ratios)
    order = np.random.default_rng((seed, 2, period)).permutation(turns)
    which = int(order[place])
    before = period * int((turns == which).sum()) + int((order[:place] == which).sum())  # its micro-batches so far
    first = before * batch_size
    return which, [_shuffled(sizes[which], seed, which, first + i) for i in range(batch_size)]


def _turns(ratios: Sequence[float]) -> npt.NDArray[np.int64]:
    """The set of each turn of a period: shares of `_PERIOD`, by largest remainder, at least one each."""
    exact = np.asarray(ratios, float) / sum(ratios) * _PERIOD
    counts = np.maximum(np.floor(exact).astype(int), 1)
    for i in np.argsort(counts - exact, kind="stable")[: max(_PERIOD - int(counts.sum()), 0)]:
        counts[i] += 1
    while counts.sum() > _PERIOD:
        counts[counts.argmax()] -= 1
    return np.repeat(np.arange(len(ratios)), counts)


def _shuffled(size: int, seed: int, which: int, position: int) -> int:
    epoch, place = divmod(position, size)
    return int(_permutation(size, seed, which, epoch)[place])


@lru_cache(maxsize=16)
def _permutation(size: int, seed: int, which: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, 3, which, epoch)).permutation(size)


def read_usable(pictures: TrainingSet, index: int) -> tuple[Batch, list[str]]:
    """Read a picture, or the next that can be used.

    Returns:
        The picture, B = 1, and why others were passed over; empty if none was.

    Raises:
        TrainingError: If no picture of the set can be used.
    """
    reasons: list[str] = []
    for offset in range(len(pictures)):
        try:
            return pictures.read((index + offset) % len(pictures)), reasons
        except SampleError as error:
            reasons.append(str(error))
    raise TrainingError(
        f"none of the {len(reasons)} pictures of a training set can be used: {'; '.join(reasons[:3])}"
        f"{'; …' if len(reasons) > 3 else ''}"
    )
