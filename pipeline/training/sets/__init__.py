"""Training sets. Adding a kind: a file with its options and its reader, two lines here, a subclass of the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from depthmill.pipeline.training.batch import TrainingSet
from depthmill.pipeline.training.sets.hypersim import Hypersim, HypersimOptions
from depthmill.pipeline.training.sets.labels import StoredLabels, StoreOptions
from depthmill.pipeline.training.sets.rendered import Rendered, SceneOptions
from depthmill.pipeline.training.sets.vkitti2 import VKitti2, VKitti2Options
from depthmill.pipeline.types import Modality

__all__ = ["SetConfig", "open_set"]

# One entry of a configuration's list of sets: the options of the kind that it names.
SetConfig = Annotated[HypersimOptions | VKitti2Options | SceneOptions | StoreOptions, Field(discriminator="kind")]

_KINDS: dict[str, Callable[[Any, Modality], TrainingSet]] = {
    "hypersim": Hypersim,
    "vkitti2": VKitti2,
    "scenes": Rendered,
    "store": StoredLabels,
}


def open_set(config: SetConfig, modality: Modality) -> TrainingSet:
    """Open a training set for one modality: its pictures are listed, none is read.

    Raises:
        TrainingError: If it is not there, or has not one picture with all its files.
    """
    return _KINDS[config.kind](config, modality)
