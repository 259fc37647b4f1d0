"""The labeler: uint8 frames in, labels out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import clear_frames
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from depthmill.pipeline.config import DEMO, Compile, LabelConfig, Noise, TimestepSpacing
from depthmill.pipeline.config_files import validated
from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.geometry import padded_size, processed_size, rounded_size, to_network
from depthmill.pipeline.model.backend import (
    compile_network,
    cpu_batch,
    exact_float32,
    fitting_batch,
    lacks_gpu_memory,
    named,
    pick_device,
    pick_dtype,
)
from depthmill.pipeline.model.checkpoint import Checkpoint, is_joint, open_named
from depthmill.pipeline.model.geowizard import GeoWizard, check_joint
from depthmill.pipeline.model.modules import load_scheduler
from depthmill.pipeline.model.sampling import Sampler, schedule
from depthmill.pipeline.model.single_step import SingleStep, load_heads
from depthmill.pipeline.model.specialize import Specialized, can_specialize
from depthmill.pipeline.model.transfer import Pending, Staged, mark, stage, to_device
from depthmill.pipeline.types import Domain, Labels, Modality, NormalsDtype, Source, is_corpus

log = logging.getLogger(__name__)


class Labeler:
    """A loaded model. Call it on a batch of frames.

    Attributes:
        checkpoints: What is loaded, one for each label.
        processing_resolution: Longer side in pixels at which the network sees a frame.
        batch_size: Most frames in one forward pass; fewer once the GPU has run out of memory.
        round_aspect: Which sources are seen at rounded aspect ratios: `LabelConfig.round_aspect`.
        device: Where the network is.
        dtype: Of the network.
        sampling: How labels are drawn.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], config: LabelConfig):
        """Load the network.

        Args:
            checkpoints: One or two, of different modalities; a joint one, opened for each, is loaded once.
            config: The options of a run. Of `processing_resolution`s, the first checkpoint's holds if none is given;
                float32 is never TF32 (`exact_float32`); `round_aspect` is for `rounds`: frames given to the labeler
                itself are seen as `label` is told.

        Raises:
            CheckpointError: If a checkpoint cannot be loaded, or not sampled so.
            ConfigError: If there is no such device, too many steps are asked for, or what cannot be compiled is to be.
        """
        self.checkpoints = tuple(checkpoints)
        self.processing_resolution = config.processing_resolution or checkpoints[0].processing_resolution
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        exact_float32(self.device, self.dtype)
        self.sampling = config.sampling
        self.round_aspect = config.round_aspect
        self._pixels_that_fit: int | None = None  # in one forward pass, padding included; None: any that were tried
        self._sampler: Sampler | None = None
        # Whatever a caller's default device is, weights are prepared here, and unrounded in its autocast.
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            self._network = self._loaded()
            if isinstance(self._network, SingleStep) and not self.sampling.is_single_step:
                self._sampler = Sampler(self._network, self.sampling)
        self.batch_size = self._fitting() if config.batch_size == "auto" else config.batch_size
        if isinstance(self._network, Specialized):
            compile_network(self._network, self.device, config.compile, self._key)
        elif config.compile == "on":
            raise ConfigError(
                "compile is on, and this network cannot be compiled; expected one of Stable Diffusion's blocks in its "
                "single step (no GeoWizard, no diffusion in several steps): leave compile at auto (--compile auto)"
            )

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path = DEMO,
        normals_checkpoint: str | Path | None = None,
        *,
        labels: tuple[Modality, ...] | None = None,
        normals_axes: str | None = None,
        domain: Domain | None = None,
        processing_resolution: int | None = None,
        batch_size: int | Literal["auto"] = "auto",
        compile: Compile = "off",
        device: str | torch.device = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        steps: int = 1,
        ensemble: int = 1,
        noise: Noise = "zeros",
        timestep_spacing: TimestepSpacing = "trailing",
        seed: int = 0,
    ) -> Self:
        """Open and load checkpoints by name.

        Args:
            checkpoint: Depth checkpoint: `demo` (inside the package), a directory in diffusers layout, or a hub id.
            normals_checkpoint: The same for normals.
            labels: What to predict; left out, whatever there is a checkpoint for.
            normals_axes: Where the normals checkpoint's axes point, as in `left-up-towards`; left out, as it says.
            domain: `indoor` (a GeoWizard checkpoint's default), `outdoor` or `object`; other checkpoints have none.
            processing_resolution: Longer side in pixels at which the network sees a frame.
            batch_size: Most frames in one forward pass; `auto` is 8 on a CPU, fewer of large ones, and on CUDA as many
                as fit.
            compile: `on`, or `auto`, on CUDA after 5000 frames of a shape that was not compiled here before: full
                batches run compiled, minutes later.
            device: `auto` (CUDA where there is one), or a torch device, or its name.
            dtype: `auto`: bfloat16 on CUDA and on CPUs that multiply it, float32 elsewhere.
            steps: UNet calls for a label. This and the rest are for diffusion estimators: `config.Sampling`.
            ensemble: Members drawn of each frame and made one.
            noise: `zeros`, `gaussian` or `pyramid`.
            timestep_spacing: `trailing` or `leading`.
            seed: Of the noise.

        Raises:
            ConfigError: If the options do not go together.
            CheckpointError: If a checkpoint is missing, incomplete, unsafe or of another kind.
        """
        checkpoint, device = str(checkpoint), str(device)
        normals_checkpoint = None if normals_checkpoint is None else str(normals_checkpoint)
        if labels is None:
            both = normals_checkpoint is not None or checkpoint == DEMO or is_joint(checkpoint)
            labels = ("depth", "normals") if both else ("depth",)
        options = {key: value for key, value in locals().items() if key in LabelConfig.model_fields}
        config = validated(LabelConfig, options, where="the labeler's options")
        return cls(open_checkpoints(config), config)

    def __call__(self, frames: npt.NDArray[np.uint8], keys: Sequence[str] | None = None) -> Labels:
        """Label a batch of frames of one size.

        Args:
            frames: (B, H, W, 3) uint8, sRGB.
            keys: As for `submit`.

        Returns:
            Labels at the frames' own size: depth (B, H, W) float32 in [0, 1], 0 near; normals (B, H, W, 3) float32
            unit, x right, y up, z towards the viewer; uncertainty (B, H, W) float32 of ensembles' depth.

        Raises:
            TypeError: If the frames are no NumPy array.
            ValueError: If they have another shape or dtype.
        """
        if not isinstance(frames, np.ndarray):
            raise TypeError(
                f"frames is of {type(frames)}; expected a NumPy array, uint8 (B, H, W, 3): np.asarray(picture)[None] "
                "makes one of a picture, np.stack(pictures) of several of one size"
            )
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(
                f"frames is {frames.dtype} of shape {frames.shape}; expected uint8 (B, H, W, 3): "
                "one frame is frame[None]"
            )
        if not len(frames):
            shape = frames.shape[:3]
            wanted = {checkpoint.modality for checkpoint in self.checkpoints}
            return Labels(
                depth=np.zeros(shape, np.float32) if "depth" in wanted else None,
                normals=np.zeros((*shape, 3), np.float32) if "normals" in wanted else None,
                uncertainty=np.zeros(shape, np.float32) if "depth" in wanted and self.sampling.ensemble > 1 else None,
            )
        labels = self.label(list(frames), keys)
        alike = ([getattr(one, name) for one in labels] for name in ("depth", "normals", "uncertainty"))
        return Labels(*(None if parts[0] is None else np.concatenate(parts) for parts in alike))

    @property
    def compiled(self) -> bool:
        """Whether full batches run compiled, at once or, by `auto`, after some thousand pictures of a new shape."""
        return isinstance(self._network, Specialized) and self._network.compiled is not None

    @property
    def backend(self) -> str:
        """The device, and how it is used, in words."""
        after = self._network.compile_after if self.compiled else 0
        how = f"compiled after {after:,} of a new shape" if after else "compiled" if self.compiled else "not compiled"
        return f"{named(self.device)}, {str(self.dtype).removeprefix('torch.')}, batches of {self.batch_size}, {how}"

    def compile_at_once(self) -> None:
        """By `auto`, too, the first full batch of a shape runs compiled, as later ones of long runs do: to measure."""
        if self.compiled:
            self._network.compile_after = 0

    def rounds(self, source: Source) -> bool:
        """Whether the frames of a source are to be seen at rounded aspect ratios; a video's, of one size, never are."""
        if self.round_aspect is None:
            return is_corpus(source.kind, source.frames)
        return self.round_aspect and source.kind != "video"

    def processed_size(self, height: int, width: int, *, rounded: bool = False) -> tuple[int, int]:
        """Size at which the network sees a frame, before padding; with `rounded`, at a rounded aspect ratio."""
        if rounded:
            return rounded_size(height, width, self.processing_resolution, self._network.factor)
        return processed_size(height, width, self.processing_resolution)

    def batch_shape(self, height: int, width: int, *, rounded: bool = False) -> tuple[int, int]:
        """The same with its padding to the VAE's factor: frames of one such shape can share a batch."""
        return padded_size(self.processed_size(height, width, rounded=rounded), self._network.factor)

    def label(
        self,
        frames: Sequence[npt.NDArray[np.uint8]],
        keys: Sequence[str] | None = None,
        *,
        rounded: bool = False,
        packing: NormalsDtype | None = None,
    ) -> list[Labels]:
        """`submit`, and wait."""
        return self.submit(frames, keys, rounded=rounded, packing=packing).result()

    def submit(
        self,
        frames: Sequence[npt.NDArray[np.uint8]],
        keys: Sequence[str] | None = None,
        *,
        rounded: bool = False,
        packing: NormalsDtype | None = None,
    ) -> Pending:
        """Label frames that share a batch shape, though their own sizes may differ.

        On CUDA this returns once the work is queued, so that the next batch can be read meanwhile; elsewhere it is done
        by then. When the GPU runs out of memory, half as many are tried, and from then on no more pixels at once than
        those.

        Args:
            frames: Each (H, W, 3) uint8; all of one `batch_shape`.
            keys: A name for each frame, of which, with the seed, its noise is drawn, so that it has the same labels in
                any company; left out, its position.
            rounded: Whether the network sees them at rounded aspect ratios (`geometry.rounded_size`).
            packing: The dtype of a store's normals: labels come packed for it (`model/transfer.py`), not in float32.

        Returns:
            Whose `result` is one `Labels` a frame, B = 1, at that frame's size.

        Raises:
            ValueError: If a frame is something else, or there are not as many keys as frames.
        """
        shapes = [self._shape_of(frame, rounded) for frame in frames]
        if len(set(shapes)) > 1:
            raise ValueError(f"frames have the batch shapes {sorted(set(shapes))}; expected one: label each by itself")
        keys = [str(position) for position in range(len(frames))] if keys is None else keys
        if len(keys) != len(frames):
            raise ValueError(f"{len(keys)} keys are given for {len(frames)} frames; expected one for each")
        done: list[Staged] = []
        fit = self._pixels_that_fit
        began_s, asked = time.perf_counter(), mark(self.device)
        while len(done) < len(frames):
            height, width = shapes[0]
            most = self._most(height * width)
            part = slice(len(done), len(done) + most)
            try:
                with torch.autocast(self.device.type, enabled=False):  # a caller's would round what is float32 here
                    done += self._forward(frames[part], keys[part], most, rounded, packing)
                continue
            except RuntimeError as error:
                if not lacks_gpu_memory(error):
                    raise
                tried = min(most, len(frames[part]) * self.sampling.ensemble)
                if tried == 1:
                    self._pixels_that_fit = fit  # it is the picture that is too large, not the batch
                    clear_frames(error.__traceback__)  # else who keeps the error keeps what the pass had allocated
                    raise
            # Not before the exception is gone: it holds what the pass had allocated.
            torch.cuda.empty_cache()
            self._pixels_that_fit = tried // 2 * height * width
            log.warning("out of GPU memory: going on with batches of %d frames of %dx%d", tried // 2, width, height)
        return Pending(done, asked, time.perf_counter() - began_s)

    def _shape_of(self, frame: npt.NDArray[np.uint8], rounded: bool) -> tuple[int, int]:
        """The batch shape of a frame, if it is one."""
        if not isinstance(frame, np.ndarray):
            raise ValueError(f"a frame is of {type(frame)}; expected a NumPy array, uint8 (H, W, 3)")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size:
            raise ValueError(f"a frame is {frame.dtype} of shape {frame.shape}; expected uint8 (H, W, 3), not empty")
        return self.batch_shape(*frame.shape[:2], rounded=rounded)

    def _loaded(self) -> Specialized | SingleStep | GeoWizard:
        if check_joint(self.checkpoints, self.sampling):
            return GeoWizard(list(self.checkpoints), self.device, self.dtype)
        heads = load_heads(self.checkpoints)
        if self.sampling.is_single_step and all(map(can_specialize, heads)):
            return Specialized(heads, self.device, self.dtype)
        return SingleStep(heads, self.device, self.dtype)

    @property
    def _key(self) -> list[str]:
        """What decides, beside this package's code, what is compiled and how much memory a frame takes."""
        what = [*(checkpoint.sha256 for checkpoint in self.checkpoints), str(self.sampling.identity), str(self.dtype)]
        return [*what, named(self.device), torch.__version__]

    def _most(self, pixels: int) -> int:
        """Most frames of so many pixels in one forward pass."""
        fit = self.batch_size if self._pixels_that_fit is None else self._pixels_that_fit // pixels
        return max(1, min(self.batch_size, fit))

    def _fitting(self) -> int:
        """Frames in a batch, on a GPU by its free memory: for squares, which no frame exceeds."""
        side = self.processing_resolution
        if self.device.type != "cuda":
            return cpu_batch(self._network.width * side**2 * self.dtype.itemsize)
        blank = np.zeros((side, side, 3), np.uint8)

        def used_bytes(frames: int) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            Pending(self._forward([blank] * frames, ["blank"] * frames, frames, False, None), None, 0.0).result()
            return torch.cuda.max_memory_allocated(self.device) - before

        torch.cuda.empty_cache()  # what this process keeps of a labeler before this one is free, too
        free, _ = torch.cuda.mem_get_info(self.device)
        # Of tensors of more than 2^31 numbers some kernels say that they cannot.
        most = max(1, (2**31 - 1) // (self._network.width * side**2))
        return min(most, fitting_batch(used_bytes, free, [*self._key, str(side)]))

    def _forward(
        self,
        frames: Sequence[npt.NDArray[np.uint8]],
        keys: Sequence[str],
        most: int,
        rounded: bool,
        packing: NormalsDtype | None,
    ) -> list[Staged]:
        sizes = [self.processed_size(*frame.shape[:2], rounded=rounded) for frame in frames]
        sized, factor = zip(frames, sizes, strict=True), self._network.factor
        # (B, 3, h', w')
        pictures = torch.stack([to_network(to_device(frame, self.device), size, factor) for frame, size in sized])
        answers: Mapping[Modality, torch.Tensor | list[torch.Tensor]]
        uncertainties = None
        if self._sampler is not None:
            answers, uncertainties = self._sampler(pictures, sizes, keys, most)
        elif isinstance(self._network, GeoWizard):
            answers = self._network(pictures, sizes)
        elif isinstance(self._network, Specialized):
            # Other batches are of too many sizes to compile each; which are full, the segment alone decides.
            answers = self._network(pictures, full=len(frames) == most)
        else:
            answers = self._network(pictures)
        return stage(answers, uncertainties, sizes, [frame.shape[:2] for frame in frames], packing)


def open_checkpoints(config: LabelConfig) -> list[Checkpoint]:
    """Find and check the checkpoints of a run, depth first, without loading them.

    Raises:
        ConfigError: If nothing is given that answers normals, or depth, or an option is not for these checkpoints.
        CheckpointError: If a checkpoint is missing, incomplete, unsafe or of another kind.
    """
    alone = config.normals_checkpoint is None and config.checkpoint != DEMO
    if "normals" in config.labels and alone and not is_joint(config.checkpoint):
        raise ConfigError(
            f"normals are asked for, but only a depth checkpoint is given ({config.checkpoint}); "
            "add normals_checkpoint (--normals-checkpoint, or of depthmill evaluate --checkpoint), or set labels to "
            "depth (--labels depth of depthmill label)"
        )
    if config.checkpoints.get("depth") == DEMO and config.checkpoints.get("normals", DEMO) != DEMO:
        raise ConfigError(
            f"normals are to be {config.normals_checkpoint}'s, and depth the demonstration model's; set labels to "
            "normals (--labels normals), or give a depth checkpoint (--checkpoint)"
        )
    checkpoints = open_named(config)
    check_joint(checkpoints, config.sampling)
    if not config.sampling.is_single_step:
        with torch.device("cpu"):
            for checkpoint in checkpoints:
                schedule(load_scheduler(checkpoint), config.sampling)
    return checkpoints
