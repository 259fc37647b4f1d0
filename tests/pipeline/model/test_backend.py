import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.model import backend
from depthmill.pipeline.model.backend import compile_network, exact_float32, fitting_batch, pick_dtype
from depthmill.pipeline.model.labeler import Labeler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "depthmill" / "memory"


@pytest.mark.parametrize(("has", "dtype"), [("AMX", torch.bfloat16), ("", torch.float32)])
def test_bfloat16_on_cpus_that_multiply_it(monkeypatch, has, dtype):
    monkeypatch.setattr(backend, "cpu_bfloat16", lambda: has)
    assert pick_dtype("auto", CPU) == dtype
    assert pick_dtype("float32", CPU) == torch.float32


def test_a_gpu_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capability = {CUDA: (8, 0), torch.device("cuda:1"): (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.get)
    assert pick_dtype("auto", CUDA) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda:1")) == torch.float16


@pytest.mark.parametrize(
    ("device", "dtype", "rounds"),
    [(CUDA, torch.float32, False), (CUDA, torch.bfloat16, True), (CPU, torch.float32, True)],
)
def test_float32_is_not_rounded_to_tf32(monkeypatch, request, device, dtype, rounds):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32", raising=False)  # of all that says nothing itself
    torch.set_float32_matmul_precision("high")
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    exact_float32(device, dtype)
    # Both fail to be read where torch's newer flags say otherwise.
    assert torch.backends.cudnn.allow_tf32 is rounds
    assert torch.backends.cuda.matmul.allow_tf32 is rounds


@pytest.mark.parametrize(("free", "frames"), [(10_000, 32), (1000, 3), (250, 1), (0, 1)])
def test_as_many_frames_as_fit_in_a_share_of_the_free_memory(free, frames):
    assert fitting_batch(lambda count: 20 + 100 * count, free, ["x"]) == frames


def test_what_frames_take_is_measured_once_for_each_key(cache):
    ran = []

    def used(frames):
        ran.append(frames)
        return 100 * frames

    assert [fitting_batch(used, 1000, key) for key in (["a"], ["a"], ["b"])] == [4, 4, 4]
    assert ran == [1, 2, 1, 2]
    for file in cache.iterdir():
        file.write_text("half of a fi")
    assert fitting_batch(used, 2000, ["a"]) == 8
    assert ran == [1, 2, 1, 2, 1, 2]


def test_what_another_version_measured_is_not_taken_over(tmp_path, monkeypatch):
    (tmp_path / "packed.py").write_text("before")
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    assert fitting_batch(lambda count: 100 * count, 1000, ["a"]) == 4
    (tmp_path / "packed.py").write_text("after")
    assert fitting_batch(lambda count: 50 * count, 1000, ["a"]) == 8


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("GET was unable to find an engine to …")]
)
def test_a_frame_that_does_not_fit_is_tried_alone(cache, error):
    def used(frames):
        raise error

    assert fitting_batch(used, 1000, ["a"]) == 1
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fitting_batch(lambda count: 100 * count, 1000, ["a"]) == 4


@pytest.mark.parametrize(
    ("wanted", "device", "compiles"),
    [("auto", CPU, False), ("on", CPU, True), ("off", CUDA, False), ("auto", CUDA, True)],
)
def test_what_is_compiled(checkpoints, monkeypatch, wanted, device, compiles):
    network = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1)._network
    monkeypatch.setattr(torch, "compile", lambda *args, **options: network.folded)
    compile_network(network, device, wanted, ["x"])
    assert (network.compiled is not None) is compiles


def test_who_has_no_home_can_compile(checkpoints, monkeypatch):
    network = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1, dtype="float32")._network
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: network.folded)
    compile_network(network, CUDA, "on", ["x"])
    assert network(torch.zeros(1, 3, 16, 16), full=True)["depth"].shape == (1, 1, 16, 16)


def test_auto_compiles_shapes_of_which_there_are_many(checkpoints, monkeypatch):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=2, dtype="float32")
    network, ran = labeler._network, []
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: lambda one: ran.append(tuple(one.shape)) or network.folded(one)
    )
    monkeypatch.setattr("depthmill.pipeline.model.backend.COMPILE_AFTER", 4)
    compile_network(network, CUDA, "auto", ["x"])
    assert labeler.backend.endswith("compiled after 4 of a new shape")
    wide, tall = torch.zeros(2, 3, 16, 24), torch.zeros(2, 3, 24, 16)
    for picture in (wide, tall, wide, wide, tall, wide):
        network(picture, full=True)
        network(picture[:1])
    assert ran == [tuple(wide.shape)] * 2
    labeler.compile_at_once()
    network(tall, full=True)
    assert ran[2:] == [tuple(tall.shape)]
    assert labeler.backend.endswith(", compiled")


