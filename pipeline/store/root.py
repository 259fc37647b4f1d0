"""The root's zarr.json: what the store is, and an index of all its groups and arrays ("consolidated" metadata).

The index has a line for each member. So a store of many thousands of sources is opened by parsing the lines of its
groups alone, and a source is added without parsing, or holding as objects, what is there already.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from depthmill.pipeline.errors import StoreError, StoreReplacedError
from depthmill.pipeline.store.files import Directory, store_away
from depthmill.pipeline.store.layout import CONVENTIONS, FORMAT, Document, Layout, group_document, source_arrays
from depthmill.pipeline.store.metadata import attributes_of, check_header, source_attributes_of

METADATA, FAILURES, RUN, STAMPS = "zarr.json", "failures.jsonl", "run.json", "stamps.json"
RECORDS = (FAILURES, RUN, STAMPS)  # of runs; labels do not depend on them
BEING_REMOVED = "being_removed"
_HEADER_BYTES = 1 << 16
_START, _END = '"metadata": {', "}}}"


@dataclass(frozen=True)
class Root:
    """The root as read.

    Attributes:
        attributes: Of the root group.
        members: Path -> zarr.json of a group or array, as text.
    """

    attributes: Document
    members: Mapping[str, str]

    @property
    def being_removed(self) -> bool:
        """Whether this is what is left of a store whose removal was cut short."""
        return BEING_REMOVED in self.attributes["depthmill"]

    @property
    def header(self) -> Document:
        """What depthmill wrote about the store as a whole."""
        header: Document = self.attributes["depthmill"]
        return header

    def groups(self) -> dict[str, Document]:
        """Source id -> attributes of its group; without those whose line is damaged, since this is but an index."""
        found = {}
        for path, text in self.members.items():
            if "/" not in path:
                with suppress(ValueError):
                    found[path] = source_attributes_of(text)
        return {path: attributes for path, attributes in found.items() if attributes is not None}


def read_root(directory: Directory) -> Root | None:
    """The store in a directory; None if there is no Zarr hierarchy.

    Raises:
        StoreError: If there is one of another kind, or it is damaged.
    """
    data = directory.read(METADATA)
    return None if data is None else _parsed(directory, data)


def read_header(directory: Directory) -> Root | None:
    """The same without its members, of which there may be many: of what `write_root` wrote the first line is enough."""
    start, end, _ = (directory.read(METADATA, 0, _HEADER_BYTES) or b"").partition(b"\n")
    if not end or not start.endswith(_START.encode()):
        return read_root(directory)
    return _parsed(directory, start + b"\n" + _END.encode())


def refuse_another(directory: Directory, header: Document) -> None:
    """Refuse to write into a store that a run of other options has made anew (`--overwrite`); one small read.

    A run of the same options is not told apart: what it writes is the same.

    Raises:
        StoreReplacedError: If it has another header than it had.
    """
    root = read_header(directory)
    if root is None:
        raise store_away(directory.uri)
    if found := differences(header, root.header):
        raise StoreReplacedError(
            f"{directory.uri} was made anew by another run while this one wrote into it:\n{found}\nIt is the other's "
            "now: give this one another store."
        )


def write_root(directory: Directory, root: Root) -> None:
    """Write the root, as an index of its members in order."""
    start = json.dumps(
        {
            **group_document(root.attributes),
            "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}},
        },
        allow_nan=False,
    ).removesuffix(_END)
    lines = ",\n".join(f"{json.dumps(path)}: {root.members[path]}" for path in sorted(root.members))
    directory.write(METADATA, f"{start}\n{lines}\n{_END}\n".encode())


def new_root(header: Document) -> Root:
    """The root of a store without sources."""
    return Root({"depthmill": header, "conventions": CONVENTIONS}, {})


def source_members(source_id: str, attributes: Document, layout: Layout) -> dict[str, str]:
    """The lines of one source in the index, by path."""
    members = {f"{source_id}/{name}": document for name, document in source_arrays(attributes, layout).items()}
    return _texts({source_id: group_document(attributes), **members}.items())


def differences(old: Document, new: Document, prefix: str = "") -> str:
    """One line for each key in which two documents differ, with both values; "" if they are equal."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            lines.append(differences(before, now, f"{prefix}{key}."))
        elif before != now:
            lines.append(f"  {prefix}{key}: {_shown(old, key)} there, {_shown(new, key)} now")
    return "\n".join(line for line in lines if line)


def _parsed(directory: Directory, data: bytes) -> Root:
    try:
        document, members = _by_lines(data.decode()) or _whole(json.loads(data))
        attributes = attributes_of(document)
        header = attributes.get("depthmill")
        if isinstance(header, dict) and header.get("format") == FORMAT:
            check_header(header)
    except ValueError as error:
        raise StoreError(
            f"{directory.uri}/{METADATA} is damaged ({error}): put it back as it was, or give another path; it was not "
            "touched, and no label is in it"
        ) from error
    if not isinstance(header, dict):
        raise StoreError(
            f"{directory.uri} is a Zarr hierarchy, but no depthmill store: give another path; it was not touched"
        )
    return Root(attributes, members)


def _by_lines(text: str) -> tuple[Any, dict[str, str]] | None:
    """The root as `write_root` writes it, without its members, and those; None if something else wrote it."""
    start, *lines = text.rstrip("\n").split("\n")
    if not lines or not start.endswith(_START) or lines.pop() != _END:
        return None
    members = {}
    for line in filter(None, lines):
        key, found, document = line.partition('": {')  # no name has a space in it
        if not found:
            return None
        members[json.loads(f'{key}"')] = "{" + document.removesuffix(",")
    return json.loads(start + _END), members


def _whole(document: Any) -> tuple[Any, dict[str, str]]:
    index = document.get("consolidated_metadata") if isinstance(document, dict) else None
    members = index.get("metadata", {}) if isinstance(index, dict) else index or {}
    if not isinstance(members, dict):
        raise ValueError("its consolidated_metadata is no index; without one, the next run writes it anew")
    return document, _texts(members.items())


def _texts(documents: Iterable[tuple[str, Document]]) -> dict[str, str]:
    return {path: json.dumps(document, allow_nan=False, separators=(",", ":")) for path, document in documents}


def _shown(document: Document, key: str) -> str:
    return json.dumps(document[key]) if key in document else "absent"
