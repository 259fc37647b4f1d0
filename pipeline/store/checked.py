"""Files of labels, compared with the checksums that their segments were committed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from depthmill.pipeline.store.files import damaged, decoding
from depthmill.pipeline.store.layout import Document, checksum, rows_per_file, segment_files
from depthmill.pipeline.store.shard import decode_rows, empty_rows
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.types import Segment


def stored_rows(store: Store, source_id: str, name: str, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
    """The frames [start, stop) of an array of labels, or their `size`, as stored, one by one; a file is read at a time.

    Raises:
        StoreDamagedError: If a file that holds labels is not there, or is not as it was committed.
    """
    arrays, frames = store.arrays(source_id), store.attributes(source_id)["frames"]
    length = store.segment_frames(source_id)
    for first in range(start - start % length, stop, length):
        segment = Segment(source_id, first, min(first + length, frames))
        files = segment_files(segment, arrays)
        number = first // length
        sums = dict(zip(files, map(int, store.read(source_id, "checksum", number, number + 1)[0]), strict=False))
        for key, (of, begin, end) in files.items():
            if of != name or end <= start or begin >= stop:
                continue
            data = store.directory.read(key)
            if why := wrong(data, sums[key]):
                raise damaged(store.uri, key, why)
            with decoding(store.uri, key):
                rows = decoded(arrays[name], data, slice(max(start, begin), min(stop, end)))
            yield from rows


def wrong(data: bytes | None, expected: int) -> str:
    """What is wrong with a file, "" if nothing is.

    Args:
        data: What is in it; None if it is not there.
        expected: Its checksum; 0 if it is not to be there.
    """
    if data is None:
        return "is missing" if expected else ""
    if not expected:
        return "was not there when its segment was committed"
    if len(data) != expected >> 32:
        return f"has {len(data):,} bytes; {expected >> 32:,} were written"
    return "" if checksum(data) == expected else "has other bytes than were written: its checksum differs"


def decoded(document: Document, data: bytes | None, rows: slice) -> npt.NDArray[Any]:
    """Rows of an array, as stored, out of the one file that holds them; whatever codecs raise of it."""
    start, stop, _ = rows.indices(document["shape"][0])
    if data is None:
        return empty_rows(document, stop - start)
    first = start - start % rows_per_file(document)
    return decode_rows(data, document, slice(start - first, stop - first))
