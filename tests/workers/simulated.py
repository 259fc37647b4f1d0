"""A pool of workers that exist only on paper, on a clock of its own: for tests and benchmarks of the driver."""

import heapq
import itertools
import random
import time

from depthmill.pipeline.plan import Planned, Task
from depthmill.pipeline.types import Report, Segment, WorkerState
from depthmill.workers.driver import Driver
from depthmill.workers.pool import Event
from depthmill.workers.terms import Calls, Options

_ENDLESS_S = 2e5  # of simulated time: more than any run here takes
NOISE = Task("noise", "f", Segment("noise", 0, 1))  # what `try_noise` is shown as


class SimulatedPool:
    """Workers that take `seconds(worker, method, argument)` for a call, or die or hang in it, or at the store.

    The clock jumps from one end of a call to the next. With `real_driver`, the processor's time that the driver itself
    takes is added to it, as measured.
    """

    def __init__(self, room, behave, load_s=1.0, real_driver=False, call_s=0.0):
        self.room = room  # () -> labelers that there is room for
        self.behave = behave  # (pool, worker, method, argument) -> (seconds, answer, exception, "die", "hang", "stall")
        self.load_s = load_s
        self.clock_s = 0.0
        self.kinds = {}
        self.alive = set()
        self.waiting = []  # started and without room
        self.placed = set()
        self.events = []  # heap of (time, tie, worker, call number, outcome)
        self.current = {}  # worker -> number of its call
        self.numbers = itertools.count()
        self.driver_s = 0.0
        self.call_s = call_s  # what a call costs the driver, beside its own time
        self.calls = 0
        self._left = time.thread_time() if real_driver else None
        self.later = []  # heap of (time, tie, function): what happens to the cluster

    def capacity(self):
        return self.room()

    def at(self, when_s, function):
        heapq.heappush(self.later, (when_s, next(self.numbers), function))

    def start(self, kind):
        worker = len(self.kinds)
        self.kinds[worker] = kind
        self.alive.add(worker)
        self.waiting.append(worker)
        self._place()
        return worker

    def _place(self):
        if not self.waiting:
            return
        self.placed &= self.alive
        labelers = sum(self.kinds[worker] == "labeler" for worker in self.placed)
        still = []
        for worker in self.waiting:
            if worker not in self.alive:
                continue
            if self.kinds[worker] == "labeler" and labelers >= self.room():
                still.append(worker)
                continue
            labelers += self.kinds[worker] == "labeler"
            self.placed.add(worker)
            self._end_in(self.load_s, worker, "simulated")
        self.waiting = still

    def _end_in(self, seconds, worker, outcome):
        number = next(self.numbers)
        self.current[worker] = number
        heapq.heappush(self.events, (self.clock_s + seconds, number, worker, outcome))

    def call(self, worker, method, *arguments):
        assert worker in self.alive, "called after its end"
        assert worker not in self.current, "called while it is busy"
        self.calls += 1
        seconds, outcome = self.behave(self, worker, method, arguments[0] if arguments else NOISE)
        # What follows is begun meanwhile, and the worker may die of it.
        for following in arguments[1:] if method == "label" else ():
            if self.behave(self, worker, "try_task", following)[1] == "die":
                outcome = "die"
        self._end_in(float("inf") if outcome in ("hang", "stall") else seconds, worker, outcome)

    def lose(self, worker):
        """Its machine goes."""
        if worker in self.alive and worker in self.placed:
            self._end_in(0.0, worker, "lost")

    def wait(self, timeout_s):
        if self._left is not None:
            took = time.thread_time() - self._left + self.calls * self.call_s
            self.calls = 0
            self.driver_s += took
            self.clock_s += took
        end = self.clock_s + timeout_s
        found = []
        while not found:
            following = min(self.events[0][0] if self.events else end, self.later[0][0] if self.later else end, end)
            self.clock_s = max(self.clock_s, following)
            while self.later and self.later[0][0] <= self.clock_s:
                heapq.heappop(self.later)[2]()
            while self.events and self.events[0][0] <= self.clock_s:
                _, number, worker, outcome = heapq.heappop(self.events)
                if worker in self.alive and self.current.get(worker) == number:
                    del self.current[worker]
                    found.append(self._event(worker, outcome))
            self._place()
            if self.clock_s >= end:
                break
        if self._left is not None:
            self._left = time.thread_time()
        return found

    def _event(self, worker, outcome):
        if outcome in ("die", "lost"):
            self.alive.discard(worker)
            return Event(worker, error=RuntimeError("the actor died"), died=True, lost=outcome == "lost")
        return Event(worker, error=outcome) if isinstance(outcome, Exception) else Event(worker, outcome)

    def state(self, worker):
        """It gets on as time passes, unless it hangs, at a frame of a source that it has opened."""
        outcomes = [outcome for end, _, of, outcome in self.events if end == float("inf") and of == worker]
        return WorkerState("busy", steps=1 if outcomes else int(self.clock_s * 1000), storing=outcomes == ["stall"])

    def name(self, worker):
        return f"worker {worker}"

    def stop(self, worker):
        self.alive.discard(worker)
        self.current.pop(worker, None)

    def now(self):
        return self.clock_s

    def close(self):
        self.alive.clear()


