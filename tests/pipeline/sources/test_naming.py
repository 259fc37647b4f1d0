from __future__ import annotations

from depthmill.pipeline.sources.naming import readable, unique_names


def test_unique_names() -> None:
    assert unique_names(["a", "a~2", "a", "b", "a"]) == ("a", "a~2", "a~3", "b", "a~4")


def test_readable() -> None:
    assert readable("ö\udcff") == "ö\\xff"
