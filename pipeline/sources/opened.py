"""The sources that a worker has open, a few at a time."""

from __future__ import annotations

import threading

from depthmill.pipeline.errors import SourceChangedError
from depthmill.pipeline.sources import open_source, shown
from depthmill.pipeline.types import FrameSource

_OPEN_SOURCES = 2  # so that the next segment of the same video goes on where the last ended


class OpenSources:
    """The sources that a worker has open."""

    def __init__(self, max_pixels: int, max_frames: int) -> None:
        """None yet; the limits are `open_source`'s."""
        self._limits = (max_pixels, max_frames)
        self._sources: dict[str, FrameSource] = {}
        self._lock = threading.Lock()

    def open(self, uri: str, fingerprint: str) -> FrameSource:
        """The source at `uri`; it stays open.

        Raises:
            SourceChangedError: If it is not the one with this fingerprint.
        """
        with self._lock:
            if uri in self._sources:
                self._sources[uri] = self._sources.pop(uri)  # last used, last to go
                return self._sources[uri]
            while len(self._sources) >= _OPEN_SOURCES:
                self._sources.pop(next(iter(self._sources))).close()
            max_pixels, max_frames = self._limits
            source = open_source(uri, max_pixels=max_pixels, max_frames=max_frames)
            if source.probe().fingerprint != fingerprint:
                source.close()
                raise SourceChangedError(
                    f"{shown(uri)} is not the file that the run was planned with; expected it unchanged, and the same "
                    "on every machine: put it back, or label it into another store"
                )
            self._sources[uri] = source
            return source

    def keep(self, uri: str, source: FrameSource) -> None:
        """Take over a source that was opened to be probed, for whoever opens it next; without room it is closed."""
        with self._lock:
            if uri not in self._sources and len(self._sources) < _OPEN_SOURCES:
                self._sources[uri] = source
                return
        source.close()

    def close(self) -> None:
        """Release all of them."""
        while self._sources:
            self._sources.popitem()[1].close()
