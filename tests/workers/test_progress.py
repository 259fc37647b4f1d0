import io
import os
import pty
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from rich.console import Console

from depthmill.pipeline.types import WorkerState
from depthmill.workers import progress
from depthmill.workers.progress import Rate, RunConsole, open_display, warn
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
    assert first == "54/100 frames, 3.4 frames/s, 0:00:14 left, 2 failed; worker 0 clip[50:60] 4/10, worker 1 idle"
    assert last == first


def test_a_slow_run_s_pace_and_its_days_can_be_read(steady_clock):
    out, rate = console(False), Rate()
    rate.start()
    with open_display(out, rate) as show:
        steady_clock[0] += 109
        show(Counts(before=0, done=1, failed=0, total=10_000), {})
    first = out.file.getvalue().splitlines()[0]
    assert first == "1/10000 frames, 0.0092 frames/s, 12 days, 14:44:51 left, 0 failed; "


def test_the_live_display_shows_the_same(steady_clock):
    out, rate = console(True), Rate()
    rate.start()
    with open_display(out, rate) as show:
        steady_clock[0] += 10
        show(COUNTS, WORKERS)
    shown = out.file.getvalue()
    for part in ("54/100", "3.4 frames/s", "2 failed", "worker 0", "clip[50:60] 4/10", "worker 1"):
        assert part in shown


def test_a_warning_names_any_file_as_it_is_called():
    out = console(False)
    warn(out, "caf\udce9[/x].mp4 is left out")
    assert out.file.getvalue() == "caf\\xe9[/x].mp4 is left out\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_where_there_is_nothing_to_label_no_rate_is_shown(terminal):
    out = console(terminal)
    with open_display(out, Rate()) as show:
        show(replace(COUNTS, total=0, before=0, done=0, failed=0), {})
    assert "0/0" not in out.file.getvalue()


def test_the_rate_starts_with_the_first_worker(steady_clock):
    rate = Rate()
    assert rate(50) == 0
    steady_clock[0] += 100  # loading
    rate.start()
    steady_clock[0] += 10
    rate.start()  # a second worker
    assert rate(50) == 5


def test_names_of_files_are_shown_as_they_are_but_for_what_a_terminal_obeys():
    out = RunConsole(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    out.print("left out: [red]:bear:\x1b[2J\x1b]0;title\x07\x9b1m\r.mp4\n\tcaf\u00e9")
    assert out.file.getvalue() == "left out: [red]:bear:\\x1b[2J\\x1b]0;title\\x07\\x9b1m\\x0d.mp4\n        caf\u00e9\n"


@pytest.mark.parametrize("where", ["a full disk", "a closed terminal", "nobody reads"])
def test_a_run_goes_on_when_its_output_cannot_be_written(where):
    code = """
        from depthmill.workers.progress import Rate, RunConsole, open_display, warn
        from depthmill.workers.standing import Counts
        with open_display(RunConsole(), Rate()) as show:
            for done in range(2):
                show(Counts(2, 0, done, 0), {})
        RunConsole().print("all done")
        print("and so on")
    """
    if where == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        other, out = pty.openpty() if where == "a closed terminal" else os.pipe()
        os.close(other)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=out, stderr=subprocess.PIPE, check=False, timeout=60
    )
    os.close(out)
    assert (done.returncode, done.stderr) == (0, b"")
