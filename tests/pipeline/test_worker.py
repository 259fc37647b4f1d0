import gc
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from depthmill.pipeline import stages
from depthmill.pipeline import store as stores
from depthmill.pipeline import worker as pipeline_worker
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError, SourceChangedError, SourceError
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.plan import Task
from depthmill.pipeline.sources import open_source, opened
from depthmill.pipeline.sources import video as video_source
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.stages import Labelled
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.worker import Worker
from depthmill.tests import media
from depthmill.tests.pipeline.store.samples import files

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze  # which conftest.py has do nothing


@pytest.fixture
def config(checkpoints):
    names = {"checkpoint": str(checkpoints / "depth"), "normals_checkpoint": str(checkpoints / "normals")}
    return LabelConfig(**names, device="cpu", dtype="float32", batch_size=3, threads=1)


@pytest.fixture
def video(tmp_path):
    return media.write_video(tmp_path / "clip.mp4", frames=30)


@pytest.fixture
def start(config, video, tmp_path, loaded_once):
    """A loaded worker with a store of its own, and the tasks that make up the video."""
    workers = []

    def start(name):
        source = open_source(str(video)).probe()
        store = stores.create(tmp_path / name, Layout(shard_frames=4, segment_frames=8), {})
        store.add(source)
        workers.append(Worker(config, store.uri, tuple(one.sha256 for one in open_checkpoints(config))))
        workers[-1].load()
        return workers[-1], [Task(str(video), source.fingerprint, segment) for segment in store.segments(source.id)]

    yield start
    for worker in workers:
        worker.close()
    assert not [one.name for one in threading.enumerate() if one.name.startswith("depthmill-")]


def _wait_until(true, most_s=30.0):
    """Whether something is true in time."""
    until = time.monotonic() + most_s
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


@pytest.fixture
def thawed(monkeypatch):
    """As in a process of its own: nothing is frozen before a worker does it."""
    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    gc.unfreeze()
    yield
    gc.freeze()


def test_what_is_loaded_is_kept_out_of_full_collections_until_the_end(start, thawed):
    assert gc.get_freeze_count() == 0
    worker, _ = start("store")
    assert gc.get_freeze_count() > 100_000  # torch's and the network's; going through them stops all threads
    worker.close()
    assert gc.get_freeze_count() == 0


def test_other_weights_under_the_same_name_are_refused(start, config):
    worker, _ = start("store")
    other = Worker(config, worker._store_uri, ("0" * 64,) * 2)
    with pytest.raises(CheckpointError, match=r"has sha256 .* and 000000000000… where the run was started"):
        other.load()
    other.close()


def test_labels_are_the_same_whether_or_not_the_next_task_was_begun(start, tmp_path):
    alone, tasks = start("alone")
    for task in tasks:
        alone.label(task)
    told, tasks = start("told")
    reports = [told.label(task, following) for task, following in zip(tasks, [*tasks[1:], None], strict=True)]
    assert [report.segment for report in reports] == [task.segment for task in tasks]
    assert sum(report.labelled for report in reports) == 30
    assert files(tmp_path / "told") == files(tmp_path / "alone")


def test_what_was_begun_is_not_seen_and_dropped_for_another_task(start, tmp_path):
    worker, tasks = start("some")
    worker.label(tasks[0], tasks[1])
    worker._next.labelled.result()  # all of it but the commit
    assert len(stores.open_store(tmp_path / "some").pending(tasks[0].segment.source_id)) == len(tasks) - 1
    worker.label(tasks[3], tasks[2])
    worker.label(tasks[1])
    worker.label(tasks[2])
    assert stores.open_store(tmp_path / "some").pending(tasks[0].segment.source_id) == []
    whole, tasks = start("whole")
    for task in tasks:
        whole.label(task)
    assert files(tmp_path / "some") == files(tmp_path / "whole")


def test_what_was_begun_is_dropped_for_a_search(start):
    worker, tasks = start("some")
    worker.label(tasks[0], tasks[1])
    begun = worker._next
    assert worker.try_task(tasks[3]) == tasks[3].frames
    assert begun._dropped
    assert worker._next is None


@pytest.mark.parametrize(("value", "fit"), [(1.0, 1), (np.nan, 0)])
def test_noise_tells_whether_the_device_can_do_anything(start, monkeypatch, value, fit):
    worker, _ = start("some")
    answer = type(worker._labeler).__call__
    spoilt = lambda *given: replace(answer(*given), depth=value * answer(*given).depth)  # noqa: E731
    monkeypatch.setattr(type(worker._labeler), "__call__", spoilt)
    assert worker.try_noise() == fit


