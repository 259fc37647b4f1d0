"""What the store looks like on disk: the Zarr v3 metadata of every array, and how labels are packed into them.

The metadata documents are written out here, key by key, rather than by a Zarr library: their bytes then depend on
nothing but this file, and the root document can carry all of them ("consolidated"), which is what lets xarray open a
store of thousands of sources with one read, and skip the files that are no part of the hierarchy (`run.json`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.types import FAILED, LABELLED, PENDING, Modality, NormalsDtype, Segment, Source, is_corpus

Document = dict[str, Any]  # one zarr.json

# Raised whenever a store written before could not be read as it is now.
FORMAT = 1

# One frame is the unit of random access, one shard the unit of writing: it is assembled in memory, canvas by canvas.
MAX_SHARD_BYTES = 256 * 2**20

# Depth is stored in steps of DEPTH_STEP, so that it is off by at most half of that: 9.8e-5. Steps 13x finer, which
# 16 bits would hold, cost disk space for digits that no model of today gets right (benchmarks/codecs.md).
DEPTH_STEP = 1 / 5120
DEPTH_INVALID = 0xFFFF

# Full scale of the integer types; float16 needs none.
NORMALS_FULL_SCALE: dict[str, int | None] = {"int8": 127, "int16": 32767, "float16": None}

CONVENTIONS = {
    "depth": "affine-invariant, 0 = near, 1 = far; never rescaled per frame; NaN (stored 0xFFFF) where invalid",
    "normals": "unit vectors in the camera's frame: x right, y up, z towards the viewer; (0, 0, 0) where invalid",
    "size": "valid height and width of a row in pixels, from the top left; beyond it labels are invalid",
    "time": "seconds since the first frame",
    "status": "0 pending, 1 labelled, 2 failed",
}


@dataclass(frozen=True)
class Layout:
    """How labels are laid out on disk; part of a store's identity.

    Attributes:
        labels: What is stored of a frame.
        shard_frames: Frames in one file of each label, as long as one file is at most `MAX_SHARD_BYTES` before
            compression; very large pictures are stored with fewer.
        segment_frames: Frames committed at once; a multiple of `shard_frames`.
        corpus_segment_frames: The same of a corpus (`types.is_corpus`); None where it is no other.
        normals_dtype: int8 is off by at most 0.4 degrees, int16 and float16 by far less, in 5 to 7 times the space.
        uncertainty: Whether the spread of depth ensembles is stored, packed as depth is.
    """

    labels: tuple[Modality, ...] = ("depth", "normals")
    shard_frames: int = 16
    segment_frames: int = 64
    normals_dtype: NormalsDtype = "int8"
    uncertainty: bool = False
    corpus_segment_frames: int | None = None

    def __post_init__(self) -> None:
        known = get_args(Modality)
        if not self.labels or len(set(self.labels)) < len(self.labels) or not set(self.labels) <= set(known):
            raise ConfigError(f"labels is {list(self.labels)}: give one or more of {list(known)}, each once")
        if self.shard_frames < 1:
            raise ConfigError(f"shard_frames is {self.shard_frames}: give 1 or more")
        for name in ("segment_frames", "corpus_segment_frames"):
            frames = getattr(self, name)
            if frames is not None and (frames < 1 or frames % self.shard_frames):
                raise ConfigError(
                    f"{name} is {frames}: give a multiple of shard_frames ({self.shard_frames}),"
                    " so that no two segments share a file"
                )
        if self.normals_dtype not in NORMALS_FULL_SCALE:
            raise ConfigError(f"normals_dtype is {self.normals_dtype!r}: give one of {list(NORMALS_FULL_SCALE)}")
        if self.uncertainty and "depth" not in self.labels:
            raise ConfigError(f"uncertainty is depth's, and labels is {list(self.labels)}: add depth, or leave it out")

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that hold labels: one row a frame, written in shards."""
        return (*self.labels, "uncertainty") if self.uncertainty else self.labels

    def document(self) -> Document:
        """The layout as JSON; without what was added later where it is not used, as in stores that never knew of it."""
        document = {**asdict(self), "labels": list(self.labels)}
        unused = {key for key in ("uncertainty", "corpus_segment_frames") if not document[key]}
        return {key: document[key] for key in document if key not in unused}

    @classmethod
    def from_document(cls, document: Document) -> Layout:
        """The layout that `document` was made from."""
        return cls(**{**document, "labels": tuple(document["labels"])})

    def frames_per_shard(self, height: int, width: int) -> int:
        """Frames in one shard of a source of this canvas: `shard_frames`, halved until a shard is small enough."""
        bytes_per_frame = height * width * (2 * (("depth" in self.labels) + self.uncertainty) + self._bytes_per_normal)
        frames = self.shard_frames
        while frames > 1 and frames * bytes_per_frame > MAX_SHARD_BYTES:
            frames //= 2
        return frames

    def frames_per_segment(self, source: Document) -> int:
        """Frames in one segment of a source; `source` are its group's attributes.

        As many shards as the layout's own segment has, so that memory is bounded alike. Of a corpus, whose canvas one
        huge picture can make, as many frames: there what waits in memory is bounded in bytes (`pipeline/batches.py`).
        """
        shard = self.frames_per_shard(*source["size"])
        if self.corpus_segment_frames is not None and is_corpus(source["kind"], source["frames"]):
            return shard * (self.corpus_segment_frames // shard)
        return shard * (self.segment_frames // self.shard_frames)

    @property
    def _bytes_per_normal(self) -> int:
        return 3 * np.dtype(self.normals_dtype).itemsize if "normals" in self.labels else 0


def pack_depth(depth: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Pack depth, or its uncertainty.

    Args:
        depth: (H, W) float32 in [0, 1], clipped to it; NaN where invalid.

    Returns:
        (H, W) uint16 in steps of `DEPTH_STEP`; `DEPTH_INVALID` where invalid.
    """
    steps = np.clip(depth, 0, 1)
    steps *= np.float32(1 / DEPTH_STEP)
    np.rint(steps, out=steps)
    invalid = np.isnan(steps)
    steps[invalid] = DEPTH_INVALID
    return steps.astype(np.uint16)


def pack_normals(normals: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """Pack normals.

    Args:
        normals: (H, W, 3) float32 unit vectors; (0, 0, 0) or NaN where invalid.
        dtype: One of `NORMALS_FULL_SCALE`.

    Returns:
        (H, W, 3) of `dtype`; (0, 0, 0) where invalid.
    """
    if np.isnan(normals.sum()):  # seldom: one pass tells whether the slow ones are needed
        normals = np.where(np.isnan(normals).any(-1, keepdims=True), np.float32(0), normals)
    full_scale = NORMALS_FULL_SCALE[dtype]
    if full_scale is None:
        return normals.astype(dtype)
    scaled = normals * np.float32(full_scale)
    np.rint(scaled, out=scaled)
    np.clip(scaled, -full_scale, full_scale, out=scaled)
    return scaled.astype(dtype)


def group_document(attributes: Document) -> Document:
    """A group's zarr.json."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def source_attributes(source: Source) -> Document:
    """Attributes of a source's group: what a reader needs, and what must not change between two runs."""
    attributes: Document = {
        "uri": source.uri,
        "kind": source.kind,
        "frames": source.frames,
        "size": [source.height, source.width],
        "fingerprint": source.fingerprint,
    }
    return attributes if source.fps is None else {**attributes, "fps": source.fps}


def source_arrays(source: Document, layout: Layout) -> dict[str, Document]:
    """The zarr.json of each array in a source's group, by name; `source` are the group's attributes."""
    F, (H, W) = source["frames"], source["size"]
    shard = layout.frames_per_shard(H, W)
    segment = layout.frames_per_segment(source)
    is_video = source["kind"] == "video"
    along = {"coordinates": "time" if is_video else "key"}
    arrays: dict[str, Document] = {}
    attributes: Document
    depths = {
        "depth": "affine-invariant depth, 0 near, 1 far",
        "uncertainty": "median absolute deviation of the ensemble's depths from depth",
    }
    packing = {"units": "1", "scale_factor": DEPTH_STEP, "_FillValue": DEPTH_INVALID}
    for name in (name for name in depths if name in layout.arrays):
        attributes = {"long_name": depths[name], **packing, **along}
        arrays[name] = array_document((F, H, W), shard, "uint16", DEPTH_INVALID, ("frame", "y", "x"), attributes)
    if "normals" in layout.labels:
        dtype, full_scale = layout.normals_dtype, NORMALS_FULL_SCALE[layout.normals_dtype]
        attributes = {
            "long_name": "surface normals: x right, y up, z towards the viewer; (0, 0, 0) where invalid",
            "units": "1",
            **({} if full_scale is None else {"scale_factor": 1 / full_scale}),
            **along,
        }
        arrays["normals"] = array_document((F, H, W, 3), shard, dtype, 0, ("frame", "y", "x", "axis"), attributes)
    if is_video:
        # "s", not "seconds", which xarray would decode into timedeltas.
        attributes = {"long_name": "time since the first frame", "units": "s"}
        arrays["time"] = array_document((F,), F, "float64", "NaN", ("frame",), attributes)
    else:
        arrays["key"] = array_document((F,), F, "string", "", ("frame",), {"long_name": "name of the picture"})
        attributes = {"long_name": "valid height and width", "units": "pixel", **along}
        arrays["size"] = array_document((F, 2), segment, "int32", 0, ("frame", "extent"), attributes)
    flags = {"flag_values": [PENDING, LABELLED, FAILED], "flag_meanings": "pending labelled failed"}
    attributes = {"long_name": "what became of a frame", **flags, **along}
    arrays["status"] = array_document((F,), segment, "uint8", PENDING, ("frame",), attributes)
    attributes = {"long_name": "why a frame failed", **along}
    arrays["reason"] = array_document((F,), segment, "string", "", ("frame",), attributes)
    shape = (-(-F // segment), len(layout.arrays) * (segment // shard) + (1 if is_video else 2))
    attributes = {
        "long_name": "bytes and CRC-32 of each file of a segment, as bytes << 32 | crc; 0 where there is none"
    }
    arrays["checksum"] = array_document(shape, 1, "uint64", 0, ("segment", "file"), attributes)
    return arrays


def checksum(data: bytes) -> int:
    """What the array `checksum` holds of a file: its length above the low 32 bits, its CRC-32 (zlib's) in them."""
    return len(data) << 32 | zlib.crc32(data)


def segment_files(segment: Segment, arrays: Mapping[str, Document]) -> dict[str, tuple[str, int, int]]:
    """The files that hold a segment's labels, in the order of the columns of `checksum`.

    Args:
        segment: Which frames.
        arrays: The zarr.json of each array in its source's group.

    Returns:
        Key in the store -> array, and the half-open run of frames in it. `checksum` and `status` are not among them.
    """
    files = {}
    for name in ("depth", "normals", "uncertainty", "size", "reason"):
        if name in arrays:
            for start in range(segment.start, segment.stop, rows_per_file(arrays[name])):
                stop = min(start + rows_per_file(arrays[name]), segment.stop)
                files[file_key(segment.source_id, name, arrays[name], start)] = (name, start, stop)
    return files


def rows_per_file(array: Document) -> int:
    """Rows of an array in one file: a shard where it has them."""
    rows: int = array["chunk_grid"]["configuration"]["chunk_shape"][0]
    return rows


def file_key(source_id: str, name: str, array: Document, row: int) -> str:
    """The key of the file that holds a row of an array."""
    return f"{source_id}/{name}/c/{row // rows_per_file(array)}{'/0' * (len(array['shape']) - 1)}"


def label_codecs(dtype: str, ndim: int) -> list[Document]:
    """How one frame is compressed: the measured choice of benchmarks/codecs.md.

    Only codecs of the Zarr v3 specification itself, so that every implementation reads them.
    """
    itemsize = np.dtype(dtype).itemsize
    # Planes of x, y and z compress better than interleaved vectors; big blocks let even the quickest level do well.
    planes = [{"name": "transpose", "configuration": {"order": [0, 3, 1, 2]}}] if ndim == 4 else []
    shuffle = "bitshuffle" if itemsize > 1 else "noshuffle"
    return [*planes, _bytes(itemsize), _blosc(shuffle, itemsize, clevel=1, blocksize=2**20)]


def array_document(
    shape: tuple[int, ...], rows: int, dtype: str, fill: float | str, dimensions: tuple[str, ...], attributes: Document
) -> Document:
    """The zarr.json of an array with `rows` rows in a file: one chunk; of labels, a shard that has a chunk for each."""
    if "y" in dimensions:
        sharding = {
            "chunk_shape": [1, *shape[1:]],
            "codecs": label_codecs(dtype, len(shape)),
            "index_codecs": [_bytes(8), {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs: list[Document] = [{"name": "sharding_indexed", "configuration": sharding}]
    else:
        itemsize = 1 if dtype == "string" else np.dtype(dtype).itemsize
        serializer = {"name": "vlen-utf8"} if dtype == "string" else _bytes(itemsize)
        codecs = [serializer, _blosc("shuffle" if itemsize > 1 else "noshuffle", itemsize)]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": codecs,
        "dimension_names": list(dimensions),
        "attributes": attributes,
    }


def _bytes(itemsize: int) -> Document:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


def _blosc(shuffle: str, itemsize: int, clevel: int = 5, blocksize: int = 0) -> Document:
    options = {"cname": "zstd", "clevel": clevel, "shuffle": shuffle, "typesize": itemsize, "blocksize": blocksize}
    return {"name": "blosc", "configuration": options}
