"""The plan: inputs probed one by one, each cut into shard-aligned segments, minus what the store has committed.

Probing is work for workers: it may be slow, and a broken file may take its process along. What comes back to the driver
of a source is small, however many frames it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from depthmill.pipeline.sources import open_source, source_id
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.sources.stamp import stamp
from depthmill.pipeline.store import Store, open_store, records
from depthmill.pipeline.types import Segment


@dataclass(frozen=True)
class Task:
    """A segment to be labelled, and what a worker needs to find it.

    Attributes:
        uri: Of the source, as it was given: it is opened by this name.
        fingerprint: Of the source; a worker that finds another refuses the segment.
        segment: Which frames.
        only: Frames of a committed segment that are to be labelled again, its others staying as they are; empty for all
            of a segment that is not committed.
        skip: (frame, reason) of those that are not to be read, since they take the worker along.
        searched: Whether it has been searched for such frames.
        attempts: How many have failed.
        losses: How many ended with the worker's whole machine, for which it is not to blame at first.
    """

    uri: str
    fingerprint: str
    segment: Segment
    only: tuple[int, ...] = ()
    skip: tuple[tuple[int, str], ...] = ()
    searched: bool = False
    attempts: int = 0
    losses: int = 0

    @property
    def frames(self) -> int:
        """Number of frames to label."""
        return len(self.only) or self.segment.frames

    def __str__(self) -> str:
        return str(self.segment)


@dataclass(frozen=True)
class Planned:
    """A source that has been probed and is in the store.

    Attributes:
        uri: As it was given.
        id: Of its group in the store.
        fingerprint: What workers must find.
        frames: Number of frames.
        segment_frames: Frames in each segment but the last.
        labelled: Frames with labels in committed segments.
        failed: Frames without, there.
        pending: Half-open runs of numbers of segments that are not committed, in order.
        redo: Committed segments to be mended: their number, and the frames.
        stamp: By which a later run knows that it need not be probed again, if nothing is left to do, as long as the
            store has this fingerprint; "" if it must be.
    """

    uri: str
    id: str
    fingerprint: str
    frames: int
    segment_frames: int
    labelled: int
    failed: int
    pending: tuple[tuple[int, int], ...]
    redo: tuple[tuple[int, tuple[int, ...]], ...] = ()
    stamp: str = ""

    @property
    def segments(self) -> int:
        """Number of segments to work on."""
        return sum(stop - start for start, stop in self.pending) + len(self.redo)

    @property
    def frames_left(self) -> int:
        """Number of frames to label."""
        return self.frames - self.labelled - self.failed + sum(len(frames) for _, frames in self.redo)

    def task(self, number: int) -> Task:
        """The task of segment `number`, from 0."""
        start = number * self.segment_frames
        segment = Segment(self.id, start, min(start + self.segment_frames, self.frames))
        return Task(self.uri, self.fingerprint, segment)

    def mending(self) -> Iterator[Task]:
        """The tasks of `redo`."""
        for number, frames in self.redo:
            yield replace(self.task(number), only=frames)


class Prober:
    """Probes sources and puts them into the store. In-process, or as a Ray actor (`workers/probe_actors.py`)."""

    def __init__(
        self, store: str, max_pixels: int, max_frames: int, retry_failed: bool, sources: OpenSources | None = None
    ) -> None:
        """Nothing is opened yet.

        Args:
            store: Where the store is, which exists.
            max_pixels: Pictures with more are failed frames.
            max_frames: Sources with more are refused.
            retry_failed: Whether failed frames of earlier runs are to be labelled again.
            sources: Where to leave open what has frames to label, for a worker in the same process.
        """
        self._uri = store
        self._limits = (max_pixels, max_frames)
        self._retry_failed = retry_failed
        self._sources = sources

    def load(self) -> str:
        """Open the store."""
        self._store: Store = open_store(self._uri, index=False)
        self._stamps = records.read_stamps(self._store.directory)
        return ""

    @property
    def known(self) -> int:
        """How many sources have a stamp."""
        return len(self._stamps)

    def finished(self, uri: str) -> Planned | None:
        """An input of which nothing is left to do, and that is as it was when it was probed; nothing of it is read.

        Raises:
            SourceError: If it cannot be found.
            StoreError: If the store cannot be read.
        """
        name, (max_pixels, max_frames) = source_id(uri), self._limits
        if name not in self._stamps or not self._store.has(name):
            return None
        planned = self._plan(uri, name)
        if planned.segments or planned.frames > max_frames:
            return None
        seen = _mark(stamp(uri, max_pixels), planned)
        return replace(planned, stamp=seen) if seen == self._stamps[name] else None

    def probe(self, uri: str, anew: bool = False) -> Planned:
        """Probe one input, unless it is `finished`, add it to the store, and say what is to be done of it.

        Args:
            uri: As for `open_source`.
            anew: Whether to read it even if it is finished, to see whether inputs can be read.

        Raises:
            SourceError: If it cannot be opened, or has nothing in it.
            StoreError: If the store cannot take it, or has it with other contents (StoreMismatchError).
        """
        if not anew and (done := self.finished(uri)) is not None:
            return done
        max_pixels, max_frames = self._limits
        opened = open_source(uri, max_pixels=max_pixels, max_frames=max_frames)
        try:
            seen = stamp(uri, max_pixels)  # before anything is read: what changes meanwhile has another afterwards
            source = opened.probe()
            self._store.add_source(source)
            planned = self._plan(uri, source.id)
            planned = replace(planned, stamp=_mark(seen, planned))
        except BaseException:
            opened.close()
            raise
        if self._sources is not None and planned.segments:
            self._sources.keep(uri, opened)
        else:
            opened.close()
        return planned

    def _plan(self, uri: str, name: str) -> Planned:
        attributes, progress = self._store.attributes(name), self._store.progress(name)
        redo = self._store.failed_segments(name) if self._retry_failed and progress.failed else []
        length = self._store.segment_frames(name)
        return Planned(
            uri=uri,
            id=name,
            fingerprint=attributes["fingerprint"],
            frames=attributes["frames"],
            segment_frames=length,
            labelled=progress.labelled,
            failed=progress.failed,
            pending=progress.pending,
            redo=tuple((segment.start // length, frames) for segment, frames in redo),
        )


def _mark(seen: str, planned: Planned) -> str:
    """A stamp with the fingerprint of what the store has; "" if there is no stamp."""
    return seen and f"{seen} {planned.fingerprint}"
