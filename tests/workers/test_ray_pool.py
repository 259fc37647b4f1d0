"""What the pool makes of what Ray answers; Ray itself is not started."""

from concurrent.futures import Future

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from depthmill.pipeline.config import LabelConfig
from depthmill.workers import actors
from depthmill.workers.ray_pool import RayPool


@pytest.fixture
def killed(monkeypatch):
    """The actors that the pool killed."""
    actors = []
    monkeypatch.setattr(ray, "kill", actors.append)
    return actors


@pytest.mark.parametrize(
    ("error", "died"),
    [
        (RayTaskError("label", "Traceback", ValueError("no luck")), False),
        (ValueError("no luck"), False),
        (ActorDiedError(), True),
        (OutOfMemoryError("the memory monitor killed it"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_actor_is_dead_whatever_ray_calls_it(killed, error, died):
    pool = RayPool({}, per="GPU")
    pool._actors[0] = "the actor"
    future = Future()
    future.set_exception(error)
    event = pool._event(0, future)
    assert (event.error, event.died, event.lost) == (error, died, False)
    assert killed == ["the actor"] * died


def test_a_head_without_cores_is_no_machine(monkeypatch):
    machines = [
        {"NodeID": "head", "Alive": True, "Resources": {"memory": 1.0}},
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 16.0}},
        {"NodeID": "gone", "Alive": False, "Resources": {"CPU": 16.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    assert RayPool({}, per="machine").capacity() == 2


@pytest.mark.parametrize(("device", "strategy"), [("cpu", "SPREAD"), ("cuda", "DEFAULT")])
def test_labelers_that_take_up_whole_machines_are_spread_over_them(monkeypatch, device, strategy):
    asked = {}
    monkeypatch.setattr(actors, "remote", lambda worker, **options: asked.update({worker.__name__: options}))
    actors.labelers(LabelConfig(device=device), "store", (), retry_failed=False)
    assert asked["LabelWorker"]["scheduling_strategy"] == strategy
