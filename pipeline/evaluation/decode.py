"""Ground truth as the sets store it, from bytes to metres or vectors. ValueError for anything else."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.floating[Any]]


def depth_png(data: bytes, *, steps_per_m: float) -> Floats:
    """16-bit PNG of depth in steps: (H, W) float64 metres; 0 where there is none."""
    values = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    if values.ndim != 2 or values.dtype == np.uint8:
        raise ValueError(f"a PNG of {values.dtype}, shape {values.shape}; expected one channel of 16 bits")
    depth: Floats = values.astype(np.float64) / steps_per_m
    return depth


def depth_raw(data: bytes, *, height: int, width: int) -> Floats:
    """Headless little-endian float32 metres, as ETH3D has it: (H, W); infinity, its mark of no depth, becomes 0."""
    if len(data) != 4 * height * width:
        raise ValueError(f"{len(data)} bytes; expected {4 * height * width}: {height}x{width} values of float32")
    depth = np.frombuffer(data, "<f4").reshape(height, width).copy()
    depth[np.isposinf(depth)] = 0
    return depth


def array(data: bytes) -> Floats:
    """`.npy` of one plane, whatever axes of length 1 it has: (H, W)."""
    values = np.load(io.BytesIO(data), allow_pickle=False)
    plane: Floats = values.squeeze()
    if plane.ndim != 2 or plane.dtype.kind not in "fiub":
        raise ValueError(f"an array of {values.dtype}, shape {values.shape}; expected one plane of numbers")
    return plane


def normals_png(data: bytes) -> Floats:
    """8-bit PNG of vectors, [0, 255] for [-1, 1]: (H, W, 3) float32, of about unit length; 0 where black, invalid."""
    values = np.asarray(Image.open(io.BytesIO(data), formats=["PNG"]))
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8:
        raise ValueError(f"a PNG of {values.dtype}, shape {values.shape}; expected three channels of 8 bits")
    normals = values.astype(np.float32) / 255 * 2 - 1
    normals[~values.any(-1)] = 0
    return normals


def normals_exr(data: bytes) -> Floats:
    """OpenEXR of vectors in R, G, B: (H, W, 3) float32; 0 where they are at most 0.5 long, invalid."""
    import av

    _check_exr(data)
    frames = av.CodecContext.create("exr", "r").decode(av.Packet(data))
    kinds = {"gbrpf32le": "<f4", "gbrpf16le": "<f2"}
    if len(frames) != 1 or frames[0].format.name not in kinds:
        found = [frame.format.name for frame in frames]
        raise ValueError(f"an EXR that decodes to {found}; expected one picture of R, G and B in float")
    frame, kind = frames[0], np.dtype(kinds[frames[0].format.name])
    # Read plane by plane: PyAV's own conversion knows float32 alone.
    green, blue, red = (
        np.frombuffer(bytes(plane), kind).reshape(plane.height, -1)[:, : plane.width] for plane in frame.planes
    )
    normals = np.stack([red, green, blue], axis=-1).astype(np.float32)
    normals[np.linalg.norm(normals, axis=-1) <= 0.5] = 0  # NaN stays, and is counted
    return normals


def _check_exr(data: bytes) -> None:
    """Refuse a file that is cut short: FFmpeg fills what is missing with zeros and says nothing.

    The header is a list of name, type, size, value, ended by a zero; the offset of each block follows, and each
    scan-line block begins with its row and its size (openexr.com, "OpenEXR File Layout").
    """
    try:
        magic, at = struct.unpack_from("<i", data)[0], 8
        attributes: dict[bytes, bytes] = {}
        while data[at]:
            name_end = data.index(b"\0", at)
            name, at = data[at:name_end], data.index(b"\0", name_end + 1) + 1
            size = struct.unpack_from("<i", data, at)[0]
            attributes[name] = data[at + 4 : at + 4 + size]
            at += 4 + size
        _, top, _, bottom = struct.unpack("<4i", attributes[b"dataWindow"])
        lines = {0: 1, 1: 1, 2: 1, 3: 16, 4: 32, 5: 16, 6: 32, 7: 32, 8: 32, 9: 256}[attributes[b"compression"][0]]
        blocks = -(-(bottom - top + 1) // lines)
        last = max(struct.unpack_from(f"<{blocks}Q", data, at + 1))
        whole = magic == 20000630 and last + 8 + struct.unpack_from("<i", data, last + 4)[0] <= len(data)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{len(data)} bytes that are no whole scan-line EXR") from error
    if not whole:
        raise ValueError(f"an EXR cut short at {len(data)} bytes")
