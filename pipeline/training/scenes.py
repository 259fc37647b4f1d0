"""Procedurally generated scenes: a seed in, a furnished world with a camera and a light out.

Seven kinds of place: rooms and corridors; streets at eye level, yards seen from above as surveillance cameras see them,
and towers seen from below; open ground with a sky; people close by; things at arm's length. Everything about a scene
follows from its seed, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from depthmill.pipeline.training.places import PLACES
from depthmill.pipeline.training.raycast import Views, concatenate, render
from depthmill.pipeline.training.shapes import Scene

# Of what a seed makes: raised with every change to places, props or textures, so that pools do not mix old and new.
VERSION = 2

# Scenes rendered at once on a CPU: few enough that one shape's working set stays in the cache.
_BATCH = 2
# Pixels rendered at once on a GPU, 400 bytes each: 100 scenes of 144x192, 1 GB for each process that renders.
_PIXELS = 100 * 144 * 192


def sample(seed: int) -> Scene:
    """Make up a scene."""
    rng = np.random.default_rng(seed)
    places = list(PLACES)
    place = places[rng.choice(len(places), p=list(PLACES.values()))]
    return place(rng)


def view(seeds: Sequence[int], height: int, width: int, *, device: torch.device | None = None) -> Views:
    """Make up the scenes of some seeds and render them: see `raycast.render`."""
    batch = _BATCH if device is None or device.type == "cpu" else max(1, _PIXELS // (height * width))
    parts = [
        render([sample(seed) for seed in seeds[start : start + batch]], height, width, device=device)
        for start in range(0, len(seeds), batch)
    ]
    return concatenate(parts)
