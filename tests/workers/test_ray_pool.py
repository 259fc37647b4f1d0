"""What the pool makes of what Ray answers; Ray itself is not started."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import exceptions
from ray._private import worker
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayTaskError,
)

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import ConfigError, RunStoppedError
from depthmill.workers import actors
from depthmill.workers.causes import words_of
from depthmill.workers.label import _resolve
from depthmill.workers.ray_pool import RayPool


@pytest.fixture
def killed(monkeypatch):
    """The actors that the pool killed."""
    actors = []
    monkeypatch.setattr(ray, "kill", actors.append)
    return actors


@pytest.mark.parametrize(
    ("error", "died", "lost"),
    [
        (RayTaskError("label", "Traceback", ValueError("no luck")), False, False),
        (ValueError("no luck"), False, False),
        (ActorDiedError(), True, False),
        (OutOfMemoryError("the memory monitor killed it"), True, False),
        (ActorUnavailableError("its machine does not answer", None), True, True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_actor_is_dead_whatever_ray_calls_it(killed, error, died, lost):
    pool = RayPool({}, per="GPU")
    pool._actors[0] = "the actor"
    future = Future()
    future.set_exception(error)
    event = pool._event(0, future)
    assert (event.error, event.died, event.lost) == (error, died, lost)
    assert killed == ["the actor"] * died


def test_an_exception_that_cannot_be_unpickled_ends_no_worker_and_is_told(killed):
    unserializable = getattr(exceptions, "UnserializableException", None)
    if unserializable is None:
        pytest.skip("Ray is too old")
    pool, future = RayPool({}, per="GPU"), Future()
    pool._actors[0] = "the actor"
    future.set_exception(unserializable("Traceback (most recent call last):\n  …\ncuda.LostError: GPU 3\n"))
    event = pool._event(0, future)
    assert (words_of(event), event.died, killed) == ("RuntimeError: cuda.LostError: GPU 3", False, [])


@pytest.mark.parametrize("kind", ["labeler", "prober"])
def test_workers_of_both_kinds_go_with_their_machine(monkeypatch, killed, kind):
    def answers(value):
        future = Future()
        future.set_result(value)
        return SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: future))

    actor = SimpleNamespace(load=answers(""), node=answers("gone"))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "gone", "Alive": False}, {"NodeID": "b", "Alive": True}])
    pool = RayPool({kind: lambda: actor}, per="GPU")
    died = Future()
    died.set_exception(ActorDiedError())
    assert pool._event(pool.start(kind), died).lost


def test_a_head_without_cores_is_no_machine(monkeypatch):
    machines = [
        {"NodeID": "head", "Alive": True, "Resources": {"memory": 1.0}},
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 16.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    assert RayPool({}, per="machine").capacity() == 2


def test_a_cluster_that_has_ended_is_asked_for_nothing(monkeypatch, killed):
    dead = [("gcs_server", SimpleNamespace(returncode=-9))]
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(dead_processes=lambda: dead))
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("asked, which waits for ever"))
    pool, died = RayPool({}, per="machine"), Future()
    died.set_exception(ActorDiedError())
    pool._actors[0], pool._nodes[0] = "the actor", "its machine"
    pool._ended.put((0, died))
    for asked in (pool.capacity, lambda: pool.wait(0.0)):
        with pytest.raises(RunStoppedError, match="gcs_server"):
            asked()


@pytest.mark.parametrize(("device", "strategy"), [("cpu", "SPREAD"), ("cuda", "DEFAULT")])
def test_labelers_that_take_up_whole_machines_are_spread_over_them(monkeypatch, device, strategy):
    asked = {}
    monkeypatch.setattr(actors, "remote", lambda worker, **options: asked.update({worker.__name__: options}))
    actors.labelers(LabelConfig(device=device), "store", (), retry_failed=False)
    assert asked["LabelWorker"]["scheduling_strategy"] == strategy


@pytest.fixture
def cluster(monkeypatch):
    """One whose machines answer the dtype that `answer` says, at once or late; `asked` is what they were asked with."""
    state = SimpleNamespace(answer=torch.float16, late=False, asked={})

    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def options(**asked):
        state.asked.update(asked)
        return SimpleNamespace(remote=lambda name, device: state.answer)

    monkeypatch.setattr(ray, "remote", lambda function: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked) if state.late else (asked, []))
    monkeypatch.setattr(ray, "get", get)
    return state


@pytest.mark.parametrize(("gpus", "device", "answer"), [(2, "cuda", torch.float16), (0, "cpu", torch.bfloat16)])
def test_the_dtype_is_best_on_the_machines_that_label(cluster, gpus, device, answer):
    cluster.answer = answer
    said = []
    config = _resolve(LabelConfig(device="auto", address="auto"), gpus, said.append)
    assert (config.device, config.dtype) == (device, str(answer).removeprefix("torch."))
    assert cluster.asked["num_gpus"] == min(gpus, 1)
    assert not said


def test_gpus_that_are_busy_are_waited_for_and_that_is_said(cluster):
    cluster.late = True
    said = []
    assert _resolve(LabelConfig(address="auto"), 2, said.append).dtype == "float16"
    assert "waiting for a free GPU" in said[0]
    assert "--dtype" in said[0]
    said.clear()
    assert _resolve(LabelConfig(address="auto", dtype="bfloat16"), 2, said.append).dtype == "bfloat16"
    assert not said, "nobody was asked"


def test_machines_that_cannot_tell_the_dtype(cluster):
    cluster.answer = RayTaskError("pick_dtype", "Traceback", ModuleNotFoundError("No module named 'depthmill'"))
    with pytest.raises(ConfigError, match=r"No module named 'depthmill'.*--dtype"):
        _resolve(LabelConfig(address="auto"), 1, print)
