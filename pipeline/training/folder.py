"""A run's folder: its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.store import write_atomically

_CONFIG = "config.json"


def write_config(folder: Path, document: Mapping[str, Any]) -> None:
    """Record what a run was told."""
    write_atomically(folder / _CONFIG, (json.dumps(document, indent=2) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """What the run in a folder was told.

    Raises:
        TrainingError: If that cannot be read.
    """
    path = folder / _CONFIG
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}); expected the configuration of the run whose states are beside it: put "
            "it back, or start over with --overwrite"
        ) from error
    return document


def refuse_other_kind(folder: Path, *, stages: bool) -> None:
    """See that a folder holds no run of the other kind: without `stages` for one with them, and the reverse.

    Raises:
        TrainingError: If it does, or what it holds cannot be read.
    """
    if (folder / _CONFIG).exists() and ("stages" in read_config(folder)) != stages:
        raise TrainingError(
            f"{folder} holds a run {'without' if stages else 'with'} stages: train into another folder, or start over "
            "with --overwrite"
        )
