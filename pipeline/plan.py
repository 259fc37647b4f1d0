"""The plan: every input probed, cut into shard-aligned segments, minus what the store has committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.pipeline.store import Store
from depthmill.pipeline.types import Failure, Segment, Source


@dataclass(frozen=True)
class Task:
    """A segment to be labelled, and what a worker needs to find it.

    Attributes:
        uri: Of the source.
        fingerprint: Of the source; a worker that finds another refuses the segment.
        segment: Which frames.
        attempts: How many have failed.
    """

    uri: str
    fingerprint: str
    segment: Segment
    attempts: int = 0


def probe_inputs(inputs: Sequence[str], max_pixels: int) -> tuple[list[Source], list[Failure]]:
    """Expand and probe the inputs, in order.

    Args:
        inputs: Files, folders, globs.
        max_pixels: Pictures with more are failed frames.

    Returns:
        Those that can be opened, and for each other one why not.
    """
    sources: list[Source] = []
    failures: list[Failure] = []
    for uri in expand_inputs(inputs):
        try:
            source = open_source(uri, max_pixels=max_pixels)
            try:
                sources.append(source.probe())
            finally:
                source.close()
        except SourceError as error:
            failures.append(Failure(uri=uri, source_id=None, frame=None, reason=str(error)))
    return sources, failures


def pending_tasks(store: Store, sources: Sequence[Source]) -> list[Task]:
    """What is left to do: the segments of `sources` that `store`, which has been told of them, has not committed."""
    return [Task(source.uri, source.fingerprint, segment) for source in sources for segment in store.pending(source.id)]
