"""The nouns of depthmill: what crosses the boundary between one module and the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Modality = Literal["depth", "normals"]
Domain = Literal["indoor", "outdoor", "object"]
NormalsDtype = Literal["int8", "int16", "float16"]
SourceKind = Literal["video", "images", "webdataset", "parquet"]

# Pictures in a folder from which on it is a corpus.
CORPUS_PICTURES = 1024

# How large a picture, and how long an input, may be by default.
MAX_PIXELS = 1 << 27  # 134 megapixels
MAX_FRAMES = 10_000_000

# Codes of the store's `status` array.
PENDING, LABELLED, FAILED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Source:
    """One probed input.

    Attributes:
        id: Name of its group in the store; derived from `uri` alone, so that a rerun finds it again.
        uri: Absolute path of the file or folder, or its URL without what is secret in it.
        kind: What reads it.
        frames: True number of frames: counted from the packets (video), the files (images), the samples with a
            picture (webdataset) or the rows (parquet).
        height: Rows in pixels, upright; of pictures, the tallest that can be read.
        width: Columns in pixels, upright; of pictures, the widest that can be read.
        fps: Mean frames per second, or None for pictures.
        fingerprint: Hash of what must not change between two runs into one store.
        time_s: (frames,) float64, seconds since the first frame; None for pictures.
        keys: One name for each frame, unique in the source; None for video.
    """

    id: str
    uri: str
    kind: SourceKind
    frames: int
    height: int
    width: int
    fps: float | None
    fingerprint: str
    time_s: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    keys: tuple[str, ...] | None = field(default=None, repr=False)


def is_corpus(kind: SourceKind, frames: int) -> bool:
    """Whether a source is so many pictures that full batches are worth rounded aspect ratios and long segments.

    Shards are, whatever their number of pictures: they are a corpus's way of being stored. A folder is from
    `CORPUS_PICTURES` on.
    """
    return kind in ("webdataset", "parquet") or (kind == "images" and frames >= CORPUS_PICTURES)


@dataclass(frozen=True, order=True)
class Segment:
    """A half-open run of frames [start, stop) of one source: the unit of work, retry and commit."""

    source_id: str
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.source_id}[{self.start}:{self.stop}]"


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame as read: a picture, or the reason why there is none.

    Attributes:
        index: Position in its source, from 0.
        image: (H, W, 3) uint8, sRGB, upright; None if it could not be read.
        error: Why `image` is None, else "".
    """

    index: int
    image: npt.NDArray[np.uint8] | None
    error: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of its picture."""
        return 0 if self.image is None else self.image.nbytes


@dataclass(frozen=True, eq=False)
class Labels:
    """What the model says of a batch of B frames of one size H x W.

    Attributes:
        depth: (B, H, W) float32 in [0, 1], affine-invariant, 0 near and 1 far; None if not asked for.
        normals: (B, H, W, 3) float32 unit vectors in the camera's frame, x right, y up, z towards the viewer;
            None if not asked for.
        uncertainty: (B, H, W) float32, in units of depth, 0 where all agree: the median absolute deviation of an
            ensemble's members from `depth`; None without an ensemble.

    A labeler that is asked to pack them gives all three in the integers of a store (`store/layout.py`), normals with x,
    y and z apart in memory.
    """

    depth: npt.NDArray[Any] | None
    normals: npt.NDArray[Any] | None
    uncertainty: npt.NDArray[Any] | None = None

    def frame(self, i: int) -> tuple[npt.NDArray[Any] | None, ...]:
        """Depth (H, W), normals (H, W, 3) and uncertainty (H, W) of the batch's `i`th."""
        return tuple(None if one is None else one[i] for one in (self.depth, self.normals, self.uncertainty))


@dataclass(frozen=True)
class Failure:
    """A frame, or a whole source where `frame` is None, that has no labels, and why; `key` is the frame's, if any."""

    uri: str
    source_id: str | None
    frame: int | None
    reason: str
    key: str | None = None


class FrameSource(Protocol):
    """An open input. One file in `pipeline/sources/` for each kind; `open_source` picks."""

    def probe(self) -> Source:
        """Describe the input: cheap enough to run on every worker, cached after the first call.

        Raises:
            SourceError: If there is nothing to read in it.
        """
        ...

    def read(self, start: int, stop: int, on_passed: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Yield the frames [start, stop), one for each index, in order, whatever is broken in between.

        The same frames, bit for bit, whether read as one run or in pieces. At most a bounded number is held ahead.
        `on_passed` is told of each step that it takes to get to a frame, where there are any: packets that are decoded,
        a part that is unpacked.
        """
        ...

    def close(self) -> None:
        """Release files and threads; what probing found stays, and a read from then on opens and closes its own."""
        ...


@dataclass(frozen=True)
class Report:
    """What became of a segment.

    Attributes:
        segment: Which.
        labelled: Frames with labels.
        failed: Frames without; their reasons are in the store.
        slots: Frames that its forward passes had room for.
        label_s: Seconds spent labelling.
        bytes: Written.
        reasons: Failed frames by reason.
        warnings: What the worker warned of since its last report, each once.
    """

    segment: Segment
    labelled: int
    failed: int
    slots: int = 0
    label_s: float = 0.0
    bytes: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing.

    Attributes:
        doing: A word or two: `loading`, `idle`, or the segment.
        frames: Frames of the segment that are done.
        of: Frames of the segment.
        steps: Rises with each frame that is read or passed over, and each batch that is labelled; standing still, it
            hangs.
        storing: Whether it waits for the store; hanging, it hangs for that.
    """

    doing: str
    frames: int = 0
    of: int = 0
    steps: int = 0
    storing: bool = False
