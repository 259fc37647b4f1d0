"""What is made of times: turns, ratios, and the verdict."""

import pytest
import torch

from depthmill.pipeline.bench.feed import Feed
from depthmill.pipeline.bench.timing import Spent, interleave, ratio, typical
from depthmill.pipeline.bench.verdict import judge


def test_alternatives_take_turns_after_a_round_that_does_not_count():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or 4 for name in "ab"}
    spent = interleave(ways, 3, torch.device("cpu"))
    assert calls == list("abababab")
    assert [len(times) for times in spent.values()] == [3, 3]


def test_the_device_that_works_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        interleave({"a": lambda: 1}, 1, torch.device(name))
    assert waited == [torch.device("cuda:1")] * 2 + ["mps"] * 2


def test_a_ratio_is_of_the_same_round():
    slow = [Spent(2.0, 20.0), Spent(8.0, 20.0), Spent(6.0, 20.0)]
    fast = [Spent(1.0, 5.0), Spent(2.0, 5.0), Spent(1.0, 2.0)]
    found = ratio(slow, fast)
    assert (found.median, found.low, found.high) == (4.0, 2.0, 6.0)
    assert f"{found}" == "4.00 (2.00 to 6.00)"
    assert f"{found:.0%}" == "400% (200% to 600%)"
    assert ratio(slow, fast, "cpu_s").high == 10.0
    assert typical(slow) == Spent(6.0, 20.0)


def feed(decode=(0.01, 0.01), label=(0.01, 0.001), write=(0.01, 0.01)):
    return Feed(Spent(*decode), Spent(*label), Spent(*write), Spent(1.0, 1.0), 1.0, bytes=1)


@pytest.mark.parametrize(
    ("measured", "cores", "bound", "needed"),
    [
        (feed(label=(0.05, 0.01)), 4, "device", 0.6),
        (feed(decode=(0.1, 0.2)), 64, "decode", 21.1),
        (feed(write=(0.1, 0.02)), 8, "write", 3.1),
        (feed(decode=(0.009, 0.03), write=(0.009, 0.03)), 4, "cores", 6.1),
    ],
)
def test_beside_a_gpu_the_slowest_part_sets_the_pace(measured, cores, bound, needed):
    found = judge(measured, cores, on_cpu=False)
    assert found.bound == bound
    assert found.cores_needed == pytest.approx(needed)
    assert f"{bound}-bound" in str(found)
    assert f"{needed:.2g} cores" in str(found)


@pytest.mark.parametrize(("label_cpu_s", "bound"), [(0.5, "device"), (0.001, "decode")])
def test_on_the_cpu_what_takes_most_of_its_time_does(label_cpu_s, bound):
    found = judge(feed(decode=(0.01, 0.02), label=(0.3, label_cpu_s)), 2, on_cpu=True)
    assert found.bound == bound
    assert found.cores_needed is None
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("measured", "bound"),
    [
        (feed(label=(0.1, 0.2), write=(2.0, 0.01)), "write"),  # on a slow disk
        (feed(label=(0.1, 0.2), decode=(2.0, 0.01)), "decode"),
        (feed(label=(0.3, 0.3), decode=(0.2, 0.2)), "device"),  # with one thread of two cores
    ],
)
def test_on_the_cpu_one_that_waits_or_works_alone_sets_the_pace(measured, bound):
    assert judge(measured, 2, on_cpu=True).bound == bound
