"""Showing a run while it goes: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from depthmill.pipeline.errors import printable
from depthmill.pipeline.sources.naming import readable

if TYPE_CHECKING:
    from depthmill.pipeline.types import WorkerState
    from depthmill.workers.resume import Summary
    from depthmill.workers.smooth import SmoothSummary
    from depthmill.workers.standing import Counts

_LINE_EVERY_S = 5.0
_REASONS_SHOWN = 10


@dataclass
class Rate:
    """Frames per second since the first worker was ready: loading a model says nothing of its speed."""

    started_s: float | None = None

    def start(self) -> None:
        """The first worker is ready."""
        self.started_s = self.started_s or time.perf_counter()

    def __call__(self, frames: float) -> float:
        """Frames per second, 0 before the start."""
        elapsed_s = 0.0 if self.started_s is None else time.perf_counter() - self.started_s
        return frames / elapsed_s if elapsed_s > 0 else 0.0


class RunConsole(Console):
    """A console of plain text that a run outlives: neither a log on a full disk ends it, nor a terminal that closes."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`, but names of files in a text mean nothing."""
        super().print(*(Text(printable(one)) if isinstance(one, str) else one for one in objects), **options)

    def __exit__(self, *raised: Any) -> None:
        try:
            super().__exit__(*raised)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Go on in silence; what could not be written is not to be tried again at the end."""
        self.quiet = True
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


def warn(console: Console, line: str) -> None:
    """Say a line that a person should heed; names of files in it may hold bytes that are no UTF-8, and markup."""
    console.print(readable(line), style="yellow", soft_wrap=True, markup=False)


def progress_on(console: Console) -> Progress:
    """A bar that is there while something lasts, on a terminal."""
    return Progress(console=console, disable=not console.is_terminal, transient=True)


Show = Callable[["Counts", Mapping[str, "WorkerState"]], None]
"""Brings a display up to date; the workers' states include the frames of segments that are not committed yet."""


def open_display(console: Console, rate: Rate, doing: str = "labelling") -> AbstractContextManager[Show]:
    """What shows a run on a console: live where it is a terminal, log lines where it is not."""
    return _live(console, rate, doing) if console.is_terminal else _lines(console, rate)


@contextmanager
def _lines(console: Console, rate: Rate) -> Iterator[Show]:
    """A line every few seconds, and a last one at the end."""
    next_s = time.perf_counter() + _LINE_EVERY_S
    last: tuple[Counts, Mapping[str, WorkerState]] | None = None

    def show(counts: Counts, workers: Mapping[str, WorkerState]) -> None:
        nonlocal next_s, last
        last = counts, workers
        if time.perf_counter() >= next_s:
            next_s = time.perf_counter() + _LINE_EVERY_S
            write(counts, workers)

    def write(counts: Counts, workers: Mapping[str, WorkerState]) -> None:
        running = sum(state.frames for state in workers.values())
        speed = rate(counts.done + running)
        left = counts.left - running
        eta = f"{timedelta(seconds=round(left / speed))} left" if speed > 0 else "time left unknown"
        doing = ", ".join(f"{name} {_words(state)}" for name, state in workers.items())
        console.print(
            f"{counts.before + counts.done + running}/{counts.total} frames, {_speed(speed)}, {eta}, "
            f"{counts.failed} failed; {doing}",
            highlight=False,
            soft_wrap=True,
        )

    try:
        yield show
    finally:
        if last is not None and last[0].total:  # else there was nothing to do, which is an error's to say
            write(*last)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_speed(task.fields["rate"]))


@contextmanager
def _live(console: Console, rate: Rate, doing: str) -> Iterator[Show]:
    """A bar for the run and a line for each worker, redrawn in place."""
    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]} failed"),
        console=console,
    )
    task = bar.add_task("", total=None, rate=0.0, failed=0)
    with Live(bar, console=console, refresh_per_second=5) as live:

        def show(counts: Counts, workers: Mapping[str, WorkerState]) -> None:
            running = sum(state.frames for state in workers.values())
            done = counts.done + running
            bar.update(task, total=counts.total, completed=counts.before + done, rate=rate(done), failed=counts.failed)
            table = Table.grid(padding=(0, 2))
            for name, state in workers.items():
                table.add_row(f"  {name}", _words(state))
            live.update(Group(bar, table) if counts.total else table)

        yield show


def _words(state: WorkerState) -> str:
    return f"{state.doing} {state.frames}/{state.of}" if state.of else state.doing


def _speed(rate: float) -> str:
    """Frames a second in words, two digits at least: a large model on a CPU takes minutes a frame."""
    return f"{rate:.1f} frames/s" if rate >= 1 else f"{rate:.2g} frames/s"


def count(number: int, noun: str) -> str:
    """`1 source`, `2 sources`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_summary(summary: Summary) -> None:
    """Say how a run ended, the reasons of its failures most frequent first."""
    console = RunConsole(highlight=False, soft_wrap=True)
    speed = f", {_speed(summary.frames_per_s)} ({summary.device})" if summary.committed else ""
    console.print(
        f"{summary.labelled} of {count(summary.frames, 'frame')} of {count(summary.sources, 'source')} labelled in "
        f"{summary.store}; {summary.committed} done in this run, in {summary.seconds:.1f} s{speed}",
    )
    if summary.failures:
        console.print(f"{count(len(summary.failures), 'failure')}, listed in {summary.store}/failures.jsonl:")
        for reason, times in Counter(failure.reason for failure in summary.failures).most_common(_REASONS_SHOWN):
            console.print(f"  {times} x {reason}")
    if summary.other_failures:
        console.print(
            f"{count(summary.other_failures, 'frame')} of other sources in the store failed earlier: "
            f"{summary.store}/failures.jsonl has them, too",
        )


def print_smoothed(done: SmoothSummary, *, filtered: bool) -> None:
    """Say how a smoothing run ended."""
    console = RunConsole(highlight=False, soft_wrap=True)
    console.print(
        f"{count(len(done.smoothed), 'source')} smoothed in {done.store}; {count(done.frames, 'frame')} done in this "
        f"run{' (one that is solved and filtered counts twice)' if filtered else ''}, in {done.seconds:.1f} s"
    )
    for name, why in {**done.left_out, **done.unread}.items():
        console.print(f"  {name}: {why}")
    if done.unasked:
        shown = ", ".join(done.unasked[:3]) + (" …" if len(done.unasked) > 3 else "")
        console.print(
            f"no videos, and left as they are: {count(len(done.unasked), 'source')}, {shown}; name those that are the "
            "frames of one: depthmill smooth STORE --source ID"
        )


def quiet_libraries() -> None:
    """Keep libraries' chatter off the display; their errors still come as exceptions."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("diffusers", "transformers", "huggingface_hub", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
