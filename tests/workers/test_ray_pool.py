"""What the pool makes of what Ray answers; Ray itself is not started."""

from concurrent.futures import Future

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

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
