from collections import Counter

import pytest
import torch

from depthmill.pipeline.errors import SampleError, TrainingError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.mixing import plan, read_usable

SIZES, RATIOS = [70, 40], [9.0, 1.0]


class Numbered:
    """Ten pictures, each of its own number; some cannot be used."""

    modality = "depth"

    def __init__(self, *broken):
        self.broken = broken

    def __len__(self):
        return 10

    def read(self, index):
        if index in self.broken:
            raise SampleError(f"picture {index} is broken")
        return Batch(torch.full((1, 3, 2, 2), float(index)), torch.ones(1, 1, 2, 2), torch.ones(1, 2, 2).bool())


def test_sets_are_drawn_by_ratio_and_every_picture_once_an_epoch():
    drawn = [plan(SIZES, RATIOS, 2, 0, number) for number in range(400)]
    assert Counter(which for which, _ in drawn) == {0: 360, 1: 40}
    for which, size in enumerate(SIZES):
        shown = [index for each, indices in drawn if each == which for index in indices]
        for start in range(0, len(shown) - size + 1, size):
            assert sorted(shown[start : start + size]) == list(range(size))
        assert shown[:size] != shown[size : 2 * size], "each epoch has its own order"


def test_a_plan_is_a_function_of_its_number_and_the_seed():
    assert plan(SIZES, RATIOS, 2, 0, 7) == plan(SIZES, RATIOS, 2, 0, 7)
    assert [plan(SIZES, RATIOS, 2, 0, n) for n in range(20)] != [plan(SIZES, RATIOS, 2, 1, n) for n in range(20)]


@pytest.mark.parametrize("ratios", [[1, 1, 1], [1000, 1], [0.5], [3, 2, 1, 1]], ids=str)
def test_every_set_has_its_turn(ratios):
    counts = Counter(plan([5] * len(ratios), ratios, 1, 0, number)[0] for number in range(100))
    assert sum(counts.values()) == 100
    for which, ratio in enumerate(ratios):
        assert counts[which] == pytest.approx(max(100 * ratio / sum(ratios), 1), abs=1)


def test_what_cannot_be_used_is_passed_over_with_its_reason():
    batch, reasons = read_usable(Numbered(8, 9), 8)
    assert batch.rgb.mean() == 0
    assert reasons == ["picture 8 is broken", "picture 9 is broken"]
    assert read_usable(Numbered(), 3)[1] == []
    with pytest.raises(TrainingError, match=r"none of the 10 pictures .* picture 4 is broken"):
        read_usable(Numbered(*range(10)), 4)
