"""What runs leave at a store's root beside its labels, for people and later runs. No label depends on it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import Directory
from depthmill.pipeline.store.layout import Document
from depthmill.pipeline.store.root import FAILURES, RUN, STAMPS
from depthmill.pipeline.types import Failure


def has_run(directory: Directory) -> bool:
    """Whether a run that labelled something has ended."""
    return directory.read(RUN) is not None


def read_run(directory: Directory) -> Document:
    """What `run.json` tells of the last run that labelled something; empty if none has ended.

    Raises:
        StoreError: If it is damaged.
    """
    try:
        found = json.loads(directory.read(RUN) or b"{}")
        if not isinstance(found, dict):
            raise ValueError(f"it holds {found!r:.80}, not an object")
    except ValueError as error:
        raise StoreError(
            f"{directory.uri}/{RUN} is damaged ({error}): remove it; no label depends on what it tells of the last run"
        ) from error
    return found


def write_run(directory: Directory, values: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    directory.write(RUN, (json.dumps(values, indent=2) + "\n").encode())


def read_stamps(directory: Directory) -> dict[str, str]:
    """Source id -> `Planned.stamp`, of when the input was last probed. What is damaged is as if it were not there."""
    try:
        found = json.loads(directory.read(STAMPS) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def write_stamps(directory: Directory, stamps: Mapping[str, str]) -> None:
    """Write `stamps.json`, if it changes: these, and those that are there of other sources.

    Of two runs that do so at once one may undo what the other did: inputs are probed again then.
    """
    before = read_stamps(directory)
    after = {source_id: found for source_id, found in (before | dict(stamps)).items() if found}
    if after != before:
        directory.write(STAMPS, json.dumps(after, indent=0, sort_keys=True).encode())


def unopened(directory: Directory) -> list[str]:
    """Why inputs of the last run could not be opened, one by one, as `failures.jsonl` has it.

    Raises:
        StoreError: If it is damaged.
    """
    lines = (directory.read(FAILURES) or b"").splitlines()  # of bytes: text would be split at U+2028, too
    try:
        return [str(failure["reason"]) for failure in map(json.loads, lines) if failure["source_id"] is None]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{directory.uri}/{FAILURES} is damaged ({error!r}): remove it; the next run of the same `depthmill label` "
            "writes it again"
        ) from error


def write_failures(directory: Directory, failures: Iterable[Failure]) -> None:
    """Write `failures.jsonl`, if it changes: one line for each frame or source without labels, and why.

    Args:
        directory: The store's.
        failures: Its own (`Store.failures`), and those that it cannot know: inputs that could not be opened.
    """
    lines = [
        json.dumps(
            {"uri": f.uri, "source_id": f.source_id, "frame": f.frame}
            | ({} if f.key is None else {"key": f.key})
            | {"reason": f.reason}
        )
        for f in sorted(failures, key=lambda f: (f.uri, f.source_id or "", f.frame or 0, f.reason))
    ]
    data = "".join(f"{line}\n" for line in lines).encode()
    if directory.read(FAILURES) != data:  # a finished store may be where nothing can be written
        directory.write(FAILURES, data)
