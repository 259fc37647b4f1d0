"""Two sources, their labels, and what a store has on disk."""

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from depthmill.pipeline import store as stores
from depthmill.pipeline.store import Layout
from depthmill.pipeline.types import Segment, Source

LAYOUT = Layout(shard_frames=4, segment_frames=8)
IDENTITY = {"checkpoint": {"id": "demo", "sha256": "aa"}, "processing_resolution": 768}
VIDEO = Source("video", "/in/video.mp4", "video", 18, 24, 32, 10.0, "f1", time_s=np.arange(18) / 10)
IMAGES = Source("images", "/in/images", "images", 5, 24, 32, None, "f2", keys=("a.png", "ö/b.png", "c", "d", "e"))


def labels(seed: int, height: int = 24, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(height, width, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return rng.random((height, width), dtype=np.float32), normals.astype(np.float32)


def write(
    store: stores.Store,
    segment: Segment,
    failed: Container[int] = (),
    reason: str = "broken",
    redo: Sequence[int] | None = None,
    size: tuple[int, int] = (24, 32),
) -> int:
    """Commit a segment, or frames of it again; the bytes written."""
    writer = store.writer(segment, redo)
    for index in redo or range(segment.start, segment.stop):
        if index in failed:
            writer.fail(index, reason)
        else:
            writer.put(index, *labels(index, *size))
    return writer.commit()


def angle_deg(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1)))


def files(path: Path | str) -> dict[str, bytes]:
    path = Path(path)
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}