def test_a_source_that_is_open_is_a_step(start, monkeypatch):
    worker, tasks = start("some")
    states, opened = [], []
    worker.on_state = states.append
    real = OpenSources.open
    monkeypatch.setattr(OpenSources, "open", lambda *given: opened.append(worker.state().steps) or real(*given))
    for call, name in ((worker.try_task, f"searching {tasks[0]}"), (worker.label, str(tasks[0]))):
        states.clear()
        call(tasks[0])
        steps = [state.steps for state in states if state.doing == name]
        assert steps == sorted({0, *steps})
        assert len(steps) == 2 + 8 + 3  # closed, and open; each frame, and each batch
    assert opened == [0, 0]


@pytest.mark.parametrize("at", ["read", "clear_partial", "write"])
def test_a_worker_says_that_it_waits_for_the_store(start, video, monkeypatch, at):
    """A hard mount does not answer: at the files of the source, at what was left of the segment, at a shard."""
    worker, tasks = start("some")
    hangs, goes_on, real = threading.Event(), threading.Event(), getattr(LocalDirectory, at)

    def hang(*given):
        hangs.set()
        goes_on.wait()
        return real(*given)

    monkeypatch.setattr(LocalDirectory, at, hang)
    call = threading.Thread(target=worker.label, args=(tasks[0], tasks[1]))
    call.start()
    hangs.wait()
    stuck = _wait_until(lambda: worker.state().storing)
    goes_on.set()
    call.join()
    assert stuck
    assert _wait_until(lambda: not worker.state().storing)  # the second task may be at it


@pytest.mark.parametrize("at", ["reading", "labelling"])
def test_a_worker_that_hangs_elsewhere_does_not_say_that_it_waits_for_the_store(start, monkeypatch, at):
    worker, tasks = start("some")
    hangs, goes_on = threading.Event(), threading.Event()
    where = (OpenSources, "open") if at == "reading" else (Labeler, "submit")
    real = getattr(*where)

    def hang(*given, **how):
        hangs.set()
        goes_on.wait()
        return real(*given, **how)

    monkeypatch.setattr(*where, hang)
    call = threading.Thread(target=worker.label, args=(tasks[0],))
    call.start()
    hangs.wait()
    said = _wait_until(lambda: worker.state().storing, 0.3)
    goes_on.set()
    call.join()
    assert not said


def test_frames_that_wait_for_their_commit_stay_done_while_the_next_task_is_labelled(start, monkeypatch):
    worker, tasks = start("store")
    shown, real = [], Labelled.commit
    worker.on_state = shown.append

    def commit(labelled):
        assert _wait_until(worker._next.labelled.done)
        assert worker.state().steps > shown[-1].steps  # it does not hang
        return real(labelled)

    monkeypatch.setattr(Labelled, "commit", commit)
    worker.label(tasks[0], tasks[1])
    assert {state.doing for state in shown} == {str(tasks[0].segment)}
    frames = [state.frames for state in shown]
    assert frames == sorted(frames)


def test_frames_that_are_passed_over_are_steps(start, video, monkeypatch):
    media.write_video(video, frames=30, gop=1000)
    worker, tasks = start("some")
    states, first, real = [], [], stages.read_segment

    def watched(*given):
        for frame in real(*given):
            first.append(worker.state())
            yield frame

    monkeypatch.setattr("depthmill.pipeline.worker.read_segment", watched)
    worker.label(tasks[3], tasks[2])  # which is begun from the keyframe again, and says nothing while the first goes on
    assert (first[0].doing, first[0].frames, first[0].steps >= 24) == (str(tasks[3]), 0, True)
    worker.on_state = states.append
    worker.label(tasks[2])
    assert (states[0].doing, states[0].steps >= 16) == (str(tasks[2]), True)
    states.clear()
    worker.try_task(tasks[1])
    assert [state.steps >= 8 for state in states if state.doing != "idle"][:3] == [False, False, True]


def test_what_was_begun_is_no_longer_being_opened_when_it_is_called_for(start, monkeypatch):
    worker, tasks = start("some")
    commit, states = Labelled.commit, []

    def late(self):
        states.append(worker.state())
        if worker._next is not None:
            worker._next.labelled.result()  # all of it but the commit
        return commit(self)

    monkeypatch.setattr(Labelled, "commit", late)
    worker.label(tasks[0], tasks[1])
    worker.label(tasks[1])
    assert (states[1].doing, states[1].steps > 0) == (str(tasks[1]), True)
    assert worker.state().doing == "idle"


