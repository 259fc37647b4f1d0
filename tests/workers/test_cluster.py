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
    def init(*args, **kwargs):
        raise ValueError("num_cpus is wrong")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="num_cpus is wrong"), connect(LabelConfig()):
        pass
