"""What a run's store is, by its configuration: how labels are laid out in it, and what decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.model.checkpoint import Checkpoint
from depthmill.pipeline.store import Layout


def layout(config: LabelConfig) -> Layout:
    """How a run's labels are laid out on disk."""
    usual, corpus = config.segment_lengths
    return Layout(
        labels=config.labels,
        shard_frames=config.shard_frames,
        segment_frames=usual,
        corpus_segment_frames=corpus,
        normals_dtype=config.normals_dtype,
        uncertainty=config.ensemble > 1 and "depth" in config.labels,
    )


def identity(config: LabelConfig, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What decides the labels: a run with another identity is not mixed into a store.

    Batch size, threads and the kind of device are not in it: they change float rounding alone.
    """
    sampling = config.sampling
    return {
        "checkpoints": {checkpoint.modality: checkpoint.identity for checkpoint in checkpoints},
        "processing_resolution": config.processing_resolution or checkpoints[0].processing_resolution,
        "dtype": config.dtype,
        **({} if sampling.is_single_step else {"sampling": sampling.identity}),
        **({} if config.round_aspect is None else {"round_aspect": config.round_aspect}),
    }
