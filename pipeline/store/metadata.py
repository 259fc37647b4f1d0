"""What depthmill wrote into a zarr.json, checked as it is read: all other code takes it at its word."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from depthmill.pipeline.errors import ConfigError
from depthmill.pipeline.store.layout import Document, Layout
from depthmill.pipeline.types import SourceKind

# A chunk of Blosc's holds less than 2 GiB: one of `time` all frames, in 8 bytes each, one of depth a frame's canvas.
_MOST_FRAMES = 2**28
_MOST_PIXELS = 2**30
_DECODES = {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned"}  # attributes by which xarray does
_EFFORT = {"clevel", "blocksize"}  # any number: stores keep theirs


def _one_chunk(size: list[int]) -> list[int]:
    if size[0] * size[1] > _MOST_PIXELS:
        raise ValueError(f"expected at most {_MOST_PIXELS} pixels")
    return size


_Side = Annotated[int, Field(ge=1)]
_Checksum = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    """JSON as it was written; what else it holds is the user's."""

    model_config = ConfigDict(strict=True)


class _Attributes(_Model):
    uri: str
    kind: SourceKind
    frames: Annotated[int, Field(ge=1, le=_MOST_FRAMES)]
    size: Annotated[list[_Side], Field(min_length=2, max_length=2), AfterValidator(_one_chunk)]
    fingerprint: str
    fps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    time_checksum: _Checksum = 0
    key_checksum: _Checksum = 0


class _Group(_Model):
    zarr_format: Literal[3]
    node_type: Literal["group"]
    attributes: _Attributes


class _Identity(_Model):
    checkpoints: dict[str, dict[str, Any]] = {}


class _Header(_Model):
    version: str
    layout: Layout
    identity: _Identity


_NAMES = {name for name, field in _Attributes.model_fields.items() if field.is_required()}


def attributes_of(document: Any) -> Document:
    """The attributes in the zarr.json of a group or array.

    Raises:
        ValueError: If it is none.
    """
    attributes = document.get("attributes", {}) if isinstance(document, dict) else None
    if not isinstance(attributes, dict):
        raise ValueError("it is no JSON of a group")
    return attributes


def is_source(attributes: Document) -> bool:
    """Whether these are, or were before they were damaged, of a source's group; any other is the user's."""
    return len(attributes.keys() & _NAMES) > len(_NAMES) // 2


def source_attributes_of(text: str | bytes) -> Document | None:
    """Attributes of the source whose group's zarr.json this is; None if it is the user's.

    Raises:
        ValueError: If it is damaged; says how.
    """
    document = json.loads(text)
    attributes = attributes_of(document)
    if not is_source(attributes):
        return None
    try:
        _Group.model_validate(document)
    except ValidationError as error:
        raise ValueError(_words(error)) from error
    return attributes


def damaged_words(path: str, error: ValueError) -> str:
    """What to say of a source's zarr.json of which the root does not say what it was."""
    return (
        f"{path} is damaged ({error}), and the root does not say what it was: put it back as it was, or remove the "
        "directory that it is in to label its input anew"
    )


def check_header(header: Document) -> None:
    """Refuse what no depthmill of this format wrote about a store as a whole.

    Raises:
        ValueError: Says what is wrong with it.
    """
    try:
        _Header.model_validate_json(json.dumps(header))
        Layout.from_document(header["layout"])
    except ValidationError as error:
        raise ValueError(_words(error)) from error
    except (ConfigError, KeyError, TypeError) as error:
        raise ValueError(f"layout: {error}") from error


def wrong_document(data: bytes | str | None, expected: Document) -> str:
    """What is wrong with a zarr.json, "" if nothing is; None is one that is not there."""
    if data is None:
        return "is missing"
    found = parsed(data)
    return "is no JSON" if found is None else difference(found, expected)


def difference(found: Any, expected: Any, where: str = "") -> str:
    """The first thing in which JSON differs from what is expected, "" if there is none.

    Whatever else it holds is the user's, unless xarray would decode by it; no reader goes by how hard Blosc was to try.
    """
    if found == expected:
        return ""
    if isinstance(expected, dict) and isinstance(found, dict):
        settled = (key for key in expected if key not in _EFFORT or not isinstance(found.get(key), int))
        keys = (*settled, *sorted(found.keys() & _DECODES))
        parts = (difference(found.get(key), expected.get(key), f"{where}.{key}".lstrip(".")) for key in keys)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        parts = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(found, expected, strict=True)))
    else:
        return f"has {where} {json.dumps(found)}; expected {json.dumps(expected)}"
    return next(filter(None, parts), "")


def parsed(data: bytes | str) -> Document | None:
    """JSON of a group or an array; None if it is none."""
    try:
        document = json.loads(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _words(error: ValidationError) -> str:
    """Each value that is not as it was written, and what it was to be."""
    return "; ".join(
        f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r:.80})"
        for item in error.errors(include_url=False)
    )
