import random

import numpy as np
import pytest

from depthmill.pipeline.batches import in_batches
from depthmill.pipeline.types import Frame


def frames(shapes):
    """Frames of 3 bytes a pixel, one for each (height, width)."""
    return [Frame(index, np.zeros((*shape, 3), np.uint8)) for index, shape in enumerate(shapes)]


def indices(batches):
    return [[frame.index for frame in batch] for batch in batches]


def shape_of(frame):
    return frame.image.shape[:2]


A, B, C = (1, 10), (10, 1), (2, 5)


def test_shapes_go_as_they_fill_and_what_is_left_in_the_order_of_its_first_frame():
    batches = in_batches(frames([C, A, B, A, B, B, A, C, C]), shape_of, 2)
    assert indices(batches) == [[1, 3], [2, 4], [0, 7], [5], [6], [8]]


def test_when_too_much_waits_the_shape_that_waited_longest_goes():
    batches = in_batches(frames([A, B, B, C, A]), shape_of, 4, most_waiting_bytes=4 * 30)
    assert indices(batches) == [[0, 4], [1, 2], [3]]


def test_labels_that_wait_take_of_the_same_room():
    labels = []
    batches = []
    for batch in in_batches(frames([A, A, B, C, C, C]), shape_of, 2, lambda: sum(labels), most_waiting_bytes=100):
        batches.append([frame.index for frame in batch])
        labels.append(50 * len(batch))
    assert batches == [[0, 1], [2], [3], [4], [5]]


def test_a_frame_is_taken_only_when_the_batches_before_it_are_dealt_with():
    taken = []
    batches = in_batches((taken.append(frame.index) or frame for frame in frames([A, A, A])), shape_of, 2)
    next(batches)
    assert taken == [0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_mixed_or_more_than_there_is_room_for(seed):
    draw = random.Random(seed)
    shapes = [(draw.randint(1, 4), draw.randint(1, 4)) for _ in range(500)]
    given = frames(shapes)
    waiting = set()

    def watched():
        for frame in given:
            assert sum(given[i].image.nbytes for i in waiting) <= 300
            waiting.add(frame.index)
            yield frame

    batches = []
    for batch in in_batches(watched(), shape_of, 8, most_waiting_bytes=300):
        assert len({shape_of(frame) for frame in batch}) == 1
        assert len(batch) <= 8
        waiting.difference_update(frame.index for frame in batch)
        batches.append(batch)
    assert sorted(frame.index for batch in batches for frame in batch) == list(range(500))
