"""The driver against simulated workers: whatever happens to them, each frame ends labelled or listed, and runs end."""

import random
from dataclasses import replace

import pytest

from depthmill.pipeline.errors import (
    ConfigError,
    RunStoppedError,
    SourceError,
    StoreError,
    StoreForbiddenError,
    StoreFullError,
)
from depthmill.tests.workers.simulated import Ledger, SimulatedPool, all_frames, check, drive, labels


def test_all_is_labelled_once_and_the_workers_share_the_work():
    ledger = Ledger({"a": (1000, 10), "b": (7, 10), "c": (300, 10)})
    pool = SimulatedPool(lambda: 4, labels(ledger))
    driver = drive(pool, ledger)
    check(ledger, {})
    assert set(ledger.labelled.values()) == {1}
    assert driver.standing.counts.total == driver.standing.counts.done == 1307
    assert sum(kind == "labeler" for kind in pool.kinds.values()) == 4
    assert pool.clock_s < 1307 * 0.1 / 4 * 1.1 + 2


def test_labelling_starts_before_the_last_source_is_probed():
    ledger = Ledger({f"s{i:03}": (20, 10) for i in range(200)})
    seen = []
    behave = labels(ledger)

    def note(pool, worker, method, argument):
        seen.append(method)
        return behave(pool, worker, method, argument)

    pool = SimulatedPool(lambda: 2, note, load_s=0.1)
    drive(pool, ledger)
    check(ledger, {})
    last_probe = len(seen) - 1 - seen[::-1].index("probe")
    assert "label" in seen[:last_probe]


@pytest.mark.parametrize("outcome", ["die", "hang", RuntimeError("no luck")], ids=["dies", "hangs", "raises"])
@pytest.mark.parametrize("workers", [1, 3])
def test_bad_frames_are_found_and_the_rest_is_labelled(outcome, workers):
    ledger = Ledger({"a": (100, 32), "b": (64, 32), "c": (5, 32)})
    bad = {("a", 0): outcome, ("a", 37): outcome, ("a", 38): outcome, ("b", 63): outcome, ("c", 2): outcome}
    drive(SimulatedPool(lambda: workers, labels(ledger, bad=bad)), ledger, frame_limit_s=1.0)
    check(ledger, bad)
    word = {"die": "dies of it", "hang": "time limit"}.get(outcome, "no luck")
    assert all(word in reason for reason in ledger.failed.values())


def test_a_segment_that_kills_its_workers_only_as_a_whole_says_so():
    """As pictures do that fit into memory a few at a time."""
    ledger = Ledger({"a": (32, 32), "b": (32, 16)})
    behave = labels(ledger)

    def kill(pool, worker, method, argument):
        whole = method in ("label", "try_task") and argument.segment.stop - argument.segment.start == 32
        return (0.1, "die") if whole else behave(pool, worker, method, argument)

    drive(SimulatedPool(lambda: 1, kill), ledger)
    words = "the segment was tried 3 times: its worker dies of it, but of no part of it: is its memory too small"
    assert {words in reason for (source, _), reason in ledger.failed.items()} == {True}
    assert {source for source, _ in ledger.failed} == {"a"}


def test_many_bad_frames_in_a_row_end_too():
    ledger = Ledger({"a": (256, 256)})
    bad = {("a", frame): "die" for frame in range(50, 256)}
    pool = SimulatedPool(lambda: 2, labels(ledger, bad=bad))
    drive(pool, ledger)
    assert set(bad) <= set(ledger.failed)
    assert len(ledger.labelled) >= 40
    assert set(ledger.labelled) | set(ledger.failed) == all_frames(ledger)
    assert len(pool.kinds) < 150


def test_a_single_failure_costs_no_frame():
    ledger = Ledger({"a": (64, 16)})
    behave, left = labels(ledger), [2]

    def once(pool, worker, method, argument):
        if method == "label" and argument.segment.start == 16 and left[0]:
            left[0] -= 1
            return 0.1, "die"
        return behave(pool, worker, method, argument)

    driver = drive(SimulatedPool(lambda: 2, once), ledger)
    check(ledger, {})
    assert driver.standing.deaths == 2
    assert driver.standing.retries == 2


def test_a_retry_goes_to_another_worker():
    ledger = Ledger({"a": (640, 16)})
    behave, tried = labels(ledger), []

    def broken_machine(pool, worker, method, argument):
        if method == "label" and argument.segment.start == 0:
            tried.append(worker)
            if len(tried) == 1:
                return 0.1, RuntimeError("not here")
        return behave(pool, worker, method, argument)

    drive(SimulatedPool(lambda: 3, broken_machine), ledger)
    check(ledger, {})
    assert len(set(tried)) == 2


