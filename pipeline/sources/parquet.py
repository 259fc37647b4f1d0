"""Parquet files with encoded pictures: a row is a frame.

The pictures are in a binary column, or in Hugging Face's struct of `bytes` and `path`. Of all columns, only the
pictures and the keys are read. Parquet has no way to the middle of a row group: what is before is passed over, and a
read goes on where the last one ended, so that segments in order pass over it once. For the same reason a probe has to
read the whole column of pictures, page by page.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import accumulate, chain
from typing import Any

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.base import BaseSource
from depthmill.pipeline.sources.limits import check_frames, check_range, too_large
from depthmill.pipeline.sources.naming import unique_names
from depthmill.pipeline.sources.opening import open_binary
from depthmill.pipeline.sources.pictures import (
    NO_HEADER,
    Encoded,
    Header,
    decode_ahead,
    describe,
    on_one_canvas,
    read_header,
)
from depthmill.pipeline.sources.versions import Version, changed, check_unchanged, is_another, settled, version_of
from depthmill.pipeline.types import Frame, Source

_PICTURE_COLUMNS = frozenset(
    ["image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "tiff", "image_bytes", "img_bytes", "bytes"]
)
_KEY_COLUMNS = ("__key__", "key", "id", "image_id", "file_name", "filename", "image_path", "path", "url", "image_url")

_BYTE_TYPES = frozenset(["binary", "large_binary", "binary_view"])
_NAME_TYPES = frozenset(["string", "large_string", "string_view", "int32", "int64", "uint32", "uint64"])

_NO_ROWS: tuple[Any, ...] = ()

_BATCH_ROWS = 16
_BUFFER_BYTES = 1 << 20  # of a column chunk, which would else be read whole
_KEY_BATCH_ROWS = 1 << 16


class ParquetSource(BaseSource[tuple[Source, list[Header]], "_Rows"]):
    """A Parquet file with a column of encoded pictures."""

    def probe(self) -> Source:
        """Describe the file from its footer, its keys and the headers of its pictures.

        Raises:
            SourceError: If it cannot be read, is no Parquet file, has no column of pictures or several, no row, or
                more than `max_frames`; or if pyarrow is not installed.
            SourceChangedError: If it changes meanwhile.
        """
        return self._open()[0]

    def read(self, start: int, stop: int, on_passed: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Yield the pictures of the rows [start, stop); one that cannot be read comes with its reason instead.

        `on_passed` is told of each few rows.

        Raises:
            SourceError: If the file cannot be read.
            SourceChangedError: If it, or a picture in it, is another than when it was probed.
        """
        source, headers = self._open()
        check_range(source, start, stop)
        return decode_ahead(self._encoded(headers, start, stop, on_passed), self._max_pixels, self._threads)

    def _probe(self) -> tuple[Source, list[Header]]:
        self._version, probed = settled(self._uri, self._scanned)
        return probed

    def _scanned(self) -> tuple[Version, tuple[Source, list[Header]]]:
        with closing(_Rows(self._uri)) as rows:
            self._starts = rows.starts
            return rows.version, self._describe(rows)

    def _describe(self, rows: _Rows) -> tuple[Source, list[Header]]:
        frames = rows.starts[-1]
        check_frames(self._uri, frames, self._max_frames)
        if not frames:
            raise SourceError(f"{self._uri}: no rows; expected one for each picture: leave it out")
        headers = [NO_HEADER] * frames
        paths: list[str | None] = [None] * frames
        for row in range(frames):
            if headers[row].error:
                continue
            try:
                data, paths[row] = rows.cell(row)
            except _DamageError as error:
                stop = rows.starts[bisect.bisect_right(rows.starts, row)]
                headers[row:stop] = [Header(0, 0, "", str(error))] * (stop - row)
                continue
            why = _problem(data, paths[row], self._max_pixels)
            headers[row] = Header(0, 0, "", why) if why else read_header(io.BytesIO(data or b""), self._max_pixels)
        keys = _keys(rows, paths)
        digest = hashlib.sha256(f"{rows.version.size}\0{rows.column}\0".encode())
        for key, header in zip(keys, headers, strict=True):
            digest.update(f"{key}\0{header.digest}\0".encode())
        headers = on_one_canvas(headers, self._max_pixels)
        return describe(self._uri, "parquet", keys, headers, digest.hexdigest()), headers

    def _encoded(
        self, headers: list[Header], start: int, stop: int, on_passed: Callable[[], None]
    ) -> Generator[Encoded, None, None]:
        try:
            with self._parked.lent(self._reopened) as rows:
                for row in range(start, stop):
                    header = headers[row]
                    if header.error:
                        yield Encoded(row, None, error=header.error)
                        continue
                    data = rows().cell(row, on_passed)[0] or b""
                    if is_another(io.BytesIO(data), header.digest):
                        raise changed(self._uri, f"row {row} of it")
                    yield Encoded(row, io.BytesIO(data), len(data) + 3 * header.height * header.width)
        except _DamageError as error:
            raise changed(self._uri, f"{error}, which was not so when it was probed") from error
        except SourceError:
            check_unchanged(self._uri, self._version)
            raise

    def _reopened(self) -> _Rows:
        rows = _Rows(self._uri)
        if rows.starts != self._starts:
            rows.close()
            raise changed(self._uri)
        return rows


