"""What a machine's device is best given: dtype, compilation, frames in a batch. All of it can be overridden."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthmill.pipeline.config import Compile
from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.machine import cores
from depthmill.pipeline.model.cache import cache_directory, keep, kept

if TYPE_CHECKING:
    from depthmill.pipeline.model.specialize import Specialized

log = logging.getLogger(__name__)

# On CPUs from 4 small frames on a batch is as fast as any; twice that is what corpora of many sizes still fill.
_CPU_BATCH = 8
# Of a CPU's batch, the largest tensor; a pass takes some six of them. Frames as large as that are as fast one by one.
_CPU_TENSOR_BYTES = 256 * 2**20
# More would only be slower to fill: a GPU is busy with far fewer frames of this kind.
_MOST = 32
# Of the free memory: what compiled passes hold in their graphs is not there for the others, which need as much again.
_SHARE = 0.4
_MOST_THREADS = 8
# Pictures of one shape after which `auto` compiles: by then a run has lost what compiling takes, two minutes, at some
# 25 ms a picture (both measured on an H100 at Stable Diffusion 2's size); so no run loses more than twice the least.
COMPILE_AFTER = 5000
# Shapes of full batches that are compiled, beyond which torch runs the rest uncompiled: rounded aspects are 23.
_SHAPES = 32


def pick_device(name: str) -> torch.device:
    """The device for `name`, checked to exist; `auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {name!r}, which torch cannot use here ({str(error).splitlines()[0]}); "
            "expected auto, cpu, or cuda where there is a GPU and torch was built for it"
        ) from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The network's dtype for `name`.

    `auto` is bfloat16 on CUDA, float16 where that has none; bfloat16 on CPUs that multiply it (AVX512-BF16, AMX);
    float32 elsewhere. A run settles it once, on a machine that labels, and its store remembers it: a rerun elsewhere
    that would come to another is refused, and told of `--dtype`.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.bfloat16 if cpu_bfloat16() else torch.float32
    if device.type != "cuda":
        return torch.float32
    # Emulated, as torch does it on GPUs before Ampere (8.0), it is slower than float32.
    lacks = torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if lacks else torch.bfloat16


def exact_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Have a network in float32 multiply in float32 on CUDA, too, in all of this process.

    By itself cuDNN convolves what it has rounded to TF32, 10 bits of 23; matrix products are exact unless the program
    or its environment asked for less.
    """
    if device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
        cudnn: Any = torch.backends.cudnn
        cudnn.allow_tf32 = False
        # From torch 2.9 that leaves it to flags of all operations, which may say TF32. Both of cuDNN's are set: where
        # one contradicts the older flag, torch refuses to read that (`torch.backends.cudnn.flags` does).
        if hasattr(cudnn, "conv"):
            cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


def named(device: torch.device) -> str:
    """A device and its kind, in words: another kind may round differently."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({cpu_kind()})" if device.type == "cpu" else str(device)


def default_threads() -> int:
    """CPU threads of a network that is not told of any: as many as this process has cores, at most 8."""
    return min(cores(), _MOST_THREADS)


def cpu_kind() -> str:
    """What this CPU's instructions are called: `AVX2`, or `AVX512, AMX`."""
    return ", ".join(filter(None, (torch.backends.cpu.get_cpu_capability(), cpu_bfloat16())))


def cpu_bfloat16() -> str:
    """What this CPU multiplies bfloat16 with: `AMX`, `AVX512-BF16` or, where it is slower than float32, nothing."""
    # Private, but the only thing that asks; where a version of torch lacks one, the answer is no.
    for unit, name in {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}.items():
        if getattr(torch.cpu, name, lambda: False)():
            return unit
    return ""


def compile_network(network: Specialized, device: torch.device, wanted: Compile, key: Sequence[str]) -> None:
    """Have full batches run compiled, each shape of them by itself; on CUDA as one graph that is launched at once.

    `on` compiles when the first full batch of a shape comes. `auto` does so on CUDA, once `network.compile_after`
    pictures of the shape have been labelled, so that what takes minutes has time to pay, and goes on without, with a
    warning, where it cannot be done. On CPUs nearly all of the time is in convolutions, which compiling does not touch:
    it measured 6 %, after minutes. What was compiled is kept on disk, beside a note for each shape: of such shapes
    `auto`, too, runs the first full batch compiled.

    Args:
        network: Loaded.
        device: Where it is.
        wanted: See above.
        key: Whatever decides what is compiled, beside the shape and this package's code.
    """
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return
    import torch._dynamo

    # Who has no home has what torch compiles kept where torch does that by itself, and no notes.
    with suppress(RuntimeError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))
    # The notes go with what they are of: who empties torch's cache removes them, too.
    notes = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", os.devnull)) / "depthmill"
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _SHAPES)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    compiled = torch.compile(network.folded, dynamic=False, mode=mode)

    seen: Counter[torch.Size] = Counter()
    noted: dict[torch.Size, bool] = {}
    ran: set[torch.Size] = set()
    network.compile_after = COMPILE_AFTER if wanted == "auto" else 0

    def note(shape: torch.Size) -> Path:
        return notes / _name_of([*key, *map(str, shape)])

    def run(pictures: torch.Tensor) -> list[torch.Tensor]:
        shape = pictures.shape
        if shape not in noted:
            noted[shape] = note(shape).exists()
        if not noted[shape] and seen[shape] < network.compile_after:
            seen[shape] += len(pictures)
            return network.folded(pictures)  # type: ignore[no-any-return]
        if shape not in ran:
            ran.add(shape)
            # While torch prepares a graph it gives back nothing of what it keeps of other passes, and may run out.
            torch.cuda.empty_cache()
        try:
            answers: list[torch.Tensor] = compiled(pictures)
            if not noted[shape]:
                noted[shape] = True
                keep(note(shape), list(shape))
            return answers
        except Exception as error:  # what a compiler needs may be missed as late as when its code is run
            if lacks_gpu_memory(error):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if wanted == "on":
                if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                    raise
                raise ConfigError(
                    f"compile is on, and torch cannot compile the network here ({reason}); expected a C++ compiler, "
                    "and for CUDA Triton: install them, or leave compile at auto (--compile auto)"
                ) from error
            log.warning("the network runs uncompiled, more slowly: torch cannot compile it here (%s)", reason)
            network.compiled = None
        # Not before the exception is gone: it holds what the pass had allocated.
        return network.folded(pictures)  # type: ignore[no-any-return]

    network.compiled = run


def cpu_batch(frame_bytes: int) -> int:
    """Frames in one forward pass on a CPU, at least 1: 8, and fewer of large frames.

    A machine's memory does not count: with other batches, others would round differently.

    Args:
        frame_bytes: What the largest tensor takes that the network makes of one frame.
    """
    return max(1, min(_CPU_BATCH, _CPU_TENSOR_BYTES // frame_bytes))


def fitting_batch(used_bytes: Callable[[int], int], free_bytes: int, key: Sequence[str]) -> int:
    """Frames that fit in one forward pass on a GPU, at least 1, by what passes of one and of two take.

    Args:
        used_bytes: Runs so many frames and tells the bytes that they took at their highest.
        free_bytes: Of the device.
        key: Whatever decides what frames take, beside this package's code; measured once for each, and kept in the
            user's cache.
    """
    name = f"memory/{_name_of(key)}"
    try:
        one, two = kept(name)
    except (ValueError, TypeError):
        try:
            one, two = used_bytes(1), used_bytes(2)
        except RuntimeError as error:
            if not lacks_gpu_memory(error):
                raise
            return 1
        keep(name, [one, two])
    each = max(two - one, 1)
    return max(1, min(_MOST, 1 + int((_SHARE * free_bytes - one) // each)))


def lacks_gpu_memory(error: Exception) -> bool:
    """Whether a pass ended for want of GPU memory; NVIDIA's libraries have words of their own for it.

    A convolution tries one of cuDNN's engines after the other; if none has room for its workspace, torch says that it
    found none. cuBLAS and cuDNN take memory beside torch's when they are first used.
    """
    words = str(error)
    return isinstance(error, torch.cuda.OutOfMemoryError) or "find an engine" in words or "STATUS_ALLOC_FAILED" in words


def _name_of(key: Sequence[str]) -> str:
    """Of a file of a cache that is for a key and this package's code."""
    name = hashlib.sha256(json.dumps(list(key)).encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        name.update(code.read_bytes())
    return f"{name.hexdigest()[:16]}.json"