def test_auto_compiles_at_once_what_was_compiled_before(checkpoints, monkeypatch, tmp_path):
    network = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=2, dtype="float32")._network
    ran = []
    monkeypatch.setattr(torch, "compile", lambda *args, **options: lambda one: ran.append(1) or network.folded(one))
    pictures, other = torch.zeros(2, 3, 16, 24), torch.zeros(2, 3, 24, 16)

    def runs_compiled(picture, key=("x",), wanted="auto"):
        ran.clear()
        compile_network(network, CUDA, wanted, key)
        network(picture, full=True)
        return bool(ran)

    assert not runs_compiled(pictures)
    assert runs_compiled(pictures, wanted="on")
    assert runs_compiled(pictures)
    assert not runs_compiled(other)
    assert not runs_compiled(pictures, key=["y"])
    shutil.rmtree(tmp_path / "inductor")
    assert not runs_compiled(pictures), "what was compiled is gone, too"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_second_process_finds_what_the_first_compiled(checkpoints):
    script = f"""
import numpy, torch
from depthmill.pipeline.model.labeler import Labeler
options = dict(device="cpu", dtype="float32", compile="on", batch_size=1)
labeler = Labeler.from_pretrained({str(checkpoints / "depth")!r}, **options)
labeler(numpy.zeros((1, 32, 48, 3), numpy.uint8))
counted = torch._dynamo.utils.counters["inductor"]
print(counted["fxgraph_cache_hit"], counted["fxgraph_cache_miss"])
"""
    counts = []
    for _ in range(2):
        printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        counts.append(tuple(map(int, printed.split())))
    (hits, misses), again = counts
    assert (hits, again) == (0, (misses, 0))
    assert misses > 0


def test_memory_that_other_passes_left_is_free_to_a_shape_that_is_compiled(checkpoints, monkeypatch):
    network = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=2, dtype="float32")._network
    ran = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: ran.append("emptied"))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: lambda one: ran.append("ran") or network.folded(one))
    compile_network(network, CUDA, "on", ["x"])
    for shape in ((2, 3, 16, 24), (2, 3, 16, 24), (2, 3, 24, 16)):
        network(torch.zeros(shape), full=True)
    assert ran == ["emptied", "ran", "ran", "emptied", "ran"]


@pytest.mark.parametrize("lacking", [AssertionError(), RuntimeError("Failed to find C compiler")])
def test_a_machine_on_which_what_was_compiled_does_not_run(checkpoints, monkeypatch, caplog, lacking):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1, dtype="float32")
    network, picture = labeler._network, torch.zeros(1, 3, 16, 16)
    errors = [torch.cuda.OutOfMemoryError("CUDA out of memory"), lacking]

    def broken(pictures):
        raise errors.pop(0)

    monkeypatch.setattr(torch, "compile", lambda *args, **options: broken)
    compile_network(network, CUDA, "auto", ["x"])
    labeler.compile_at_once()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        network(picture, full=True)
    assert torch.equal(network(picture, full=True)["depth"], network(picture)["depth"])
    assert "the network runs uncompiled" in caplog.text
    assert not labeler.compiled
    errors.append(lacking)
    compile_network(network, CUDA, "on", ["x"])
    with pytest.raises(type(lacking)):
        network(picture, full=True)


def test_a_machine_that_cannot_compile(checkpoints, monkeypatch, caplog):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1, dtype="float32")
    network = labeler._network
    failed = pytest.importorskip("torch._dynamo").exc.BackendCompilerFailed

    def broken(pictures):
        raise failed.__new__(failed)  # what it is made of changes with torch

    monkeypatch.setattr(torch, "compile", lambda *args, **options: broken)
    picture = torch.zeros(1, 3, 16, 16)
    expected = network(picture)["depth"]
    compile_network(network, CUDA, "auto", ["x"])
    assert labeler.compiled
    labeler.compile_at_once()
    assert torch.equal(network(picture, full=True)["depth"], expected)
    assert "the network runs uncompiled" in caplog.text
    assert labeler.backend.endswith("not compiled")
    compile_network(network, CPU, "on", ["x"])
    with pytest.raises(ConfigError, match="--compile auto"):
        network(picture, full=True)