class _DamageError(Exception):
    """A row group that cannot be read from some row on."""


class _Rows:
    """An open Parquet file, and a place in its column of pictures.

    Attributes:
        column: Name of the column.
        starts: First row of each row group, and at the end the number of rows.
        version: Of the file.
    """

    def __init__(self, uri: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise SourceError(
                f"{uri}: Parquet files need pyarrow, which is not installed: pip install 'depthmill[parquet]'"
            ) from error
        self._damage = (pyarrow.ArrowException, MemoryError, OverflowError)
        self._uri = uri
        try:
            self.version = version_of(uri)
            self._file = open_binary(uri)
        except OSError as error:
            raise _unreadable(uri, error) from error
        try:
            self._parquet = pyarrow.parquet.ParquetFile(
                self._file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            )
            self._schema = self._parquet.schema_arrow
            counts = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
        except Exception as error:  # a damaged footer breaks pyarrow in many ways
            self._file.close()
            raise _unreadable(uri, error) from error
        self.starts = [0, *accumulate(counts)]
        self._group, self._first, self._batch, self._batches = -1, 0, _NO_ROWS, iter(_NO_ROWS)
        try:
            if min(counts, default=0) < 0:
                raise SourceError(f"{uri}: a row group of {min(counts)} rows; its footer is damaged: replace the file")
            self.column = _picture_column(uri, self._schema)
            self._in_struct = _is_struct(self._schema.field(self.column).type)
        except SourceError:
            self._file.close()
            raise

    def cell(self, row: int, on_passed: Callable[[], None] = lambda: None) -> tuple[bytes | None, str | None]:
        """The encoded picture of a row, and its path; each None where there is none. Cheap from row to row.

        `on_passed` is told of each batch of rows that is read on the way.

        Raises:
            _DamageError: If the row group cannot be read up to the row.
            SourceError: If the file cannot be read.
        """
        group = bisect.bisect_right(self.starts, row) - 1
        if group != self._group or row < self._first:
            self._group, self._first, self._batch = group, self.starts[group], _NO_ROWS
            self._batches = self._iterate([self.column], _BATCH_ROWS, [group])
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = _NO_ROWS
            try:
                self._batch = next(self._batches)
                on_passed()
            except _DamageError as error:
                self._group = -1
                raise _DamageError(f"row group {group} cannot be read from row {self._first} on ({error})") from error
            except StopIteration:
                self._group = -1
                raise _DamageError(f"row group {group} ends before row {self._first}") from None
        cell = self._batch[row - self._first]
        if not self._in_struct:
            return cell.as_py(), None
        if not cell.is_valid:
            return None, None
        return cell["bytes"].as_py(), _text(cell["path"]) if "path" in cell else None

    def names(self, column: str) -> list[str | None] | None:
        """The values of a column of texts or whole numbers, named in small letters, as texts; None if there is none."""
        name = next((field.name for field in self._schema if field.name.lower() == column), None)
        if name is None or _type(self._schema.field(name).type) not in _NAME_TYPES:
            return None
        try:
            return [_text(value) for batch in self._iterate([name], _KEY_BATCH_ROWS, None) for value in batch]
        except _DamageError:
            return None

    def close(self) -> None:
        """Release the file."""
        self._batches = iter(_NO_ROWS)
        self._parquet.close()
        self._file.close()

    def _iterate(self, columns: list[str], rows: int, groups: list[int] | None) -> Iterator[Any]:
        try:
            for batch in self._parquet.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False):
                yield batch.column(0)
        except self._damage as error:
            raise _DamageError(str(error)) from error
        except OSError as error:
            if error.errno is None:  # pyarrow's own, of what it read
                raise _DamageError(str(error)) from error
            raise _unreadable(self._uri, error) from error


