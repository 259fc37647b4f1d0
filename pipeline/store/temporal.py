"""What smoothing writes of a source, beside its labels: `<source id>/temporal/`, `depth_smooth` and `normals_smooth`.

The group's attributes say how it was made, and of which labels. The chunks of `edges`, `shot` and `filtered` are each
written last of what they belong to: they commit a segment's edges, a video's solution, a segment's filtered labels.
None of them is ever all fill, so that each is a file. What is made anew is un-committed before the attributes change.
The chunks of `edges` and `filtered` also say what was made without a picture that could not be read again, so that the
next run tries it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import StoreDamagedError, StoreError, StoreReplacedError
from depthmill.pipeline.store.files import decoding, json_bytes
from depthmill.pipeline.store.layout import (
    DEPTH_INVALID,
    DEPTH_STEP,
    Document,
    array_document,
    file_key,
    group_document,
    pack_normals,
    rows_per_file,
)
from depthmill.pipeline.store.root import METADATA
from depthmill.pipeline.store.shard import assemble, encode_chunk, write_plain
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.types import Segment

# Smoothed depth leaves [0, 1]: the same steps from here on reach to 8.8.
SMOOTH_OFFSET = -4.0
# What `filtered` says of a frame. SCALED: its picture could not be read, so it is scaled and shifted alone; PARTLY: it
# was filtered without another frame, whose picture could not be read.
FILTERED, NO_LABELS, SCALED, PARTLY = 1, 2, 3, 4
# Coverage of an edge of a frame whose picture could not be read.
UNREAD = -1.0

_VERSION = 2  # of the computation: raised when the same configuration gives other bytes
_LEFT_OUT = "left_out"  # attribute: why the last run could not go on with it
_NAMED = 3  # sources in an error
_COMMITS = {"edges": "edges", "filter": "filtered"}
_FILTER_ARRAYS = ("depth_smooth", "normals_smooth")

Lost = Literal["", "solution", "edges"]  # what other options, or labels, make void


class Temporal:
    """The smoothing of one source."""

    def __init__(self, store: Store, source_id: str, options: Mapping[str, Any] | None = None) -> None:
        """Nothing is read yet; with the `options` of `prepare`, nothing is written into what others were made of."""
        self.store, self.source_id = store, source_id
        self._options = options
        self._root = f"{source_id}/temporal"
        self._directory = store.directory

    def attributes(self) -> Document | None:
        """How it was made, and of which `labels`; None if the source was never smoothed."""
        document = self.store.document(self._root)
        if document is None:
            return None
        with decoding(self.store.uri, f"{self._root}/{METADATA}"):
            attributes: Document = document["attributes"]
            return {**attributes, "labels": attributes["labels"]}

    def prepare(self, *, max_edge: int, flow: str, leak: float, shape: tuple[int, int], remove: bool = True) -> Lost:
        """Make the group, or keep of the one that is there what the same options would give again.

        Args:
            max_edge: Of the edges.
            flow: Of the edges and the filter.
            leak: Of the solve.
            shape: Gaps and fields of an edge.
            remove: Whether the rest is removed; if not, and there is any, nothing is changed.

        Returns:
            What the rest is: "edges", and with them all of it; the "solution", and what is filtered by it; or "".
        """
        wanted = {"version": _VERSION, "max_edge": max_edge, "flow": flow, "labels": self.digest(), "leak": leak}
        there = self.attributes()
        if there == wanted:
            return ""
        before = {name: value for name, value in (there or {}).items() if name != _LEFT_OUT}
        lost: Lost = "solution" if {**before, "leak": leak} == wanted else "edges"
        if there is None or before == wanted:
            lost = ""
        if lost and not remove:
            return lost
        if before != wanted:
            if lost != "solution":
                self.remove()
            self.uncommit_solution()
            for name, document in self.documents(shape).items():
                self._directory.write(f"{self.source_id}/{name}/{METADATA}", json_bytes(document))
        self._directory.write(f"{self._root}/{METADATA}", json_bytes(group_document(wanted)))
        return lost

    def leave_out(self, why: str) -> None:
        """Say that a source cannot be solved, so that readers go without it; what was computed of it stays."""
        with suppress(StoreDamagedError):  # then readers are told
            there = self.attributes()
            if there is not None and not self.current():
                document = group_document({**there, _LEFT_OUT: why})
                self._directory.write(f"{self._root}/{METADATA}", json_bytes(document))

    def usable(self) -> bool:
        """Whether there are smoothed labels to be read: not of a source that is not smoothed, or had to be left out.

        Raises:
            StoreError: If it is unfinished, or of other labels.
        """
        there = self.attributes()
        if there is None or (_LEFT_OUT in there and not self.current()):
            return False
        self.check_current()
        return True

    def current(self) -> bool:
        """Whether it is solved, of the labels that there are."""
        try:
            return self.solved() and not self.stale()
        except StoreDamagedError:
            return False

    def remove(self) -> None:
        """Remove the group. What says that it is there goes first: the rest goes in any order, and may be cut short."""
        self._directory.delete(f"{self._root}/{METADATA}")
        self._directory.remove(self._root)

    def prepare_filter(self) -> None:
        """Make the arrays of filtered labels."""
        for name, document in self.filter_documents().items():
            key = f"{self.source_id}/{name}/{METADATA}"
            if self._directory.read(key) is None:
                self._directory.write(key, json_bytes(document))

    def uncommit(self, what: str, segment: Segment) -> None:
        """Have a segment's `edges`, or what is `filter`ed of it, made again by the next run."""
        number = segment.start // self.store.segment_frames(self.source_id)
        if what == "edges":
            self._directory.remove(f"{self._root}/edges/c/{number}")
        else:
            self._directory.delete(f"{self._root}/filtered/c/{number}")

    def uncommit_solution(self) -> None:
        """Have the solution made again by the next run, and what is filtered by it, which therefore goes first."""
        self._directory.remove(f"{self._root}/filtered/c")
        for name in _FILTER_ARRAYS:
            self._directory.remove(f"{self.source_id}/{name}")
        self._directory.remove(f"{self._root}/shot/c")

    def uncommit_all(self) -> None:
        """Have all of it made again by the next run, if there is any."""
        self._directory.remove(f"{self._root}/edges/c")
        self.uncommit_solution()

    def digest(self) -> str:
        """Of the labels: what it was computed from is known by this."""
        values = np.ascontiguousarray(self.store.read(self.source_id, "checksum"))
        return hashlib.sha256(values.tobytes()).hexdigest()

    def pending(self, what: str) -> list[Segment]:
        """Segments without `edges`, or that are not `filter`ed, in order."""
        chunks = f"{self._root}/{_COMMITS[what]}/c"
        # Files: a write that failed may leave the folders above one.
        done = {key.removeprefix(f"{chunks}/").partition("/")[0] for key, _ in self._directory.sizes(chunks)}
        return [one for i, one in enumerate(self.store.segments(self.source_id)) if str(i) not in done]

    def unread(self, what: str) -> list[Segment]:
        """Segments whose `edges`, or what is `filter`ed of them, lack a picture that could not be read, in order."""
        values = self.read(_COMMITS[what])
        lacks = (values == UNREAD).any(axis=(1, 2)) if what == "edges" else np.isin(values, (SCALED, PARTLY))
        return [one for one in self.store.segments(self.source_id) if lacks[one.start : one.stop].any()]

    def solved(self) -> bool:
        """Whether scales and shifts are there."""
        return bool(self._directory.children(f"{self._root}/shot/c"))

    def write_edges(self, segment: Segment, edges: npt.NDArray[np.float32], score: npt.NDArray[np.float32]) -> None:
        """Commit a segment's edges, (frames, gaps, fields), and scores, (frames,).

        Those that are there again change nothing; of others the solution is un-committed before.
        """
        self._check_options("max_edge", "flow")  # edges may be begun under another leak: see `prepare`
        if self.solved():
            given = {"temporal/edges": edges, "temporal/score": score}
            if all(
                np.array_equal(self.store.read(self.source_id, name, segment.start, segment.stop), new, equal_nan=True)
                for name, new in given.items()
            ):
                return
            self.uncommit_solution()
        self._write("score", segment.start, score)
        self._write("edges", segment.start, edges)

    def write_solution(
        self, scale: npt.NDArray[np.float32], shift: npt.NDArray[np.float32], shot: npt.NDArray[np.int32]
    ) -> None:
        """Commit a video's scales, shifts and shots."""
        self._check_options("max_edge", "flow", "leak")
        for name, values in (("scale", scale), ("shift", shift), ("shot", shot)):
            self._write(name, 0, values)

    def write_filtered(
        self, segment: Segment, frames: Iterable[tuple[int, Mapping[str, npt.NDArray[np.float32]]] | None]
    ) -> None:
        """Write a segment's filtered labels shard by shard, and commit them.

        Args:
            segment: Which frames.
            frames: For each what `filtered` says of it and its labels by name (`depth`, `normals`); None where there
                are none.
        """
        arrays = self.store.arrays(self.source_id)
        shard = rows_per_file(arrays["depth"])
        rows = iter(frames)
        codes = np.full(segment.frames, NO_LABELS, np.uint8)
        for start in range(segment.start, segment.stop, shard):
            stop = min(start + shard, segment.stop)
            chunks: dict[str, dict[int, bytes]] = {name: {} for name in self.store.layout.labels}
            for row in range(stop - start):
                given = next(rows)
                if given is None:
                    continue
                codes[start - segment.start + row], labels = given
                for name, encoded in chunks.items():
                    dtype = arrays[name]["data_type"]
                    packed = pack_smooth_depth(labels[name]) if name == "depth" else pack_normals(labels[name], dtype)
                    encoded[row] = encode_chunk(packed, arrays[name])
            for name, encoded in chunks.items():
                key = file_key(self.source_id, f"{name}_smooth", arrays[name], start)
                data = assemble(encoded, arrays[name])
                self._check_options("max_edge", "flow", "leak")
                if data is None:
                    self._directory.delete(key)
                else:
                    self._directory.write(key, data)
        next(rows, None)  # where whoever reads the pictures may find that they are others by now
        self._check_options("max_edge", "flow", "leak")
        self._write("filtered", segment.start, codes)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A whole array of the group."""
        return self.store.read(self.source_id, f"temporal/{name}")

    def check_current(self) -> None:
        """Refuse smoothing that is missing, unfinished or of other labels.

        Raises:
            StoreError: Then, with the remedy.
        """
        there = self.attributes()
        remedy = f"run `depthmill smooth {quote(self.store.uri)} --source {self.source_id}`"
        if there is None or not self.solved():
            raise StoreError(f"{self.source_id} of {self.store.uri} is not smoothed, or not to the end: {remedy}")
        if self.stale():
            raise StoreError(
                f"{self.source_id} of {self.store.uri} has been labelled again since it was smoothed: {remedy} again"
            )

    def stale(self) -> bool:
        """Whether the labels are others than those that were smoothed."""
        there = self.attributes()
        return there is not None and there["labels"] != self.digest()

    def filtered(self) -> bool:
        """Whether all segments have filtered labels."""
        return not self.pending("filter")

    def filter_documents(self) -> dict[str, Document]:
        """The zarr.json of each array of filtered labels, by name."""
        arrays = json.loads(json.dumps(self.store.arrays(self.source_id)))
        for name in self.store.layout.labels:
            arrays[name]["attributes"]["long_name"] = f"{name}, smoothed and filtered over time"
        if "depth" in arrays:
            arrays["depth"]["attributes"]["add_offset"] = SMOOTH_OFFSET
        return {f"{name}_smooth": arrays[name] for name in self.store.layout.labels}

    def documents(self, shape: tuple[int, int]) -> dict[str, Document]:
        """The zarr.json of each array of the group, by name; `shape` is that of an edge, as in `prepare`."""
        frames, length = self.store.attributes(self.source_id)["frames"], self.store.segment_frames(self.source_id)

        def one(dtype: str, fill: float | str, about: str, rows: int = frames, more: tuple[int, ...] = ()) -> Document:
            dimensions = ("frame", "gap", "field")[: 1 + len(more)]
            return array_document((frames, *more), rows, dtype, fill, dimensions, {"long_name": about})

        codes = "0 pending, 1 filtered, 2 no labels, 3 scaled alone, 4 without another"
        return {
            "temporal/edges": one("float32", 0, "scale and shift between pairs of frames", length, shape),
            "temporal/score": one("float32", 0, "how different a frame is from the one before", length),
            "temporal/scale": one("float32", "NaN", "smoothed depth = scale * depth + shift"),
            "temporal/shift": one("float32", "NaN", "smoothed depth = scale * depth + shift"),
            "temporal/shot": one("int32", -1, "number of the shot"),
            "temporal/filtered": one("uint8", 0, codes, length),
        }

    def _check_options(self, *names: str) -> None:
        """See that no other run has begun to smooth the source with other options.

        Raises:
            StoreReplacedError: If so.
        """
        if self._options is None:
            return
        there = self.attributes() or {}
        if any(there.get(name) != self._options[name] for name in names):
            raise StoreReplacedError(
                f"another run smooths {self.source_id} of {self.store.uri} with other options; expected one at a time: "
                "let that one end, or stop it"
            )

    def _write(self, name: str, start: int, values: npt.NDArray[Any]) -> None:
        array = self.store.array_document(self.source_id, f"temporal/{name}")
        with decoding(self.store.uri, f"{self._root}/{name}"):
            self._directory.clear_partial(file_key(self.source_id, f"temporal/{name}", array, start))
            write_plain(self._directory, self.source_id, f"temporal/{name}", array, start, values)


def not_smoothed(store: Store, source_ids: Sequence[str] = ()) -> StoreError:
    """What to raise where smoothed labels are asked for, and no source is smoothed; of these, if any are given."""
    more = ", …" if len(source_ids) > _NAMED else ""
    among = f" among {', '.join(source_ids[:_NAMED])}{more}" if source_ids else ""
    options = "".join(f" --source {one}" for one in source_ids[:_NAMED])  # which pictures' have to be named by
    return StoreError(
        f"{store.uri} has no smoothed source{among}: run `depthmill smooth {quote(store.uri)}{options}{more and ' …'}`"
    )


def pack_smooth_depth(depth: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Pack (H, W) smoothed depth in steps of `DEPTH_STEP` from `SMOOTH_OFFSET` on; NaN becomes `DEPTH_INVALID`."""
    steps = np.rint((depth - np.float32(SMOOTH_OFFSET)) * np.float32(1 / DEPTH_STEP))
    steps = np.clip(steps, 0, DEPTH_INVALID - 1)
    return np.where(np.isnan(steps), np.float32(DEPTH_INVALID), steps).astype(np.uint16)
