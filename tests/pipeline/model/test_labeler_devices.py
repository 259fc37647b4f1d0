"""A labeler on its device: memory, compilation, CUDA."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.store import layout
from depthmill.tests.media import noise


def test_out_of_memory_halves_the_batch_and_remembers(checkpoints, monkeypatch):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=8)
    forward, tried = labeler._forward, []

    def small_gpu(frames, *rest):
        tried.append(len(frames))
        if len(frames) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(frames, *rest)

    frames = noise(7, 16, 24, 3)
    expected = labeler(frames).depth
    monkeypatch.setattr(labeler, "_forward", small_gpu)
    assert np.allclose(labeler(frames).depth, expected, atol=1e-5)
    assert tried == [7, 3, 3, 1]
    labeler(noise(7, 24, 16, 3))
    assert tried[4:] == [3, 3, 1], "as many pixels, whatever their shape"
    labeler(noise(7, 8, 24, 3))
    assert tried[7:] == [6, 3, 3, 1], "half the pixels, so twice the frames, until that is too many as well"
    assert labeler.batch_size == 8


@pytest.mark.parametrize(
    "words",
    [
        "GET was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_other_words_for_want_of_gpu_memory(checkpoints, monkeypatch, words):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=4)
    forward, tried = labeler._forward, []

    def small_gpu(frames, *rest):
        tried.append(len(frames))
        if len(frames) > 2:
            raise RuntimeError(words)
        return forward(frames, *rest)

    monkeypatch.setattr(labeler, "_forward", small_gpu)
    labeler(noise(4, 16, 24, 3))
    assert tried == [4, 2, 2]


def test_an_error_for_want_of_gpu_memory_holds_none(checkpoints, monkeypatch):
    labeler, held = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1), []

    def no_memory(*frames):
        pictures = torch.zeros(3)
        held.append(weakref.ref(pictures))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(labeler, "_forward", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError) as kept:
        labeler(noise(1, 16, 24, 3))
    assert kept.value.__traceback__
    assert held[0]() is None


@pytest.mark.parametrize("error", [MemoryError("host"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_other_memory_s_end_is_no_matter_of_batches(checkpoints, monkeypatch, error):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=4)
    forward, tried = labeler._forward, []

    def no_memory(frames, *rest):
        tried.append(len(frames))
        raise error

    monkeypatch.setattr(labeler, "_forward", no_memory)
    with pytest.raises(type(error), match=str(error)):
        labeler(noise(4, 16, 24, 3))
    assert tried == [4]
    monkeypatch.setattr(labeler, "_forward", lambda frames, *rest: tried.append(len(frames)) or forward(frames, *rest))
    labeler.label(list(noise(4, 16, 24, 3)))
    assert tried == [4, 4]


def test_a_frame_too_large_for_the_gpu_is_an_error(checkpoints, monkeypatch):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=2)

    def no_memory(frames, *rest):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    before = labeler._most(16 * 24)
    monkeypatch.setattr(labeler, "_forward", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        labeler(noise(2, 16, 24, 3))
    assert labeler._most(16 * 24) == before == 2  # the next ones need not suffer for it
    labeler._pixels_that_fit = 16 * 12
    assert labeler._most(16 * 24) == 1, "one is tried, whatever fitted before"


def test_a_device_that_is_not_there(checkpoints):
    with pytest.raises(ConfigError, match=r"device.*got 'quantum'"):
        Labeler.from_pretrained(checkpoints / "depth", device="quantum")
    with pytest.raises(ConfigError, match="device is 'cuda:99'"):
        Labeler.from_pretrained(checkpoints / "depth", device="cuda:99")


def test_full_batches_alone_run_compiled(checkpoints, monkeypatch):
    labeler = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=2, dtype="float32")
    ran = []
    monkeypatch.setattr(
        labeler._network, "compiled", lambda pictures: ran.append(len(pictures)) or labeler._network.folded(pictures)
    )
    labeler(noise(5, 40, 56, 3))
    assert ran == [2, 2]


@pytest.mark.parametrize("options", [{"steps": 2}, {}], ids=["steps", "parts that are not known"])
def test_what_cannot_be_compiled_is_not_silently_left_so(checkpoints, monkeypatch, options):
    monkeypatch.setattr("depthmill.pipeline.model.labeler.can_specialize", lambda head: False)
    with pytest.raises(ConfigError, match=r"compile is on.*--compile auto"):
        Labeler.from_pretrained(checkpoints / "depth", device="cpu", compile="on", **options)
    assert not Labeler.from_pretrained(checkpoints / "depth", device="cpu", compile="auto", **options).compiled


def test_what_an_earlier_labeler_left_is_free(checkpoints, monkeypatch):
    labeler, asked = Labeler.from_pretrained(checkpoints / "depth", device="cpu", batch_size=1), []
    labeler.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append("asked") or (10, 20))
    monkeypatch.setattr("depthmill.pipeline.model.labeler.fitting_batch", lambda used, free, key: free)
    assert labeler._fitting() == 10
    assert asked == ["emptied", "asked"]
    monkeypatch.setattr("depthmill.pipeline.model.labeler.fitting_batch", lambda *_: 10**6)
    most = labeler._fitting()
    assert most * 16 * 48**2 < 2**31 <= (most + 1) * 16 * 48**2, "no tensor's numbers are more than 32 bits count"


def test_no_tensor_is_made_of_numbers_and_sent_to_the_device(labeler):
    """Whoever sends one to CUDA waits until all is done that was queued there before: the whole network."""
    ran = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            ran.append(operation)
            return operation(*args, **(kwargs or {}))

    with Spy():
        labeler._network(torch.zeros(2, 3, 40, 48))
    assert ran
    assert torch.ops.aten.lift_fresh.default not in ran


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # float16 looks for overflows
def test_a_batch_is_queued_on_cuda_without_waiting(checkpoints, dtype):
    labeler = Labeler.from_pretrained(
        checkpoints / "depth", checkpoints / "normals", device="cuda", dtype=dtype, batch_size=2
    )
    frames = list(noise(2, 40, 56, 3))
    expected = labeler.label(frames, packing="int8")
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = labeler.submit(frames, packing="int8")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for labels, one in zip(pending.result(), expected, strict=True):
        assert np.array_equal(labels.normals, one.normals)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compiled_on_cuda(checkpoints, dtype):
    """Twice the same shape, so that a CUDA graph is recorded and then replayed, then another shape, then the first."""
    options = {"device": "cuda", "dtype": dtype, "batch_size": 4}
    names = checkpoints / "depth", checkpoints / "normals"
    plain = Labeler.from_pretrained(*names, **options)
    compiled = Labeler.from_pretrained(*names, compile="on", **options)
    for seed, size in enumerate([(40, 56), (40, 56), (40, 56), (56, 40), (40, 56)]):
        frames = noise(4, *size, 3, seed=seed)
        assert np.abs(compiled(frames).depth - plain(frames).depth).max() < (1e-4 if dtype == "float32" else 5e-2)


@pytest.mark.gpu
def test_queued_batches_do_not_overwrite_each_other_on_cuda(checkpoints):
    labeler = Labeler.from_pretrained(
        checkpoints / "depth", checkpoints / "normals", device="cuda", compile="on", batch_size=2
    )
    batches = [list(noise(2, 40, 56, 3, seed=seed)) for seed in range(4)]
    pending = [labeler.submit(batch, packing="int8") for batch in batches]
    for batch, one in zip(batches, pending, strict=True):
        for labels, expected in zip(one.result(), labeler.label(batch), strict=True):
            assert np.array_equal(labels.depth, layout.pack_depth(expected.depth))
            assert np.array_equal(labels.normals, layout.pack_normals(expected.normals, "int8"))


@pytest.mark.gpu
def test_the_batch_is_found_by_the_memory_on_cuda(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {Labeler.from_pretrained(checkpoints / "depth", device="cuda").batch_size for _ in range(2)}
    assert sizes == {32}, "frames of 48 pixels: the most there is"
    assert len(list((tmp_path / "depthmill" / "memory").iterdir())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 6e-2), ("float16", 2e-2)])
def test_cuda_agrees_with_the_cpu(checkpoints, labeler, dtype, tolerance):
    frames = noise(4, 40, 56, 3)
    cuda = Labeler.from_pretrained(checkpoints / "depth", checkpoints / "normals", device="cuda", dtype=dtype)
    assert np.abs(cuda(frames).depth - labeler(frames).depth).max() < tolerance


@pytest.mark.gpu
def test_cuda_is_picked_with_half_precision(checkpoints):
    labeler = Labeler.from_pretrained(checkpoints / "depth")
    assert labeler.device.type == "cuda"
    assert labeler.dtype in (torch.bfloat16, torch.float16)
