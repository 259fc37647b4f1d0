import pytest
import ray

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import ConfigError
from depthmill.workers.cluster import connect


@pytest.mark.parametrize(("late", "starts"), [(2, 3), (3, 3)])
def test_ray_that_starts_too_slowly_is_started_again(monkeypatch, late, starts):
    calls = []

    def init(*args, **kwargs):
        calls.append(args)
        if len(calls) <= late:
            raise Exception("The current node timed out during startup. The GCS may be overloaded.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    if late < starts:
        with connect(LabelConfig()) as gpus:
            assert gpus == 2
    else:
        with pytest.raises(ConfigError, match="--workers 0"), connect(LabelConfig()):
            pass
    assert len(calls) == starts


def test_what_else_ray_says_is_not_tried_again(monkeypatch):
    refuse(monkeypatch, ValueError("num_cpus is wrong"))
    with pytest.raises(ConfigError, match=r"on this machine \(ValueError: num_cpus is wrong\).*--workers 0"):
        connect(LabelConfig()).__enter__()


def test_a_cluster_that_says_nothing_is_named(monkeypatch):
    refuse(monkeypatch, ConnectionError())
    with pytest.raises(ConfigError, match=r"no Ray cluster at auto \(ConnectionError\).*--address"):
        connect(LabelConfig(address="auto")).__enter__()


def refuse(monkeypatch, error):
    def init(*args, **kwargs):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
