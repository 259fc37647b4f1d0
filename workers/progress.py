"""Showing a run while it goes: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from depthmill.pipeline.types import WorkerState
    from depthmill.workers.resume import Summary
    from depthmill.workers.standing import Counts

_LINE_EVERY_S = 5.0
_REASONS_SHOWN = 10


@dataclass
class Rate:
    """Frames per second since the first worker was ready: loading a model says nothing of its speed."""

    started_s: float | None = field(default=None)

    def start(self) -> None:
        """The first worker is ready."""
        self.started_s = self.started_s or time.perf_counter()

    def __call__(self, frames: float) -> float:
        """Frames per second, 0 before the start."""
        elapsed_s = 0.0 if self.started_s is None else time.perf_counter() - self.started_s
        return frames / elapsed_s if elapsed_s > 0 else 0.0


class Display(Protocol):
    """What the driver tells of a run."""

    def show(self, counts: Counts, workers: Mapping[str, WorkerState]) -> None:
        """Bring the display up to date; `workers` includes the frames of segments that are not committed yet."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_display(console: Console, rate: Rate, doing: str = "labelling") -> Display:
    """The display for a console: live where it is a terminal, log lines where it is not."""
    return LiveDisplay(console, rate, doing) if console.is_terminal else LineDisplay(console, rate)


class LineDisplay:
    """A line every few seconds, and a last one at the end."""

    def __init__(self, console: Console, rate: Rate):
        self._console = console
        self._rate = rate
        self._next_s = time.perf_counter() + _LINE_EVERY_S
        self._last: tuple[Counts, Mapping[str, WorkerState]] | None = None

    def show(self, counts: Counts, workers: Mapping[str, WorkerState]) -> None:
        """Print a line if the last one is old enough."""
        self._last = (counts, dict(workers))
        if time.perf_counter() >= self._next_s:
            self._next_s = time.perf_counter() + _LINE_EVERY_S
            self._print()

    def _print(self) -> None:
        if self._last is None:
            return
        counts, workers = self._last
        running = sum(state.frames for state in workers.values())
        rate = self._rate(counts.done + running)
        left = counts.total - counts.before - counts.done - running
        eta = f"{left / rate:.0f} s left" if rate > 0 else "time left unknown"
        doing = ", ".join(f"{name} {_words(state)}" for name, state in workers.items())
        self._console.print(
            f"{counts.before + counts.done + running}/{counts.total} frames, {rate:.1f} frames/s, {eta}, "
            f"{counts.failed} failed; {doing}",
            highlight=False,
            soft_wrap=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.fields['rate']:.1f} frames/s")


class LiveDisplay:
    """A bar for the run and a line for each worker, redrawn in place."""

    def __init__(self, console: Console, rate: Rate, doing: str = "labelling"):
        self._rate = rate
        self._bar = Progress(
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]} failed"),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, rate=0.0, failed=0)
        self._live = Live(self._bar, console=console, refresh_per_second=5)

    def show(self, counts: Counts, workers: Mapping[str, WorkerState]) -> None:
        """Redraw."""
        running = sum(state.frames for state in workers.values())
        self._bar.update(
            self._task,
            total=counts.total,
            completed=counts.before + counts.done + running,
            rate=self._rate(counts.done + running),
            failed=counts.failed,
        )
        table = Table.grid(padding=(0, 2))
        for name, state in workers.items():
            table.add_row(f"  {name}", _words(state))
        self._live.update(Group(self._bar, table))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()


def _words(state: WorkerState) -> str:
    return f"{state.doing} {state.frames}/{state.of}" if state.of else state.doing


def count(number: int, noun: str) -> str:
    """`1 source`, `2 sources`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def print_summary(summary: Summary) -> None:
    """Say how a run ended, the reasons of its failures most frequent first."""
    console = Console(highlight=False, soft_wrap=True)
    speed = f", {summary.frames_per_s:.2f} frames/s ({summary.device})" if summary.committed else ""
    console.print(
        f"{summary.labelled} of {count(summary.frames, 'frame')} of {count(summary.sources, 'source')} labelled in "
        f"{summary.store}; {summary.committed} done in this run, in {summary.seconds:.1f} s{speed}",
        markup=False,
    )
    if summary.failures:
        console.print(
            f"{count(len(summary.failures), 'failure')}, listed in {summary.store}/failures.jsonl:", markup=False
        )
        for reason, times in Counter(failure.reason for failure in summary.failures).most_common(_REASONS_SHOWN):
            console.print(f"  {times} x {reason}", markup=False)
    if summary.other_failures:
        console.print(
            f"{count(summary.other_failures, 'frame')} of other sources in the store failed earlier: "
            f"{summary.store}/failures.jsonl has them, too",
            markup=False,
        )


def quiet_libraries() -> None:
    """Keep libraries' chatter off the display; their errors still come as exceptions."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("diffusers", "transformers", "huggingface_hub", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
