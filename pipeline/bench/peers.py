"""diffusers' Marigold pipelines on the same checkpoints: what depthmill's speed is measured against."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import MarigoldDepthPipeline, MarigoldNormalsPipeline
from diffusers.pipelines.marigold.marigold_image_processing import MarigoldImageProcessor
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from depthmill.pipeline.model.backend import lacks_gpu_memory
from depthmill.pipeline.model.checkpoint import Checkpoint, read_json
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.model.modules import load_scheduler

log = logging.getLogger(__name__)

Pictures = Sequence[npt.NDArray[np.uint8]]
_KINDS = {"depth": MarigoldDepthPipeline, "normals": MarigoldNormalsPipeline}


def why_not(checkpoint: Checkpoint) -> str:
    """Why diffusers' pipelines cannot use a checkpoint; empty if they can."""
    if checkpoint.domain is not None:
        return f"{checkpoint.name} is a joint (GeoWizard) checkpoint, for which diffusers has no pipeline"
    unet = read_json(checkpoint.directory / "unet" / "config.json")
    if unet.get("in_channels") != 2 * unet.get("out_channels", 4):
        return f"{checkpoint.name}'s UNet takes no noise, which diffusers' Marigold pipelines always give"
    return ""


def load_pipelines(labeler: Labeler, *, compiled: bool = False) -> list[Any]:
    """The pipelines of a labeler's checkpoints, each with its own weights; diffusers shows no progress from then on.

    Args:
        labeler: Whose checkpoints, device and dtype; `why_not` is empty for each checkpoint.
        compiled: Whether UNet, encoder and decoder go through `torch.compile`, as diffusers' guide to Marigold says.
    """
    pipelines = []
    disable_progress_bar()
    if labeler.device.type == "cpu" and labeler.dtype != torch.float32:
        _resize_in_float32()
    for checkpoint in labeler.checkpoints:
        # Cast after loading: the option for it has had two names in the versions of diffusers that we accept.
        pipeline = _KINDS[checkpoint.modality].from_pretrained(checkpoint.directory, local_files_only=True)
        pipeline.to(labeler.device, labeler.dtype)
        pipeline.scheduler = load_scheduler(checkpoint)  # Marigold's pipelines cannot use all others
        pipeline.set_progress_bar_config(disable=True)
        if compiled:
            mode = "reduce-overhead" if labeler.device.type == "cuda" else "default"
            pipeline.unet = torch.compile(pipeline.unet, mode=mode)
            pipeline.vae.encoder = torch.compile(pipeline.vae.encoder, mode=mode)
            pipeline.vae.decoder = torch.compile(pipeline.vae.decoder, mode=mode)
        pipelines.append(pipeline)
    return pipelines


def as_documented(pipelines: Sequence[Any], labeler: Labeler, pictures: Pictures) -> Callable[[], int]:
    """Each picture through each pipeline by itself, `pipe(image)`; with the labeler's steps, members and resolution."""
    images = [Image.fromarray(picture) for picture in pictures]

    def run() -> int:
        for image in images:
            for pipeline in pipelines:
                pipeline(image, **_options(labeler))
        return len(images)

    return run


def batched(pipelines: Sequence[Any], labeler: Labeler, pictures: Pictures) -> Callable[[], int]:
    """All pictures, of one size, through each pipeline at once; half as many, if the GPU has no memory for that."""
    images = [Image.fromarray(picture) for picture in pictures]
    most = len(images) * labeler.sampling.ensemble

    def label(pipeline: Any) -> None:
        nonlocal most
        try:
            pipeline(images, batch_size=most, **_options(labeler))
            return
        except RuntimeError as error:
            if most == 1 or not lacks_gpu_memory(error):
                raise
        # Not before the exception is gone: it holds what the pass had allocated.
        torch.cuda.empty_cache()
        most //= 2
        log.warning("out of GPU memory beside the labeler: diffusers goes on with batches of %d", most)
        label(pipeline)

    def run() -> int:
        for pipeline in pipelines:
            label(pipeline)
        return len(images)

    return run


def ours(labeler: Labeler, pictures: Pictures) -> Callable[[], int]:
    """All pictures, of one size, through the labeler; on a GPU four batches of them, queued as workers queue them."""
    batches = 4 if labeler.device.type == "cuda" else 1

    def run() -> int:
        pending = [labeler.submit(pictures) for _ in range(batches)]
        return sum(len(batch.result()) for batch in pending)

    return run


def _resize_in_float32() -> None:
    """Half precision on CPUs: torch has no antialiased resizing in it, without which the pipelines stop at once."""
    resize = MarigoldImageProcessor.resize_antialias

    def wide(image: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return resize(image.float(), *arguments, **options).to(image.dtype)  # type: ignore[no-any-return]

    MarigoldImageProcessor.resize_antialias = staticmethod(wide)


def _options(labeler: Labeler) -> dict[str, Any]:
    return {
        "num_inference_steps": labeler.sampling.steps,
        "ensemble_size": labeler.sampling.ensemble,
        "processing_resolution": labeler.processing_resolution,
    }
