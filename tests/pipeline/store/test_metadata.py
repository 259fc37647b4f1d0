"""What a source's zarr.json may say, to the last value that can be stored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from depthmill.pipeline.store.metadata import source_attributes_of

WRITTEN = {"uri": "/in/a.mp4", "kind": "video", "frames": 3, "size": [24, 32], "fingerprint": "f1"}


def document(attributes: dict[str, Any], **others: Any) -> str:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes, **others})


@pytest.mark.parametrize(
    "changed", [{}, {"frames": 1}, {"frames": 2**28}, {"size": [2**15, 2**15]}, {"fps": 0}, {"note": "the user's"}]
)
def test_what_can_be(changed: dict[str, Any]) -> None:
    assert source_attributes_of(document(WRITTEN | changed)) == WRITTEN | changed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("frames", value) for value in (0, 2**28 + 1, "3")),
        *(("size", value) for value in ([0, 32], [24], [24, 32, 3], [2**15, 2**15 + 1])),
        *(("fps", value) for value in (-1.0, float("nan"), float("inf"))),
        *(("fingerprint", 5), ("uri", 5), ("kind", "film"), ("time_checksum", -1), ("key_checksum", -1)),
    ],
)
def test_what_cannot_be(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^attributes\.{name}[.0-9]*: .* \(got "):
        source_attributes_of(document(WRITTEN | {name: value}))


@pytest.mark.parametrize("other", [{"zarr_format": 2}, {"node_type": "array"}])
def test_what_no_group_of_zarr_3_is(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(other))}: "):
        source_attributes_of(document(WRITTEN, **other))


def test_most_of_what_a_source_says_makes_it_one() -> None:
    """Three of five: a group of the user's may have a size and a kind."""
    some = {name: WRITTEN[name] for name in ("kind", "size")}
    assert source_attributes_of(document(some)) is None
    with pytest.raises(ValueError, match="Field required"):
        source_attributes_of(document(some | {"frames": 3}))
