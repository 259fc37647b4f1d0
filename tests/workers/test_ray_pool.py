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
from depthmill.workers.ray_pool import RayPool, total


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
    pool = RayPool({}, total("GPU"))
    pool._actors[0] = "the actor"
    future = Future()
    future.set_exception(error)
    event = pool._event(0, future)
    assert (event.error, event.died, event.lost) == (error, died, lost)
    assert killed == ["the actor"] * died


def test_what_a_machine_cannot_import_is_told(killed):
    pool, future = RayPool({}, total("GPU")), Future()
    pool._actors[0] = "the actor"
    text = "Traceback\n  ^^^^\nModuleNotFoundError: No module named 'depthmill'"
    future.set_exception(ActorDiedError(RayTaskError("__init__", text, RuntimeError(text))))
    event = pool._event(0, future)
    assert (str(event.error), event.died) == ("ModuleNotFoundError: No module named 'depthmill'", True)


def test_an_exception_that_cannot_be_unpickled_ends_no_worker_and_is_told(killed):
    unserializable = getattr(exceptions, "UnserializableException", None)
    if unserializable is None:
        pytest.skip("Ray is too old")
    pool, future = RayPool({}, total("GPU")), Future()
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
    pool = RayPool({kind: lambda: actor}, total("GPU"))
    died = Future()
    died.set_exception(ActorDiedError())
    assert pool._event(pool.start(kind), died).lost


GIB = 1 << 30


@pytest.mark.parametrize(
    ("machines", "fit"),
    [
        ([], 0),
        ([{"memory": 99.0 * GIB}], 0),  # a head without cores is no machine
        ([{"CPU": 2.0, "memory": 99.0 * GIB}], 1),  # fewer cores than threads
        ([{"CPU": 15.0, "memory": 99.0 * GIB}], 1),
        ([{"CPU": 16.0, "memory": 99.0 * GIB}], 2),
        ([{"CPU": 64.0, "memory": 15.0 * GIB}], 3),  # what its memory has room for
        ([{"CPU": 64.0, "memory": 3.0 * GIB}], 1),  # one is tried, however little there is
        ([{"CPU": 64.0, "memory": 99.0 * GIB}, {"CPU": 17.0, "memory": 99.0 * GIB}, {"memory": 1.0}], 4),
    ],
)
def test_labelers_on_cpus_have_their_threads_and_memory(monkeypatch, machines, fit):
    monkeypatch.setattr(actors, "remote", lambda worker, **options: None)
    monkeypatch.setattr(actors, "count_weights", lambda checkpoints: GIB // 3)  # 2 GiB as bfloat16, times 3
    config = LabelConfig(device="cpu", dtype="bfloat16", threads=8)
    pool = actors.labelers(config, "store", (), retry_failed=False)
    nodes = [{"NodeID": str(i), "Alive": True, "Resources": machine} for i, machine in enumerate(machines)]
    gone = {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 1.0, "memory": 0.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, gone])
    assert pool.capacity() == fit
    on_apple = config.model_copy(update={"device": "mps"})
    pool = actors.labelers(on_apple, "store", (), retry_failed=False)
    assert pool.capacity() == sum("CPU" in machine for machine in machines), "one for each machine's GPU"


@pytest.mark.parametrize("resource", ["GPU", "CPU"])
def test_others_have_a_gpu_or_a_core_each(monkeypatch, resource):
    nodes = [{"NodeID": str(i), "Alive": i != 2, "Resources": {"memory": 1.0, resource: i + 1.0}} for i in range(3)]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"NodeID": "head", "Alive": True, "Resources": {}}])
    assert RayPool({}, total(resource)).capacity() == 3


def test_a_cluster_that_has_ended_is_asked_for_nothing(monkeypatch, killed):
    dead = [("gcs_server", SimpleNamespace(returncode=-9))]
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(dead_processes=lambda: dead))
    monkeypatch.setattr(ray, "nodes", lambda: pytest.fail("asked, which waits for ever"))
    pool, died = RayPool({}, total("CPU")), Future()
    died.set_exception(ActorDiedError())
    pool._actors[0], pool._nodes[0] = "the actor", ("its machine", "its name")
    pool._ended.put((0, died))
    for asked in (pool.capacity, lambda: pool.wait(0.0)):
        with pytest.raises(RunStoppedError, match="gcs_server"):
            asked()


def test_workers_are_called_after_their_machines_where_there_are_several(killed):
    pool = RayPool({}, total("CPU"))
    pool._nodes.update({0: ("a", "first"), 1: ("a", "first")})
    assert [pool.name(one) for one in (0, 1, 2)] == ["worker 0", "worker 1", "worker 2"]
    pool._nodes[2] = ("b", "second")
    pool.stop(2)
    assert [pool.name(one) for one in (1, 2, 3)] == ["worker 1 on first", "worker 2 on second", "worker 3"]


@pytest.mark.parametrize(("device", "strategy"), [("cpu", "SPREAD"), ("cuda", "DEFAULT")])
def test_labelers_on_cpus_are_spread_over_machines(monkeypatch, device, strategy):
    asked = {}
    monkeypatch.setattr(actors, "remote", lambda worker, **options: asked.update({worker.__name__: options}))
    actors.labelers(LabelConfig(device=device, dtype="float32"), "store", (), retry_failed=False)
    assert asked["LabelWorker"]["scheduling_strategy"] == strategy


@pytest.fixture
def cluster(monkeypatch):
    """One whose machines answer what `answer` says, at once or late; `asked` is what they were asked with."""
    state = SimpleNamespace(answer=(torch.float16, 5), late=False, asked={})

    def get(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer

    def options(**asked):
        state.asked.update(asked)
        return SimpleNamespace(remote=lambda dtype, device: state.answer)

    monkeypatch.setattr(ray, "remote", lambda function: SimpleNamespace(options=options))
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked) if state.late else (asked, []))
    monkeypatch.setattr(ray, "get", get)
    return state


@pytest.mark.parametrize(("gpus", "device", "answer"), [(2, "cuda", torch.float16), (0, "cpu", torch.bfloat16)])
def test_the_dtype_is_best_on_the_machines_that_label(cluster, gpus, device, answer):
    cluster.answer = answer, 5
    said = []
    config = _resolve(LabelConfig(device="auto", address="auto"), gpus, said.append)
    assert (config.device, config.dtype, config.threads) == (device, str(answer).removeprefix("torch."), 5)
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
    on_cpus = LabelConfig(address="auto", dtype="float32", threads=3)
    assert _resolve(on_cpus, 0, said.append).threads == 3
    assert not said, "nobody was asked"
    assert _resolve(on_cpus.model_copy(update={"threads": None}), 0, said.append).threads == 5
    assert "waiting for a free core" in said[0]


def test_machines_that_cannot_tell_the_dtype(cluster):
    for text in ("CUDA error\nsee its documentation", "It failed to import on the worker:\n\nTraceback\nCUDA error"):
        cluster.answer = RayTaskError("_backend_here", f"Traceback\nRuntimeError: {text}", RuntimeError(text))
        with pytest.raises(ConfigError, match=r"\(RuntimeError: CUDA error\).*--dtype"):
            _resolve(LabelConfig(address="auto"), 1, print)
