import io

import pytest
from rich.console import Console

from depthmill.pipeline.types import WorkerState
from depthmill.workers import progress
from depthmill.workers.progress import Rate, open_display
from depthmill.workers.standing import Counts

COUNTS = Counts(total=100, before=20, done=30, failed=2)
WORKERS = {"worker 0": WorkerState("clip[50:60]", 4, 10), "worker 1": WorkerState("idle")}


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


@pytest.fixture
def steady_clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_say_all_there_is_to_know_and_not_too_often(steady_clock):
    out, rate = console(False), Rate()
    rate.start()
    with open_display(out, rate) as show:
        show(COUNTS, WORKERS)
        assert out.file.getvalue() == ""
        steady_clock[0] += 10
        show(COUNTS, WORKERS)
        show(COUNTS, WORKERS)
    first, last = out.file.getvalue().splitlines()
    # 20 of an earlier run, 30 committed, 4 under way; 34 in 10 s; 46 left at that rate.
    assert first == "54/100 frames, 3.4 frames/s, 14 s left, 2 failed; worker 0 clip[50:60] 4/10, worker 1 idle"
    assert last == first


def test_the_live_display_shows_the_same(steady_clock):
    out, rate = console(True), Rate()
    rate.start()
    with open_display(out, rate) as show:
        steady_clock[0] += 10
        show(COUNTS, WORKERS)
    shown = out.file.getvalue()
    for part in ("54/100", "3.4 frames/s", "2 failed", "worker 0", "clip[50:60] 4/10", "worker 1"):
        assert part in shown


def test_the_rate_starts_with_the_first_worker(steady_clock):
    rate = Rate()
    assert rate(50) == 0
    steady_clock[0] += 100  # loading
    rate.start()
    steady_clock[0] += 10
    rate.start()  # a second worker
    assert rate(50) == 5