def _unreadable(uri: str, error: Exception) -> SourceError:
    return SourceError(f"{uri}: cannot be read as Parquet ({error}); expected a whole file: replace it or leave it out")


def _problem(data: bytes | None, path: str | None, max_pixels: int) -> str:
    """Why a cell holds no picture; "" if it may."""
    if data is None and path is None:
        return "null: there is no picture in this row"
    if data is None:
        return f"the file holds the picture's path ({path}), not its bytes: write it with the pictures embedded"
    return too_large(len(data), max_pixels)


def _picture_column(uri: str, schema: Any) -> str:
    """The column of pictures: what Hugging Face's metadata calls an image, or else what its type and name say.

    Raises:
        SourceError: If there is none, or more than one.
    """
    possible = [field.name for field in schema if _holds_bytes(field.type)]
    described = [name for name in possible if name in _hugging_face_images(schema)]
    named = [name for name in described or possible if name.lower() in _PICTURE_COLUMNS]
    found: list[str] = described if len(described) == 1 else named
    if len(found) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        what = f"{len(found)} columns of pictures ({', '.join(found)})" if found else "no column of pictures"
        raise SourceError(
            f"{uri}: {what} among {columns}; expected one, of type binary or struct<bytes, path>, called one of "
            f"{', '.join(sorted(_PICTURE_COLUMNS))}: rename it, or leave out the others"
        )
    return found[0]


def _is_struct(kind: Any) -> bool:
    return str(kind).startswith("struct<")


def _holds_bytes(kind: Any) -> bool:
    if _is_struct(kind):
        return any(field.name == "bytes" and _type(field.type) in _BYTE_TYPES for field in kind)
    return _type(kind) in _BYTE_TYPES


def _type(kind: Any) -> str:
    """Of what is encoded in a dictionary (pandas' categories), what is in that."""
    return str(kind.value_type if str(kind).startswith("dictionary<") else kind)


def _hugging_face_images(schema: Any) -> set[str]:
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name for name, one in features.items() if isinstance(one, dict) and one.get("_type") == "Image"}
    except (TypeError, KeyError, ValueError, AttributeError):
        return set()


def _keys(rows: _Rows, paths: list[str | None]) -> tuple[str, ...]:
    """A unique name for each row.

    The picture's path, or a column of names, without which the number of the row stands in. If the names of none are
    all different, the first is made so.
    """
    columns = (rows.names(column) for column in _KEY_COLUMNS)
    repeated: list[str] | None = None
    for names in chain([paths], columns):
        if names and len(names) == len(paths) and any(name is not None for name in names):
            keys = [str(row) if name is None else name for row, name in enumerate(names)]
            if len(set(keys)) == len(keys):
                return tuple(keys)
            repeated = repeated or keys
    return unique_names(repeated or map(str, range(len(paths))))


def _text(value: Any) -> str | None:
    """A cell as text; None where it is null or no UTF-8."""
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return None
    return None if text is None else str(text)
