"""Batches: frames of one shape, put together as they come, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from depthmill.pipeline.types import Frame

# Of decoded pictures and packed labels that wait, in one worker: about 500 pictures of 0.3 megapixels, of which ever
# fewer rows are ready to be written the longer the rare shapes wait.
MOST_WAITING_BYTES = 1 << 30


def in_batches(
    frames: Iterable[Frame],
    shape: Callable[[Frame], tuple[int, int]],
    size: int,
    waiting_bytes: Callable[[], int] = lambda: 0,
    most_waiting_bytes: int = MOST_WAITING_BYTES,
) -> Iterator[list[Frame]]:
    """Put frames of one shape together, `size` at a time, in the order in which that many are there.

    While more waits than memory has room for, the shape whose first frame has waited longest goes as it is: its labels
    are what keeps the earliest rows from being written. What is left when the frames end goes in the same order. So
    which frames meet depends on the frames and on `waiting_bytes` alone.

    Args:
        frames: All with pictures; taken one at a time.
        shape: Frames of one shape can share a batch.
        size: Frames in a full batch.
        waiting_bytes: What else waits, as far as the batches yielded before have been dealt with: labels.
        most_waiting_bytes: Most of both, to which the latest frame and its batch's labels may be added.
    """
    buckets: dict[tuple[int, int], list[Frame]] = {}  # in the order of their first frames
    pictures = 0

    def take(key: tuple[int, int]) -> list[Frame]:
        nonlocal pictures
        batch = buckets.pop(key)
        pictures -= sum(frame.nbytes for frame in batch)
        return batch

    for frame in frames:
        key = shape(frame)
        buckets.setdefault(key, []).append(frame)
        pictures += frame.nbytes
        if len(buckets[key]) == size:
            yield take(key)
        while buckets and pictures + waiting_bytes() > most_waiting_bytes:
            yield take(next(iter(buckets)))
    while buckets:
        yield take(next(iter(buckets)))
