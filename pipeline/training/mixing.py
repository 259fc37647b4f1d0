"""Which pictures a training run sees, and when: a function of numbers alone, so that resuming needs no state."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import SampleError, SourceError, StoreError, TrainingError
from depthmill.pipeline.training.batch import Batch, TrainingSet

logger = logging.getLogger(__name__)

_REASONS = 3  # of pictures that cannot be used, named in an error
_PAUSES_S = (1, 2, 4, 8, 15, 30)  # between attempts to read from a disk or network that does not answer


def plan(sizes: Sequence[int], ratios: Sequence[float], batch_size: int, seed: int, n: int) -> tuple[int, list[int]]:
    """What the micro-batch number `n` is made of.

    A batch comes from one set, since pictures of several sets differ in size. The sets take turns as evenly as their
    ratios allow: after any number of batches each of two has had its share to within one batch. Of a set,
    every picture is shown once before any is shown again, in an order drawn anew each time.

    Args:
        sizes: Number of pictures of each set.
        ratios: Share of the batches that each set is to have, in any unit.
        batch_size: Pictures in a batch.
        seed: Of the orders.
        n: From 0.

    Returns:
        The set's number, and the indices of its pictures.
    """
    chosen, before = _turn(tuple(Fraction(ratio) for ratio in ratios), n)
    size = sizes[chosen]
    positions = range(before * batch_size, (before + 1) * batch_size)
    return chosen, [int(_order(seed, chosen, position // size, size)[position % size]) for position in positions]


def _turn(ratios: tuple[Fraction, ...], n: int) -> tuple[int, int]:
    """The set whose turn it is at `n`, and how many turns it had before.

    The first k + 1 sets share m turns of which the first k get floor(m * their share): so the counts after n turns
    follow from the last set to the first, and a turn goes to the first set at which the count of n + 1 turns is higher.
    """
    before, after = n, n + 1
    for k in range(len(ratios) - 1, 0, -1):
        share = sum(ratios[:k]) / sum(ratios[: k + 1])
        earlier_before, earlier_after = int(before * share), int(after * share)
        if earlier_after == earlier_before:
            return k, before - earlier_before
        before, after = earlier_before, earlier_after
    return 0, before


@lru_cache(maxsize=16)
def _order(seed: int, chosen: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, chosen, epoch)).permutation(size)


def read_usable(pictures: TrainingSet, index: int, skipped: dict[int, str]) -> Batch:
    """Read a picture, or the next one of its set that can be used.

    Args:
        pictures: The set.
        index: Of the picture wanted.
        skipped: Pictures of this set that cannot be used, and why: kept by the caller from call to call, and added to.
            Each is logged once and not read again.

    Raises:
        TrainingError: If not one picture of the set can be used, or its disk or network does not answer for a minute.
    """
    for candidate in ((index + i) % len(pictures) for i in range(len(pictures))):
        if candidate in skipped:
            continue
        try:
            return _read(pictures, candidate)
        except SampleError as error:
            skipped[candidate] = str(error)
            logger.warning("left out, and the next one taken: %s", error)
    reasons = "\n".join(f"  {skipped[i]}" for i in sorted(skipped)[:_REASONS])
    raise TrainingError(f"not one of the {len(pictures)} pictures can be used, for reasons such as\n{reasons}")


def _read(pictures: TrainingSet, index: int) -> Batch:
    """Read a picture; what is no fault of its own may pass."""
    pauses_s = iter(_PAUSES_S)
    while True:
        try:
            return pictures.read(index)
        except (OSError, SourceError, StoreError) as error:
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise TrainingError(
                    f"for {sum(_PAUSES_S)} s a picture could not be read ({error}); expected a disk or network that "
                    "answers: run the same command again to go on from the last saved state"
                ) from error
            logger.warning("reading again in %d s: %s", pause_s, error)
            time.sleep(pause_s)
