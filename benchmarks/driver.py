"""How much a run's driver costs, and how many GPUs it keeps busy: `python benchmarks/driver.py [--quick]`.

Three parts. (1) What a call to a Ray actor costs the driver's process. (2) The plan of 1,000,000 pictures in 10,000
shards, probed by processes: time, driver's time for each segment, driver's memory, beside a tenth of the pictures in as
many shards. (3) The driver against simulated workers on a simulated clock that its own measured time, and (1) for each
call, are added to: lognormal stragglers, nodes of 8 GPUs that are lost and come back; how busy GPUs are kept.
"""

import argparse
import io
import os
import platform
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from depthmill.pipeline.plan import Planned
from depthmill.pipeline.types import Report, WorkerState
from depthmill.tests.workers.simulated import SimulatedPool
from depthmill.workers.driver import Driver
from depthmill.workers.pool import Event
from depthmill.workers.terms import Calls, Options

GPUS_A_NODE = 8
SEGMENT = 64
SIGMA = 0.3  # of the lognormal time of a segment
LOAD_S = 20.0
LOSSES_A_NODE_HOUR = 0.25  # a node is lost every four hours of its life: spot instances
BACK_AFTER_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=100, help="in each shard")
    parser.add_argument(
        "--hours", type=float, default=1.0, help="of simulated work at the first frame time; as many segments at others"
    )
    parser.add_argument("--frame-ms", type=float, nargs="+", default=[100.0, 10.0], help="label time of a picture")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 1000])
    parser.add_argument("--quick", action="store_true", help="few of all: that it runs, not what it says")
    parser.add_argument("--plan", metavar="FOLDER", help=argparse.SUPPRESS)  # the child process of part 2
    options = parser.parse_args()
    if options.plan:
        _plan(Path(options.plan))
        return
    if options.quick:
        options.shards, options.images, options.hours, options.gpus = 40, 20, 0.02, [8, 64]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    call_s, process_s = ray_call()
    print(
        f"a call to a Ray actor takes {call_s * 1e3:.3f} ms of the driver's thread, {process_s * 1e3:.3f} ms of all "
        "threads of its process\n"
    )
    print(f"{'shards':>8} {'pictures':>10} {'segments':>9} {'seconds':>8} {'driver ms/segment':>18} {'driver MB':>10}")
    for images in (max(1, options.images // 10), options.images):
        with tempfile.TemporaryDirectory() as folder:
            _write_shards(Path(folder), options.shards, images)
            here = [sys.executable, __file__, "--plan", folder]
            print(subprocess.run(here, check=True, capture_output=True, text=True).stdout, end="", flush=True)
    print(
        f"\n{'GPUs':>6} {'frame ms':>9} {'busy, all':>10} {'busy, loaded':>13} {'driver ms/segment':>18}"
        f" {'driver load':>12}"
    )
    for frame_ms in options.frame_ms:
        for gpus in options.gpus:
            hours = options.hours * frame_ms / options.frame_ms[0]
            print(simulate(gpus, frame_ms / 1e3, hours, call_s), flush=True)


class _Null:
    """An actor that does nothing."""

    def load(self):
        return "null"

    def node(self):
        return ""

    def label(self, task):
        return Report(task.segment, task.segment.frames, 0)


def ray_call(calls: int = 3000) -> tuple[float, float]:
    """CPU seconds for a call to an actor and its answer, through the pool of real runs: of this thread, of all."""
    import ray

    from depthmill.pipeline.config import LabelConfig
    from depthmill.workers.actors import labelers

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    pool = labelers(LabelConfig(device="cpu", dtype="float32"), "", (), retry_failed=False)
    pool._make = {"labeler": lambda: ray.remote(_Null).options(num_cpus=0, max_concurrency=2).remote()}
    workers = [pool.start("labeler") for _ in range(2)]
    ready = 0
    while ready < len(workers):
        ready += len(pool.wait(1.0))
    task = _planned("s", SEGMENT).task(0)
    started, process_started = time.thread_time(), time.process_time()
    for worker in workers:
        pool.call(worker, "label", task)
    done = 0
    while done < calls:
        for event in pool.wait(1.0):
            done += 1
            pool.call(event.worker, "label", task)
    took, process_took = time.thread_time() - started, time.process_time() - process_started
    pool.close()
    ray.shutdown()
    return took / calls, process_took / calls


def _planned(uri: str, frames: int) -> Planned:
    return Planned(uri, uri, "f" * 64, frames, SEGMENT, 0, 0, ((0, -(-frames // SEGMENT)),))


def _write_shards(folder: Path, shards: int, images: int) -> None:
    """Shards of `images` pictures of 64x64; all are links to one file, since only their names matter here."""
    rng = np.random.default_rng(0)
    first = folder / "shard-00000.tar"
    with tarfile.open(first, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(images):
            data = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(data, "JPEG")
            for name, body in ((f"{number:09}.jpg", data.getvalue()), (f"{number:09}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))
    for shard in range(1, shards):
        os.link(first, folder / f"shard-{shard:05}.tar")


class _ProbingPool:
    """Probers are processes, labelers answer at once: what is left is the driver."""

    def __init__(self, store: str) -> None:
        self._processes = ProcessPoolExecutor(os.cpu_count(), initializer=_open_prober, initargs=(store,))
        self._futures: dict[int, object] = {}
        self._kinds: list[str] = []
        self._answered: list[Event] = []
        self.waited_s = 0.0

    def capacity(self) -> int:
        return 8

    def start(self, kind: str) -> int:
        self._kinds.append(kind)
        self._answered.append(Event(len(self._kinds) - 1, "null"))
        return len(self._kinds) - 1

    def call(self, worker: int, method: str, *arguments: object) -> None:
        argument = arguments[0] if arguments else None
        if method == "probe":
            self._futures[worker] = self._processes.submit(_probe, argument)
        elif method == "label":
            self._answered.append(Event(worker, Report(argument.segment, argument.segment.frames, 0)))
        else:  # a check
            self._answered.append(Event(worker, 1))

    def wait(self, timeout_s: float) -> list[Event]:
        from concurrent.futures import FIRST_COMPLETED, wait

        started = time.perf_counter()
        if not self._answered:
            wait(self._futures.values(), timeout_s, FIRST_COMPLETED)
        for worker, future in list(self._futures.items()):
            if future.done():
                del self._futures[worker]
                self._answered.append(Event(worker, future.result()))
        events, self._answered = self._answered, []
        self.waited_s += time.perf_counter() - started
        return events

    def state(self, worker: int) -> WorkerState:
        return WorkerState("")

    def name(self, worker: int) -> str:
        return f"worker {worker}"

    def stop(self, worker: int) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self._processes.shutdown()


def _open_prober(store: str) -> None:
    global _prober  # noqa: PLW0603 (one in each process)
    from depthmill.pipeline.plan import Prober

    _prober = Prober(store, 1 << 27, 10**7, False)
    _prober.load()


def _probe(uri: str) -> Planned:
    return _prober.probe(uri)


def _plan(folder: Path) -> None:
    """Plan all shards of a folder into a store, and print the figures of this process alone."""
    from depthmill.pipeline.sources import expand_inputs
    from depthmill.pipeline.store import Layout, create

    store = create(folder / "labels.zarr", Layout(segment_frames=SEGMENT), {})
    pool = _ProbingPool(store.uri)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    driver = Driver(
        pool,
        Options(attempts=3, frame_limit_s=60.0, open_limit_s=1800.0, workers=None, probers=2 * (os.cpu_count() or 1)),
        Calls(store.publish, lambda task, why: None, lambda standing: None, print),
        expand_inputs([str(path) for path in sorted(folder.glob("*.tar"))]),
        (),
    )
    driver.run()
    took = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    pool.close()
    standing = driver.standing
    assert not driver.inputs.failures, driver.inputs.failures[:3]
    segments = standing.sources * -(-(standing.counts.total // standing.sources) // SEGMENT)
    own_ms = (took - pool.waited_s) / segments * 1e3
    print(f"{standing.sources:8} {standing.counts.total:10} {segments:9} {took:8.1f} {own_ms:18.3f} {grown:10.1f}")


def simulate(gpus: int, frame_s: float, hours: float, call_s: float) -> str:
    """One line of the table of part 3."""
    chance = random.Random(gpus)
    mean_s = SEGMENT * frame_s
    shard = 16 * SEGMENT
    shards = max(1, round(hours * 3600 / mean_s * gpus / 16))
    room = [gpus]
    offered = [0.0, 0.0]  # GPU seconds that were there until the second

    def behave(pool, worker, method, argument):
        if method == "probe":
            return 1.0, _planned(argument, shard)
        if method != "label":
            return frame_s * argument.frames, argument.frames
        took = mean_s * chance.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)
        return took, Report(argument.segment, SEGMENT, 0)

    pool = SimulatedPool(lambda: room[0], behave, load_s=LOAD_S, real_driver=True, call_s=call_s)

    def resize(by):
        offered[0] += room[0] * (pool.clock_s - offered[1])
        offered[1] = pool.clock_s
        room[0] += by

    def lose():
        node = [worker for worker in sorted(pool.placed & pool.alive) if pool.kinds[worker] == "labeler"]
        first = chance.randrange(max(1, len(node) - GPUS_A_NODE + 1))
        for worker in node[first : first + GPUS_A_NODE]:
            pool.lose(worker)
        resize(-GPUS_A_NODE)
        pool.at(pool.clock_s + BACK_AFTER_S, lambda: resize(GPUS_A_NODE))
        pool.at(pool.clock_s + chance.expovariate(gpus / GPUS_A_NODE * LOSSES_A_NODE_HOUR / 3600), lose)

    if gpus > GPUS_A_NODE:
        pool.at(chance.expovariate(gpus / GPUS_A_NODE * LOSSES_A_NODE_HOUR / 3600), lose)
    calls = Calls(lambda ids: None, lambda task, why: None, lambda standing: None, lambda line: None)
    driver = Driver(pool, Options(3, 60.0, 1800.0, None, 4), calls, (f"s{number}" for number in range(shards)), ())
    driver.run()
    resize(0)
    standing = driver.standing
    segments = shards * 16
    done = segments * mean_s
    return (
        f"{gpus:6} {frame_s * 1e3:9.0f} {done / offered[0]:10.2%} {done / standing.ready_s:13.2%} "
        f"{pool.driver_s / segments * 1e3:18.3f} {pool.driver_s / pool.clock_s:12.1%}"
    )


if __name__ == "__main__":
    main()