class Ledger:
    """What a store would know: which frames were committed, how, and by how many."""

    def __init__(self, sources):
        """`sources`: uri -> (frames, frames in a segment)."""
        self.sources = sources
        self.labelled = {}  # (uri, frame) -> times
        self.failed = {}  # (uri, frame) -> reason
        self.published = []
        self.said = []

    def publish(self, ids):
        self.published.extend(ids)

    def planned(self, uri):
        frames, length = self.sources[uri]
        return Planned(uri, uri, "f", frames, length, 0, 0, ((0, -(-frames // length)),))

    def commit(self, task):
        skip = dict(task.skip)
        for frame in range(task.segment.start, task.segment.stop):
            if frame in skip:
                self.failed[task.uri, frame] = skip[frame]
            else:
                self.labelled[task.uri, frame] = self.labelled.get((task.uri, frame), 0) + 1
        labelled = task.segment.frames - len(skip)
        return Report(task.segment, labelled, len(skip), slots=task.segment.frames)

    def fail(self, task, reason):
        for frame in range(task.segment.start, task.segment.stop):
            self.failed[task.uri, frame] = reason
        return Report(task.segment, 0, task.segment.frames)


def all_frames(ledger):
    return {(uri, frame) for uri, (frames, _) in ledger.sources.items() for frame in range(frames)}


def check(ledger, bad):
    """Every frame is labelled, but the bad ones, which are listed."""
    assert set(ledger.failed) == set(bad)
    assert set(ledger.labelled) == all_frames(ledger) - set(bad)
    assert sorted(ledger.published) == sorted(ledger.sources)


def drive(pool, ledger, *, workers=None, attempts=3, frame_limit_s=10.0, probers=2, race=True, uris=None):
    """Run the driver to its end; the driver."""

    def stopped():
        assert pool.clock_s < _ENDLESS_S, "the run does not end"
        return False

    calls = Calls(ledger.publish, ledger.fail, lambda standing: None, ledger.said.append, stopped)
    options = Options(attempts, frame_limit_s, 30 * frame_limit_s, workers, probers, race=race)
    driver = Driver(pool, options, calls, iter(ledger.sources) if uris is None else uris, ())
    driver.run()
    return driver


def labels(ledger, frame_s=0.1, bad=(), seed=0, sigma=0.0):
    """A `behave`: `bad` maps (uri, frame) to "die", "hang" or an exception that reading the frame ends in."""
    bad = dict(bad)
    chance = random.Random(seed)

    def behave(pool, worker, method, argument):
        if method == "probe":
            return 0.01, bad.get(argument) or ledger.planned(argument)
        skipped = dict(argument.skip)
        frames = range(argument.segment.start, argument.segment.stop)
        for done, frame in enumerate(frames):
            outcome = bad.get((argument.uri, frame))
            if outcome is not None and frame not in skipped:
                return frame_s * done, outcome
        seconds = frame_s * len(frames) * chance.lognormvariate(0.0, sigma)
        return seconds, ledger.commit(argument) if method == "label" else len(frames)

    return behave
