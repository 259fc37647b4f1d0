"""Fixtures that many tests share."""

import gc
import os
import signal
import sys
import uuid
from functools import cache, lru_cache
from importlib.metadata import version
from types import SimpleNamespace

import pytest

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as behind a script's `&`: what is started here would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # until all is imported: nothing of that is garbage
# Before anything imports them: no test asks a hub, and none waits for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray's workers are nice (15) by default: beside other tests on busy cores they would hardly run, and Ray takes for dead
# those that have not registered in time.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_worker_register_timeout_seconds", "300")
# Networks and pictures here are tiny: on busy cores, threads that wait for each other cost ten times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")


@pytest.fixture(autouse=True, scope="session")
def _user_cache(tmp_path_factory):
    """Nothing is taken from, or left in, the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _imported():
    """What tests import stays: a worker that starts looks through the rest alone, not for half a second each time."""
    gc.enable()
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)  # as workers do at their end
        patch.setattr(gc, "freeze", lambda: None)  # nor is what they leave kept for good
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """For runs inside this process as well; and undo what they set: the threads of all that comes after them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("depthmill.pipeline.model.backend._MOST_THREADS", 1)
        yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32():
    """The same labels on every machine, to 1e-4: not bfloat16 where the CPU multiplies it."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        patch.setattr("depthmill.pipeline.model.backend.cpu_bfloat16", lambda: "")
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a `depth` and a `normals` checkpoint of random weights, which share a VAE alone; 48 pixels wide."""
    from dataclasses import replace

    from depthmill.pipeline.model import scratch

    root = tmp_path_factory.mktemp("checkpoints")
    architecture = scratch.Architecture(vae_channels=(8, 16), unet_channels=(16, 32), head_channels=8)
    depth = scratch.build(architecture, seed=3)
    normals = replace(depth, unet=scratch.build(architecture, seed=4).unet)
    for modality, parts in (("depth", depth), ("normals", normals)):
        scratch.save(parts, root / modality, modality, processing_resolution=48)
    return root


_version = cache(version)


@lru_cache(maxsize=4)
def _load(checkpoints, config):
    from depthmill.pipeline.model.labeler import Labeler

    return Labeler(checkpoints, config)


@pytest.fixture
def loaded_once():
    """Runs inside this process have one labeler of the same checkpoints and options: loading is most of their work."""
    with pytest.MonkeyPatch.context() as patch:  # of its own: tests undo theirs
        patch.setattr("depthmill.pipeline.worker.Labeler", lambda given, config: _load(tuple(given), config))
        patch.setattr("depthmill.workers.label.version", _version)  # torch's metadata alone take 15 ms
        yield


@pytest.fixture
def cli(monkeypatch, capsys):
    """The command line inside this process, which has imported everything already."""
    from depthmill.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["depthmill", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=said.out, stderr=said.err)

    return call


def pytest_collection_modifyitems(items):
    """Skip, visibly, what needs a GPU where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def _s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """A fresh bucket of a server on loopback, which this process and its children reach."""
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "theaccesskey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "thesecretkey")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return SimpleNamespace(url=f"s3://{bucket}", endpoint=_s3_server)


@pytest.fixture
def refuse(s3, monkeypatch):
    """How often the listings of prefixes are to be refused, in this process."""
    import fsspec

    refused = {}
    files = type(fsspec.filesystem("s3"))
    original = files._call_s3

    async def call(self, method, *args, **options):
        if method == "list_objects_v2" and refused.get(options["Prefix"], 0):
            refused[options["Prefix"]] -= 1
            raise PermissionError("The provided token has expired")
        return await original(self, method, *args, **options)

    monkeypatch.setattr(files, "_call_s3", call)
    return refused