def test_what_goes_wrong_is_said_of_the_task_that_it_went_wrong_with(start):
    worker, tasks = start("some")
    gone = Task(tasks[1].uri, "another fingerprint", tasks[1].segment)
    elsewhere = Task(str(tasks[1].uri) + "-gone.mp4", tasks[1].fingerprint, tasks[1].segment)
    assert worker.label(tasks[0], elsewhere).labelled == 8
    with pytest.raises(SourceError, match="gone"):
        worker.label(elsewhere, tasks[1])
    assert worker.label(tasks[1]).labelled == 8
    worker.try_task(tasks[2])
    fresh, _ = start("fresh")
    with pytest.raises(
        SourceError, match=r"changed since it was labelled, or was to be; .* put it back, or label it anew"
    ):
        fresh.label(gone)


def test_a_thread_that_cannot_be_started_fails_what_it_was_for(start, monkeypatch):
    worker, tasks = start("some")
    real, left = pipeline_worker.Prefetch, [1]

    def prefetch(*arguments):
        left[0] -= 1
        if left[0] == -1:  # begun by whoever has read the task before
            raise RuntimeError("can't start new thread")
        return real(*arguments)

    monkeypatch.setattr(pipeline_worker, "Prefetch", prefetch)
    assert worker.label(tasks[0], tasks[1]).labelled == 8
    with pytest.raises(RuntimeError, match="can't start new thread"):
        worker.label(tasks[1], tasks[2])
    assert worker.label(tasks[2]).labelled == 8
    assert worker.label(tasks[1]).labelled == 8


@pytest.mark.parametrize("call", ["label", "try_task"])
def test_a_source_that_changed_is_not_committed_and_is_opened_anew(start, monkeypatch, call):
    worker, tasks = start("some")
    opens = []
    monkeypatch.setattr(opened, "open_source", lambda *given, **how: opens.append(1) or open_source(*given, **how))
    worker.label(tasks[0])

    def changed(*_):
        raise SourceChangedError("another one")

    with monkeypatch.context() as patch:
        patch.setattr(video_source, "check_unchanged", changed)
        with pytest.raises(SourceChangedError, match="another one"):
            getattr(worker, call)(tasks[1])
    assert worker._store.pending(tasks[0].segment.source_id) == [task.segment for task in tasks[1:]]
    assert len(opens) == 1
    getattr(worker, call)(tasks[1])
    assert len(opens) == 2


def test_what_is_warned_of_is_reported_once(start, monkeypatch):
    worker, tasks = start("some")
    log, submit = logging.getLogger("depthmill.pipeline.model.backend"), Labeler.submit
    line = "the network runs uncompiled, more slowly"
    monkeypatch.setattr(Labeler, "submit", lambda *given, **how: log.warning(line) or submit(*given, **how))
    assert worker.label(tasks[0]).warnings == (line,)
    monkeypatch.undo()
    assert worker.label(tasks[1]).warnings == ()


def test_what_the_labeler_rounds_is_rounded(start, monkeypatch):
    worker, tasks = start("some")
    rounded, submit = [], Labeler.submit
    monkeypatch.setattr(Labeler, "rounds", lambda *_: True)
    monkeypatch.setattr(
        Labeler, "submit", lambda *given, **how: rounded.append(how["rounded"]) or submit(*given, **how)
    )
    worker.label(tasks[0])
    assert set(rounded) == {True}


def test_a_worker_can_be_closed_in_the_middle(start):
    worker, tasks = start("some")
    worker.label(tasks[0], tasks[1])
    begun = worker._next
    worker.close()
    assert begun._dropped


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["keep", "load"]), ("cuda", ["load", "keep"])])
def test_freed_memory_is_kept_but_not_that_of_weights_on_their_way_to_a_device(monkeypatch, device, expected):
    done = []
    monkeypatch.setattr("depthmill.pipeline.worker.keep_freed_memory", lambda: done.append("keep"))
    monkeypatch.setattr(Worker, "_load", lambda self: done.append("load") or "a backend")
    worker = Worker(LabelConfig(device=device), "nowhere", ())
    assert worker.load() == "a backend"
    assert done == expected
    worker.close()
