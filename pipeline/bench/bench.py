"""`depthmill bench`: how fast this machine labels, beside diffusers, beside its own peak, and what holds it up."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from depthmill.pipeline import job
from depthmill.pipeline.bench import peers
from depthmill.pipeline.bench.feed import Feed, first_frames, measure_feed
from depthmill.pipeline.bench.flops import label_flops, matmuls
from depthmill.pipeline.bench.timing import Clock, Ratio, Spent, interleave, ratio, typical
from depthmill.pipeline.bench.verdict import ADVICE, Verdict, judge
from depthmill.pipeline.config import LabelConfig, make_folder
from depthmill.pipeline.machine import cores, keep_freed_memory
from depthmill.pipeline.model.backend import COMPILE_AFTER, cpu_kind, default_threads
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.pipeline.types import Frame, is_corpus

_SIZE = (576, 768)  # of the pictures where no input is given
_BATCHES = 2  # of an input are read, to have one of a shape


OURS, DOCUMENTED, BATCHED, MATMUL = "depthmill", "as documented", "in batches", "matmul"
COMPILED = "in batches, compiled"


@dataclass(frozen=True)
class Speed:
    """The labeler, diffusers' pipelines and matrix products, timed in turn, on pictures that are in memory.

    Attributes:
        spent: Alternative -> for each round, the time of one picture, all its labels; `MATMUL`: of one operation.
        flops: Operations that the labels of a picture need; None of joint checkpoints and of several steps.
        why_not: Why diffusers' pipelines could not be timed; empty if they were.
    """

    spent: Mapping[str, Sequence[Spent]]
    flops: int | None
    why_not: str

    @property
    def picture(self) -> Spent:
        """The labeler's time of one picture."""
        return typical(self.spent[OURS])

    @property
    def peak_flops(self) -> float:
        """Operations a second of large matrix products in the same dtype."""
        return 1 / typical(self.spent[MATMUL]).wall_s

    @property
    def share(self) -> Ratio | None:
        """How much of that peak the labeler reached, as a share of 1."""
        if self.flops is None:
            return None
        each = ratio(self.spent[MATMUL], self.spent[OURS])
        return Ratio(self.flops * each.median, self.flops * each.low, self.flops * each.high)

    def over(self, name: str, clock: Clock = "wall_s") -> Ratio:
        """How many times longer an alternative takes than the labeler."""
        return ratio(self.spent[name], self.spent[OURS], clock)


@dataclass(frozen=True)
class Report:
    """What `depthmill bench` found.

    Attributes:
        machine: Processor, cores, device and dtype, in words.
        batch: Pictures in a batch, and the height and width at which the network sees them, in pixels.
        compiled: Whether it ran compiled.
        speed: Of the labeler.
        feed: Of the parts of a run, and what follows of them; None without an input.
    """

    machine: str
    batch: tuple[int, int, int]
    compiled: bool
    speed: Speed
    feed: tuple[Feed, Verdict] | None

    def __str__(self) -> str:
        number, height, width = self.batch
        how = f"batches of {number}, seen at {width}x{height}"
        if self.compiled:
            how += f", compiled; with --compile auto a run's first {COMPILE_AFTER:,} of a new shape are not"
        return "\n".join([self.machine, how, "", *_lines(self)])


def bench(
    config: LabelConfig,
    uri: str | None = None,
    *,
    frames: int = 64,
    rounds: int = 5,
    folder: Path | None = None,
    compiled: bool = False,
) -> Report:
    """Measure this machine with a run's options.

    Args:
        config: Checkpoints, resolution, device, dtype, batch size, threads.
        uri: An input, or several as `label` takes them, of which the first frames of the first are used; None for
            random pictures, and no feed.
        frames: Of the input that are decoded, and written, in a round, and labelled in a whole run.
        rounds: In which the alternatives take turns.
        folder: Where temporary stores are written; by default where temporary files go.
        compiled: Whether to time diffusers' pipelines compiled, too.

    Raises:
        DepthmillError: If a checkpoint or the input cannot be used.
    """
    threads = config.threads or default_threads()
    torch.set_num_threads(threads)
    if folder is not None:
        make_folder(folder, "--folder")
    checkpoints = open_checkpoints(config)
    with ExitStack() as stack:
        source = None
        labeler = Labeler(checkpoints, config)
        if labeler.device.type == "cpu":
            keep_freed_memory()  # as workers do; before the thread starts that is to share it
        # One for all, as a worker's: CUDA graphs belong to the thread that recorded them.
        thread = stack.enter_context(ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)))
        if uri is None:
            random = np.random.default_rng(0)
            images = list(random.integers(0, 256, (labeler.batch_size, *_SIZE, 3), np.uint8))
            kept = [Frame(index, image) for index, image in enumerate(images)]
        else:
            source = open_source(next(expand_inputs([uri])), max_pixels=config.max_pixels, max_frames=config.max_frames)
            stack.callback(source.close)
            kept = first_frames(source, _BATCHES * labeler.batch_size)
        pictures = [frame.image for frame in kept if frame.image is not None]
        pictures = [image for image in pictures if image.shape == pictures[0].shape]
        pictures = list(islice(cycle(pictures), labeler.batch_size))  # only full batches run compiled
        speed = thread.submit(measure_speed, labeler, pictures, rounds, compiled=compiled).result()
        feed = None
        if source is not None:
            probed = source.probe()
            layout = job.layout(config.model_copy(update={"device": labeler.device.type}))
            of_corpus = layout.corpus_segment_frames
            if of_corpus is not None and is_corpus(probed.kind, probed.frames):  # the few frames measured may be none
                layout = replace(layout, segment_frames=of_corpus)
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="depthmill-bench-", dir=folder)))
            measured = measure_feed(
                source, kept, config, labeler, thread, layout, scratch, frames=frames, rounds=rounds
            )
            feed = measured, judge(measured, cores(), on_cpu=labeler.device.type == "cpu")
        shape = labeler.batch_shape(*pictures[0].shape[:2])
        return Report(machine(labeler.device, labeler.dtype), (len(pictures), *shape), labeler.compiled, speed, feed)


