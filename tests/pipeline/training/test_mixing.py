from __future__ import annotations

from collections import Counter

import pytest
import torch

from depthmill.pipeline.errors import SampleError, SourceError, StoreError, TrainingError
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.mixing import plan, read_usable


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        ((50, 7), (9, 1)),
        ((50, 7), (0.9, 0.1)),
        ((11, 5, 23), (3, 1, 2.5)),
        ((4,), (0.3,)),
        ((8, 8, 8, 8), (1, 1, 1, 1)),
    ],
)
def test_sets_take_turns_by_ratio_and_show_every_picture_once_before_any_again(
    sizes: tuple[int, ...], ratios: tuple[float, ...]
) -> None:
    shown: list[list[int]] = [[] for _ in sizes]
    turns: Counter[int] = Counter()
    for n in range(300):
        chosen, indices = plan(sizes, ratios, 3, seed=5, n=n)
        assert len(indices) == 3
        turns[chosen] += 1
        shown[chosen] += indices
        for k, ratio in enumerate(ratios):
            assert abs(turns[k] - (n + 1) * ratio / sum(ratios)) <= max(len(sizes) - 1, 1)
    for size, indices in zip(sizes, shown, strict=True):
        epochs = [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_nine_to_one_is_one_in_every_ten() -> None:
    turns = [plan((50, 7), (9, 1), 1, 0, n)[0] for n in range(100)]
    assert all(sum(turns[start : start + 10]) == 1 for start in range(90))


def test_a_batch_is_its_own_whenever_it_is_asked_for() -> None:
    def batches(seed: int, numbers: range) -> list[tuple[int, list[int]]]:
        return [plan((50, 7), (9, 1), 4, seed, n) for n in numbers]

    assert batches(1, range(60, 80)) == batches(1, range(80))[60:]
    assert batches(1, range(20)) != batches(2, range(20))
    assert plan((59_543, 21_260), (9, 1), 2, 0, 10**9)[0] in (0, 1)
    assert plan((50, 50), (1, 1), 50, 0, 0)[1] != plan((50, 50), (1, 1), 50, 0, 1)[1], "each set has its own order"


def test_a_batch_larger_than_its_set() -> None:
    _, indices = plan((3,), (1,), 7, 0, 0)
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]


class Some:
    """Ten pictures, of which those in `broken` cannot be used."""

    modality = "depth"

    def __init__(self, *broken: int) -> None:
        self.broken = broken
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 10

    def read(self, index: int) -> Batch:
        self.reads.append(index)
        if index in self.broken:
            raise SampleError(f"picture {index} is damaged")
        return Batch(torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), float(index)), torch.ones(1, 2, 2).bool())


def test_what_cannot_be_used_is_skipped_once_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    some, skipped = Some(3, 8, 9), dict[int, str]()
    taken = [int(read_usable(some, index, skipped).target[0, 0, 0, 0]) for index in (2, 3, 8, 3, 9)]
    assert taken == [2, 4, 0, 4, 0]
    assert skipped == {i: f"picture {i} is damaged" for i in (3, 8, 9)}
    assert some.reads == [2, 3, 4, 8, 9, 0, 4, 0]
    assert len(caplog.messages) == 3


def test_a_set_without_one_usable_picture_is_an_error() -> None:
    with pytest.raises(
        TrainingError, match=r"not one of the 10 .*\n  picture 0 .*\n  picture 1 .*\n  picture 2 [^\n]*$"
    ):
        read_usable(Some(*range(10)), 4, {})


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), SourceError("no answer"), StoreError("away")])
def test_a_disk_that_does_not_answer_is_asked_again_for_a_minute_and_costs_no_picture(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(Some):
        def read(self, index: int) -> Batch:
            if sum(paused_s) < away_s:
                raise error
            return super().read(index)

    paused_s: list[float] = []
    monkeypatch.setattr("time.sleep", paused_s.append)
    some, skipped, away_s = Away(), dict[int, str](), 40
    assert read_usable(some, 4, skipped).target[0, 0, 0, 0] == 4
    assert not skipped
    paused_s.clear()
    away_s = 100
    with pytest.raises(TrainingError, match=r"for 60 s a picture could not be read \(.*run the same command again"):
        read_usable(some, 4, skipped)
    assert sum(paused_s) == 60
    assert not skipped


def test_an_error_that_is_no_pictures_own_is_not_swallowed() -> None:
    class Gone(Some):
        def read(self, index: int) -> Batch:
            raise TrainingError("the store is gone")

    with pytest.raises(TrainingError, match="the store is gone"):
        read_usable(Gone(), 0, {})
