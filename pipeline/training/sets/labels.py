"""A depthmill store as a training set: its labels are the truth ("pseudo-labels"), its sources the pictures."""

from __future__ import annotations

import logging
import os
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from depthmill.pipeline.config import Folder, FolderOrName
from depthmill.pipeline.errors import (
    SampleError,
    SourceChangedError,
    SourceError,
    StoreDamagedError,
    StoreError,
    TrainingError,
)
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.pipeline.store import Store, open_store
from depthmill.pipeline.store.rows import open_labels
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.training.sets.samples import SetOptions, sample
from depthmill.pipeline.types import LABELLED, MAX_FRAMES, MAX_PIXELS, Frame, FrameSource, Modality

logger = logging.getLogger(__name__)

_OPEN_SOURCES = 8  # kept open by a process; frames come in any order


class StoreOptions(SetOptions):
    """Labels of a store, made by `depthmill label`.

    The depth loss is in the unit of its truth, and is not normalised: a store's labels span 1 at most, a set in metres
    some 5 (rooms) to 75 (streets). Where both are trained on, a store's batches weigh less by as much.

    Attributes:
        path: The store, or its URL. The files that were labelled must be where they were, unchanged.
        height: Rows of a training picture: the middle of a frame, of this aspect ratio, is resized to it.
        width: Columns.
    """

    kind: Literal["store"] = "store"
    path: FolderOrName | Folder
    height: int = Field(gt=0)
    width: int = Field(gt=0)


class StoredLabels:
    """The labelled frames of all sources of a store; pending and failed ones are left out.

    Stored depth is affine-invariant, in [0, 1]. It is given as 1 + depth, in [1, 2]: to a loss that fits scale and
    shift the same, and greater than 0, as AbsRel asks for. Normals are what the model said, which seldom, at grazing
    angles, faces away from the camera.

    A frame of a video is decoded from the keyframe before it: videos of few keyframes are slow to train from.
    """

    def __init__(self, options: StoreOptions, modality: Modality) -> None:
        """List the labelled frames, and see that every source is there and unchanged.

        Raises:
            TrainingError: If there is no store, it lacks this modality or any labelled frame, or a source is missing or
                has changed.
        """
        self.modality: Modality = modality
        self._options = options
        self._opened: dict[int, _Opened] = {}  # by process
        try:
            self._store = open_store(options.path)
        except StoreError as error:
            raise TrainingError(str(error)) from error
        if modality not in self._store.layout.labels:
            stored = ", ".join(self._store.layout.labels)
            raise TrainingError(f"{options.path} has labels of {stored}; expected {modality}: label with it")
        sources = self._store.sources()
        for why in self._store.damaged.values():
            logger.warning("%s; it is left out", why)
        labelled = {one: self._labelled(one) for one in sources}
        self._sources = [one for one, frames in labelled.items() if frames.size]
        if not self._sources:
            raise TrainingError(f"{options.path} has no labelled frame: run `depthmill label` to its end")
        # Numbers of frames, source by source, and where those of each source end: there may be tens of millions.
        self._frames = np.concatenate([labelled[one] for one in self._sources])
        self._ends = np.cumsum([labelled[one].size for one in self._sources])
        frames = sum(self._store.attributes(one)["frames"] for one in sources)
        if lost := frames - len(self):
            logger.warning("%s: %d of %d frames have no labels and are left out", options.path, lost, frames)

    def _labelled(self, source_id: str) -> npt.NDArray[np.int32]:
        """The numbers of a source's labelled frames; if there are any, it is opened and probed."""
        frames = np.flatnonzero(self._store.status(source_id) == LABELLED).astype(np.int32)
        if frames.size:
            opened = _Opened(self._store, self.modality)
            try:
                opened.source(source_id)
            except SourceError as error:
                uri = self._store.attributes(source_id)["uri"]
                raise TrainingError(
                    f"{self._options.path} has labels of {uri}, which cannot be opened ({error}): put it back"
                ) from error
            opened.sources.close()
        return frames

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open."""
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        """Number of labelled frames."""
        return len(self._frames)

    def read(self, index: int) -> Batch:
        """One frame; see `TrainingSet.read`."""
        source_id = self._sources[np.searchsorted(self._ends, index, side="right")]
        number = int(self._frames[index])
        # Decoders have threads, which do not survive a fork: a process leaves those of its parent alone.
        opened = self._opened.setdefault(os.getpid(), _Opened(self._store, self.modality))
        where = f"{self._store.attributes(source_id)['uri']}, frame {number}"
        frame = opened.frame(source_id, number)
        if frame.image is None:
            raise SampleError(f"{where}: {frame.error}")
        try:
            labels: npt.NDArray[Any] = opened.labels(source_id).read(number)
        except StoreDamagedError as error:
            raise SampleError(str(error)) from error
        if self.modality == "depth":
            target, mask = 1 + labels, ~np.isnan(labels)
        else:
            length = np.linalg.norm(labels, axis=-1)
            mask = length != 0
            target = labels / np.where(mask, length, 1)[..., None]
        if not mask.any():  # as if there were no file: is there a store?
            open_store(self._options.path, index=False)
        return sample(where, frame.image, target, mask, (self._options.height, self._options.width))


class _Opened:
    """What one process has open: a few sources, and their labels; of other sources it keeps what probing found.

    That is some hundred bytes a picture. Probing again, a source's pictures are as many headers to be read for one.
    """

    def __init__(self, store: Store, modality: Modality) -> None:
        self._store = store
        # One thread: every worker of a data loader has its own.
        self.sources = OpenSources(MAX_PIXELS, MAX_FRAMES, threads=1, at_once=_OPEN_SOURCES)
        self._probed: dict[str, FrameSource] = {}
        self.labels = lru_cache(_OPEN_SOURCES)(partial(open_labels, store, name=modality))

    def source(self, source_id: str) -> FrameSource:
        """A source as it was labelled, open or closed."""
        attributes = self._store.attributes(source_id)
        uri = attributes["uri"]
        if uri in self._probed:
            return self._probed[uri]
        try:
            self._probed[uri] = self.sources.open(uri, attributes["fingerprint"])
            return self._probed[uri]
        except SourceChangedError as error:
            raise TrainingError(
                f"{uri} is not the file that was labelled into {self._store.uri}: put it back, or label it anew"
            ) from error

    def frame(self, source_id: str, number: int) -> Frame:
        """A source's; one that turns out to be another is probed anew, when it is asked for again."""
        uri = self._store.attributes(source_id)["uri"]
        try:
            with self.sources.dropping(uri):
                (frame,) = self.source(source_id).read(number, number + 1)
            return frame
        except SourceChangedError:
            del self._probed[uri]
            raise
