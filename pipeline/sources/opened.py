"""The sources that a worker has open, a few at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from depthmill.pipeline.errors import SourceChangedError
from depthmill.pipeline.sources import open_source, shown
from depthmill.pipeline.sources.versions import changed
from depthmill.pipeline.types import FrameSource

_AT_ONCE = 2  # so that the next segment of the same video goes on where the last ended


class OpenSources:
    """The sources that a worker has open."""

    def __init__(self, max_pixels: int, max_frames: int, *, threads: int = 0, at_once: int = _AT_ONCE) -> None:
        """None yet, and `at_once` at most; the other options are `open_source`'s."""
        self._options = {"max_pixels": max_pixels, "max_frames": max_frames, "threads": threads}
        self._at_once = at_once
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
            while len(self._sources) >= self._at_once:
                self._sources.pop(next(iter(self._sources))).close()
            source = open_source(uri, **self._options)
            if source.probe().fingerprint != fingerprint:
                source.close()
                raise changed(shown(uri))
            self._sources[uri] = source
            return source

    @contextmanager
    def dropping(self, uri: str) -> Iterator[None]:
        """Close the source at `uri` if it turns out to be another one: whoever opens it next has it probed anew."""
        try:
            yield
        except SourceChangedError:
            with self._lock:
                source = self._sources.pop(uri, None)
            if source is not None:
                source.close()
            raise

    def keep(self, uri: str, source: FrameSource) -> None:
        """Take over a source that was opened to be probed, for whoever opens it next; without room it is closed."""
        with self._lock:
            if uri not in self._sources and len(self._sources) < self._at_once:
                self._sources[uri] = source
                return
        source.close()

    def close(self) -> None:
        """Release all of them."""
        while self._sources:
            self._sources.popitem()[1].close()
