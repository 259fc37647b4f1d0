import ctypes
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import ray
import torch
from ray._private import worker

from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.errors import ConfigError, RunStoppedError
from depthmill.workers import actors, smooth_actors
from depthmill.workers.cluster import connect, see_that_it_runs


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


@pytest.mark.parametrize(
    ("config", "cpus"),
    [
        (LabelConfig(), 4),
        (LabelConfig(device="cuda", workers=3), 3),
        (LabelConfig(device="cpu"), 2),
        (SmoothConfig(), 2),
    ],
)
def test_each_gpu_has_a_worker_where_cores_are_fewer(monkeypatch, config, cpus):
    asked = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr("depthmill.workers.cluster.cores", lambda: 2)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: asked.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0})
    with connect(config):
        assert asked["num_cpus"] == cpus


def test_sigterm_does_what_it_did_when_ray_has_ended(monkeypatch):
    """Ray resets it in C, of which Python learns nothing."""
    in_c = ctypes.CDLL(None).signal
    in_c.argtypes, in_c.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *args, **options: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "shutdown", lambda: in_c(signal.SIGTERM, None))
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with connect(SmoothConfig()):
            pass
        assert in_c(signal.SIGTERM, None), "a handler, not the default"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_else_ray_says_is_not_tried_again(monkeypatch):
    refuse(monkeypatch, ValueError("num_cpus is wrong"))
    with pytest.raises(ConfigError, match=r"on this machine \(ValueError: num_cpus is wrong\).*--workers 0"):
        connect(LabelConfig()).__enter__()


def test_a_cluster_that_says_nothing_is_named(monkeypatch):
    refuse(monkeypatch, ConnectionError())
    with pytest.raises(ConfigError, match=r"no Ray cluster at auto \(ConnectionError\).*--address"):
        connect(LabelConfig(address="auto")).__enter__()


@pytest.mark.parametrize("at_start", [False, True])
def test_sigterm_does_what_it_did_before_ray_started(monkeypatch, at_start):
    def init(*args, **kwargs):
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if at_start:
            signal.raise_signal(signal.SIGTERM)

    def stop(number, frame):
        raise KeyboardInterrupt

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt), connect(LabelConfig()):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_cluster_of_this_process_that_has_ended_stops_the_run(monkeypatch, name):
    dead = [("dashboard", SimpleNamespace(returncode=1))]
    monkeypatch.setattr(worker, "_global_node", SimpleNamespace(dead_processes=lambda: dead))
    see_that_it_runs()  # without its dashboard it does
    dead.append((name, SimpleNamespace(returncode=-9)))
    with pytest.raises(RunStoppedError, match=rf"Ray's {name} on this machine has ended \(exit status -9: .*again"):
        see_that_it_runs()


@pytest.mark.parametrize("node", [None, object()], ids=["at an address", "of a Ray that tells nothing"])
def test_other_clusters_are_waited_for(monkeypatch, node):
    monkeypatch.setattr(worker, "_global_node", node)
    see_that_it_runs()


@pytest.mark.skipif(not hasattr(worker, "_maybe_modify_runtime_env"), reason="Ray is too old")
def test_workers_are_not_started_by_uv_run(tmp_path):
    asks = "from depthmill.workers import cluster; print(cluster.worker._maybe_modify_runtime_env(None, False))"
    (tmp_path / "run").write_text(f"'{sys.executable}' -c '{asks}'; exit $?")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    command = {"executable": "/bin/sh", "cwd": tmp_path, "env": environment}  # Ray goes by the names of processes
    done = subprocess.run(["uv", "run"], **command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "None\n", done.stderr


def refuse(monkeypatch, error):
    def init(*args, **kwargs):
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)


def test_workers_are_told_whole_paths(monkeypatch, checkpoints):
    """Their working directory is that of `ray start`."""
    told = []

    class Actor:
        def remote(self, *arguments):
            told.append(arguments)

    for module in (actors, smooth_actors):
        monkeypatch.setattr(module, "remote", lambda *_, **__: Actor())
        monkeypatch.setattr(module, "RayPool", lambda kinds, _: [kind() for kind in kinds.values()])
    monkeypatch.chdir(checkpoints.parent)
    names = {"checkpoint": f"{checkpoints.name}/depth", "normals_checkpoint": "owner/name"}
    actors.labelers(LabelConfig(device="cpu", dtype="float32", **names), "a.zarr", (), False)
    smooth_actors.smoothers(SmoothConfig(), "s3://bucket/a.zarr")
    (config, store, _), (probed, *_), (_, smoothed) = told
    assert (config.checkpoint, config.normals_checkpoint) == (str(checkpoints / "depth"), "owner/name")
    assert store == probed == str(checkpoints.parent / "a.zarr")
    assert smoothed == "s3://bucket/a.zarr"
