"""What the kinds of sources have in common."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Generic

from depthmill.pipeline.sources.naming import canonical_uri
from depthmill.pipeline.sources.parked import Parked, T
from depthmill.pipeline.sources.versions import Probed, Version


class BaseSource(Generic[Probed, T]):
    """An input that is probed when that is first asked for, and what a read of it leaves open for the next."""

    def __init__(self, uri: str | Path, max_pixels: int, max_frames: int, threads: int) -> None:
        """Name an input, without opening it; the options are `open_source`'s."""
        self._uri = canonical_uri(uri)
        self._max_pixels, self._max_frames, self._threads = max_pixels, max_frames, threads
        self._lock = threading.Lock()
        self._probed: Probed | None = None
        self._version = Version(None)  # that was probed
        self._parked = Parked[T]()

    def close(self) -> None:
        """Release what is open; reads that are still running release theirs when they end."""
        self._parked.close()

    def _open(self) -> Probed:
        with self._lock:
            if self._probed is None:
                self._probed = self._probe()
            return self._probed

    def _probe(self) -> Probed:
        raise NotImplementedError