def test_lost_machines_are_nobodys_fault_and_new_ones_are_used():
    ledger = Ledger({"a": (6400, 16)})
    room = [4]
    chance = random.Random(3)
    pool = SimulatedPool(lambda: room[0], labels(ledger))

    def lose():
        placed = [worker for worker in pool.placed & pool.alive if pool.kinds[worker] == "labeler"]
        if placed:
            pool.lose(chance.choice(placed))
        pool.at(pool.clock_s + 3, lose)

    pool.at(5, lose)
    pool.at(20, lambda: room.__setitem__(0, 8))
    drive(pool, ledger, attempts=2)
    check(ledger, {})
    assert len(pool.placed & pool.alive) >= 6


def test_what_comes_is_used_when_more_is_asked_for():
    ledger = Ledger({"a": (640, 16)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    drive(pool, ledger, workers=64)
    check(ledger, {})
    assert sum(kind == "labeler" for kind in pool.kinds.values()) <= 64


@pytest.mark.parametrize(("race", "alike", "times"), [(True, True, 2), (False, True, 1), (True, False, 1)])
def test_a_straggler_is_raced_and_not_waited_for_where_both_write_the_same(race, alike, times):
    ledger = Ledger({"a": (320, 16)})
    behave = labels(ledger)

    def one_slow_worker(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        return (seconds * 60 if method == "label" and argument.segment.start == 0 and worker < 3 else seconds), answer

    pool = SimulatedPool(lambda: 4, one_slow_worker)
    place = pool._end_in

    def end(seconds, worker, outcome):
        place(seconds, worker, f"batches of {worker}" if outcome == "simulated" and not alike else outcome)

    pool._end_in = end
    driver = drive(pool, ledger, race=race)
    assert set(ledger.labelled) == all_frames(ledger)
    assert max(ledger.labelled.values()) == times
    assert driver.standing.deaths == 0
    assert (pool.clock_s < 30) == (times == 2)


def test_a_segment_that_two_have_labelled_counts_once():
    """The one that was too slow is done, too, while others still work."""
    ledger = Ledger({"a": (320, 16)})
    behave, first = labels(ledger), set()

    def slow(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        if method == "label" and argument.segment.start == 0 and not first:
            first.add(worker)
            return seconds * 10, answer
        return seconds * (25 if method == "label" and argument.segment.start == 160 else 1), answer

    pool = SimulatedPool(lambda: 4, slow)
    driver = drive(pool, ledger)
    assert ledger.labelled["a", 0] == 2
    assert driver.standing.counts.done == driver.standing.labelled == 320
    assert pool.clock_s > 40, "or the run ends before its last segment"


@pytest.mark.parametrize("race", [True, False])
def test_what_a_worker_has_begun_is_done_by_another_only_where_both_write_the_same(race):
    ledger = Ledger({"a": (320, 16)})
    behave, begun, by = labels(ledger), {}, {}

    def one_slow_segment(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        return (seconds * 60 if method == "label" and argument.segment.start == 0 else seconds), answer

    pool = SimulatedPool(lambda: 4, one_slow_segment)
    call = pool.call

    def note(worker, method, *arguments):
        if method == "label":
            by[arguments[0].segment] = worker
            begun.update((task.segment, worker) for task in arguments[1:])
        call(worker, method, *arguments)

    pool.call = note
    drive(pool, ledger, race=race)
    check(ledger, {})
    assert len(begun) > 4
    assert all(by[segment] == worker for segment, worker in begun.items()) == (not race)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_option_that_a_worker_cannot_follow_ends_the_run_and_fails_no_frame(workers):
    ledger = Ledger({"a": (1000, 10), "b": (1000, 10)})
    behave = labels(ledger)

    def refuse(pool, worker, method, argument):
        return (0.1, ConfigError("compile is on")) if method == "label" else behave(pool, worker, method, argument)

    with pytest.raises(ConfigError, match="compile is on"):
        drive(SimulatedPool(lambda: workers, refuse), ledger)
    assert ledger.failed == {}


def test_a_full_disk_stops_the_run_and_says_what_it_takes():
    ledger = Ledger({"a": (1000, 10)})
    behave, calls = labels(ledger), [0]

    def fills(pool, worker, method, argument):
        calls[0] += method == "label"
        if calls[0] > 20:
            return 0.1, StoreFullError("labels.zarr: no space left")
        seconds, answer = behave(pool, worker, method, argument)
        if method == "label":
            answer = type(answer)(**{**vars(answer), "bytes": 10 * 2**20 * answer.labelled})
        return seconds, answer

    with pytest.raises(RunStoppedError, match=r"no space left[\s\S]*800 frames left[\s\S]*7\.81 GiB"):
        drive(SimulatedPool(lambda: 1, fills), ledger)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), StoreFullError("no space left")], ids=["ctrl-c", "full"])
@pytest.mark.parametrize("broken", [False, True], ids=["", "root cannot be written"])
def test_a_run_that_is_stopped_names_all_its_sources_in_the_root(stop, broken):
    ledger = Ledger({f"s{i}": (640, 64) for i in range(20)})
    pool = SimulatedPool(lambda: 2, labels(ledger))
    wait = pool.wait

    def stopping(timeout_s):
        if pool.clock_s > 30:
            assert 0 < len(ledger.published) < 20
            if broken:
                ledger.published = None
            raise stop
        return wait(timeout_s)

    pool.wait = stopping
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else RunStoppedError):
        drive(pool, ledger)
    assert broken or sorted(ledger.published) == sorted(ledger.sources)


def test_a_root_that_cannot_be_written_for_a_while_stops_nothing():
    ledger = Ledger({f"s{i}": (64, 64) for i in range(40)})
    publish, tries = ledger.publish, []

    def away(ids):
        tries.append(len(ids))
        if len(tries) < 4:
            raise StoreError("503")
        publish(ids)

    ledger.publish = away
    drive(SimulatedPool(lambda: 2, labels(ledger)), ledger)
    check(ledger, ())
    assert tries[:4] == [1, 2, 4, 8]


@pytest.mark.parametrize(("until", "raised"), [(4, StoreError), (1e9, StoreError), (1e9, StoreForbiddenError)])
def test_a_segment_is_committed_as_failed_when_the_store_answers(until, raised):
    ledger = Ledger({"a": (64, 8), "b": (64, 8)})
    fail, tries = ledger.fail, []

    def away(task, reason):
        tries.append(task)
        if len(tries) < until:
            raise raised("503")
        return fail(task, reason)

    ledger.fail = away
    bad = {("a", frame): SourceError("broken") for frame in range(8, 16)}
    pool = SimulatedPool(lambda: 2, labels(ledger, bad=bad))
    if until > 100:
        with pytest.raises(RunStoppedError, match=r"503[\s\S]*8 frames left"):
            drive(pool, ledger)
        assert 95 < pool.clock_s < 200 if raised is StoreError else (len(tries) == 1 and pool.clock_s < 95)
    else:
        drive(pool, ledger)
        check(ledger, bad)
    assert len(ledger.labelled) == 120 or raised is StoreForbiddenError, "the others go on meanwhile"


def test_what_workers_warn_of_is_said_once():
    ledger = Ledger({"a": (640, 64)})
    behave = labels(ledger)

    def warn(pool, worker, method, argument):
        seconds, answer = behave(pool, worker, method, argument)
        return seconds, replace(answer, warnings=("not compiled",)) if method == "label" else answer

    drive(SimulatedPool(lambda: 2, warn), ledger)
    assert ledger.said == ["not compiled"]


@pytest.mark.parametrize(("single", "times"), [(8, 0), (20, 1)])
def test_many_inputs_of_one_picture_are_said_once_to_be_slow(single, times):
    ledger = Ledger({"a": (40, 10)} | {f"{i}.jpg": (1, 10) for i in range(single)})
    drive(SimulatedPool(lambda: 2, labels(ledger)), ledger)
    assert sum("give the folder of such pictures as one input" in line for line in ledger.said) == times


def test_a_run_that_waits_says_for_what():
    ledger = Ledger({"a": (40, 10)})
    room = [0]
    pool = SimulatedPool(lambda: room[0], labels(ledger))
    pool.at(200, lambda: room.__setitem__(0, 1))
    drive(pool, ledger, workers=2)
    check(ledger, {})
    assert len(ledger.said) == 3
    assert "2 workers to start" in ledger.said[0]


@pytest.mark.parametrize("seed", range(6))
def test_chaos(seed):
    """Everything at once: bad frames, random deaths, lost machines, stragglers."""
    chance = random.Random(seed)
    ledger = Ledger({f"s{i}": (chance.randint(1, 200), chance.choice([8, 32, 64])) for i in range(12)})
    everything = sorted(all_frames(ledger))
    bad = {frame: chance.choice(["die", "hang", RuntimeError("x")]) for frame in chance.sample(everything, 6)}
    room = [3]
    pool = SimulatedPool(lambda: room[0], labels(ledger, bad=bad, seed=seed, sigma=0.5))

    def shake():
        placed = [worker for worker in pool.placed & pool.alive if pool.kinds[worker] == "labeler"]
        if placed:
            pool.lose(chance.choice(placed))
        room[0] = chance.randint(1, 6)
        pool.at(pool.clock_s + chance.expovariate(1 / 20), shake)

    pool.at(3, shake)
    drive(pool, ledger, frame_limit_s=1.0, race=seed % 2 == 0)
    check(ledger, bad)