def measure_speed(labeler: Labeler, pictures: peers.Pictures, rounds: int, *, compiled: bool = False) -> Speed:
    """Time the labeler, diffusers' pipelines on the same weights, and matrix products, in turn.

    On CPUs this process keeps the memory that it frees, as workers do, and the pipelines profit from that, too.

    Args:
        labeler: Labels the pictures in one batch.
        pictures: (H, W, 3) uint8, all of one size.
        rounds: Counted ones.
        compiled: Whether to time diffusers' pipelines compiled, too, which takes them minutes to become.
    """
    if labeler.device.type == "cpu":
        keep_freed_memory()
    labeler.compile_at_once()
    ways: dict[str, Callable[[], int]] = {OURS: peers.ours(labeler, pictures)}
    why_not = next(filter(None, map(peers.why_not, labeler.checkpoints)), "")
    if not why_not:
        pipelines = peers.load_pipelines(labeler)
        ways[DOCUMENTED] = peers.as_documented(pipelines, labeler, pictures)
        if len(pictures) > 1:
            ways[BATCHED] = peers.batched(pipelines, labeler, pictures)
        if compiled:
            ways[COMPILED] = peers.batched(peers.load_pipelines(labeler, compiled=True), labeler, pictures)
    ways[MATMUL] = matmuls(labeler.device, labeler.dtype)
    flops = None
    if labeler.sampling.is_single_step and all(one.domain is None for one in labeler.checkpoints):
        flops = label_flops(labeler.checkpoints, *labeler.batch_shape(*pictures[0].shape[:2]))
    return Speed(interleave(ways, rounds, labeler.device), flops, why_not)


def machine(device: torch.device, dtype: torch.dtype) -> str:
    """The hardware and the dtype in words."""
    kind = str(dtype).removeprefix("torch.")
    if device.type == "cuda" and dtype == torch.float32:
        kind += " without TF32, diffusers too"  # a labeler turns it off in the whole process
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return (
        f"{cores()} cores of {platform.processor() or platform.machine()} ({cpu_kind()}), {device} ({where}), "
        f"{kind}, torch {torch.__version__}"
    )


def _lines(report: Report) -> list[str]:
    speed = report.speed
    lines = [f"labeler         {_rate(speed.picture)}"]
    lines += [
        f"diffusers       takes {speed.over(name)} times as long, called {name}"
        for name in (DOCUMENTED, BATCHED, COMPILED)
        if name in speed.spent
    ]
    if speed.why_not:
        lines.append(f"diffusers       not measured: {speed.why_not}")
    if speed.share is None or speed.flops is None:
        lines.append("share of peak   not counted for joint checkpoints and diffusion in several steps")
    else:
        lines.append(
            f"share of peak   {speed.share:.1%} of {speed.peak_flops / 1e12:.3g} TFLOP/s that matrix products reach; "
            f"a picture takes {speed.flops / 1e9:,.4g} GFLOP"
        )
    if report.feed is None:
        return [
            *lines,
            "feed            not measured: give --input, on which reading and writing depend",
            "",
            f"If those keep up, a run here is device-bound; what helps: {ADVICE['device']}.",
        ]
    feed, verdict = report.feed
    lines += [
        f"decode          {_rate(feed.decode)}",
        f"label           {_rate(feed.label)}",
        f"write           {_rate(feed.write)}, {feed.bytes:,} bytes a frame",
        f"whole run       {_rate(feed.run)}; {feed.share:.3f} of the labeler's alone, batches {feed.fill:.0%} full",
        "",
        str(verdict),
    ]
    return lines


def _rate(spent: Spent) -> str:
    return f"{1 / spent.wall_s:,.4g} frames/s, {1e3 * spent.cpu_s:,.4g} ms of CPU a frame"
