"""Files of arrays, encoded and decoded: to the byte what zarr-python writes, by many threads and without its copies.

Zarr encodes the chunks of a shard one after the other, around which it spends as much time as in compressing them, and
a millisecond around each file of an array that is not sharded. The format of shards is `sharding_indexed` of the Zarr
v3 specification: the chunks that are not empty, one behind the other, then for each chunk its offset and its length, 64
bits each, then a CRC-32C of that index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc
from numcodecs.vlen import VLenUTF8

from depthmill.pipeline.store.files import Directory, decoding
from depthmill.pipeline.store.layout import Document, checksum, file_key, rows_per_file

_EMPTY = 2**64 - 1  # offset and length of a chunk that is not there: nothing but fill

_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}


def encode_chunk(labels: npt.NDArray[Any], array: Document) -> bytes:
    """One frame's labels, compressed; b"" if they are nothing but fill, of which no chunk is stored.

    Args:
        labels: (H, W) or (H, W, 3), packed; put at the top left of the array's canvas, with fill around it.
        array: The zarr.json of a sharded array.
    """
    canvas, fill = tuple(array["shape"][1:]), array["fill_value"]
    chunk = labels
    if labels.shape != canvas:
        chunk = np.full(canvas, fill, array["data_type"])
        chunk[: labels.shape[0], : labels.shape[1]] = labels
    if _is_fill(chunk, fill):
        return b""
    *before, _, blosc = array["codecs"][0]["configuration"]["codecs"]
    for transpose in before:
        order = transpose["configuration"]["order"]
        chunk = chunk.transpose([axis - 1 for axis in order[1:]])  # the first is the frames', of which there is one
    return _compress(chunk, blosc)


def write_plain(
    directory: Directory, source_id: str, name: str, array: Document, start: int, values: npt.NDArray[Any]
) -> dict[str, int]:
    """Write rows of an array that is not sharded, from the first of a file on, whatever was there.

    Returns:
        The key of each file and its checksum (`layout.checksum`); 0 where all is fill, of which there is no file.
    """
    rows, sums = rows_per_file(array), {}
    for row in range(0, len(values), rows):
        chunk = empty_rows(array, rows)
        chunk[: len(values) - row] = values[row : row + rows]
        key = file_key(source_id, name, array, start + row)
        if _is_fill(chunk, array["fill_value"]):
            directory.delete(key)
            sums[key] = 0
            continue
        if chunk.dtype == object:
            chunk = np.frombuffer(VLenUTF8().encode(chunk), np.uint8)
        data = _compress(chunk, array["codecs"][1])
        directory.write(key, data)
        sums[key] = checksum(data)
    return sums


def _is_fill(values: npt.NDArray[Any], fill: object) -> bool:
    if values.dtype == object:
        return bool((values == fill).all())
    bits = f"u{values.itemsize}"  # -0.0 is not 0.0
    filled, stored = np.array(fill, values.dtype).view(bits), values.view(bits)
    return bool(stored.flat[0] == filled and (stored == filled).all())  # nearly always the first says that it is not


def _compress(values: npt.NDArray[Any], blosc: Document) -> bytes:
    options = blosc["configuration"]
    codec = Blosc(options["cname"], options["clevel"], _SHUFFLES[options["shuffle"]], options["blocksize"])
    return bytes(codec.encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<"))))


def read_rows(directory: Directory, source_id: str, name: str, array: Document, wanted: slice) -> npt.NDArray[Any]:
    """Rows of an array, of numbers or strings, out of whole files: there are many of `status`, for Zarr slow.

    Raises:
        StoreDamagedError: If a file of it cannot be decoded, or its zarr.json is none of an array.
    """
    with decoding(directory.uri, f"{source_id}/{name}"):
        rows = rows_per_file(array)
        start, stop, _ = wanted.indices(array["shape"][0])
        first = start - start % rows
        chunks = {file_key(source_id, name, array, row): row - first for row in range(first, stop, rows)}
        values = empty_rows(array, len(chunks) * rows)
        for key, data in directory.read_all(chunks).items():
            values[chunks[key] : chunks[key] + rows] = decode_rows(data, array, slice(None))
        return values[start - first : stop - first]


def empty_rows(array: Document, count: int) -> npt.NDArray[Any]:
    """Rows of an array that hold nothing but fill."""
    dtype = object if array["data_type"] == "string" else array["data_type"]
    return np.full((count, *array["shape"][1:]), array["fill_value"], dtype)


def decode_rows(data: bytes, array: Document, rows: slice) -> npt.NDArray[Any]:
    """Rows of a file of an array, counted in the file; whatever codecs raise of it.

    Zarr crosses between its threads for each chunk of a shard, and for each small array.
    """
    shape, (serializer, *_) = array["shape"][1:], array["codecs"]
    if serializer["name"] == "vlen-utf8":
        return np.asarray(VLenUTF8().decode(Blosc().decode(data)).reshape(rows_per_file(array))[rows])
    dtype = np.dtype(array["data_type"]).newbyteorder("<")
    if serializer["name"] == "bytes":
        return np.frombuffer(Blosc().decode(data), dtype).reshape(rows_per_file(array), *shape)[rows]
    start, stop, _ = rows.indices(rows_per_file(array))
    values = np.full((stop - start, *shape), array["fill_value"], dtype)
    stored = values
    for transpose in serializer["configuration"]["codecs"][:-2]:
        stored = stored.transpose(transpose["configuration"]["order"])
    for row, chunk in split(data, array).items():
        if start <= row < stop:
            stored[row - start] = np.frombuffer(Blosc().decode(chunk), dtype).reshape(stored.shape[1:])
    return values


def assemble(chunks: Mapping[int, bytes], array: Document) -> bytes | None:
    """The file of a shard; None if all of its chunks are empty, when there is no file.

    Args:
        chunks: Row in the shard -> from `encode_chunk`, in the order that they are to have in the file.
        array: The zarr.json of the array.
    """
    if not any(chunks.values()):
        return None
    index = np.full((rows_per_file(array), 2), _EMPTY, "<u8")
    offset = 0
    for row, chunk in chunks.items():
        if chunk:
            index[row] = offset, len(chunk)
            offset += len(chunk)
    listed = index.tobytes()
    return b"".join((*chunks.values(), listed, google_crc32c.value(listed).to_bytes(4, "little")))


def split(data: bytes, array: Document) -> dict[int, bytes]:
    """The chunks of a shard's file, in its order, as `assemble` put them together; of rows that have one.

    Raises:
        ValueError: If its index is broken; what is in its chunks is not looked at.
    """
    rows = rows_per_file(array)
    listed = data[-16 * rows - 4 : -4]
    if google_crc32c.value(listed).to_bytes(4, "little") != data[-4:]:
        raise ValueError("the index of its chunks is broken")
    index = np.frombuffer(listed, "<u8").reshape(rows, 2).tolist()
    there = sorted((offset, length, row) for row, (offset, length) in enumerate(index) if offset != _EMPTY)
    return {row: data[offset : offset + length] for offset, length, row in there}
