from __future__ import annotations

import re
from pathlib import Path

import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import expand_inputs, open_source, source_id
from depthmill.tests import media as make


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("clip2.mp4", "clip10.mp4", "deep/er/clip1.mkv", "notes.txt", "[odd].mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    make.write_image_folder(tmp_path / "photos", count=2)
    return tmp_path


def expand(tree: Path, *inputs: str) -> list[str]:
    return [Path(path).relative_to(tree).as_posix() for path in expand_inputs([str(tree / given) for given in inputs])]


def test_files_folders_and_patterns(tree: Path) -> None:
    assert expand(tree, "clip10.mp4", "clip2.mp4") == ["clip10.mp4", "clip2.mp4"]
    assert expand(tree, "clip*.mp4") == ["clip2.mp4", "clip10.mp4"]
    assert expand(tree, "photos") == ["photos"]
    assert expand(tree, "photos/*.png") == ["photos/000.png", "photos/001.png"]
    assert expand(tree, "deep") == ["deep/er/clip1.mkv"]
    assert expand(tree, "**/*.mkv") == ["deep/er/clip1.mkv"]
    assert expand(tree, "p*", "clip2.mp4") == ["photos", "clip2.mp4"]
    assert expand(tree, "notes.txt") == ["notes.txt"]  # named itself: opening it says what it is
    assert expand(tree, "*.txt") == ["*.txt"]


def test_duplicates_are_dropped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert expand_inputs(["clip2.mp4", "./clip2.mp4", str(tree / "photos" / ".." / "clip2.mp4"), "clip*.mp4"]) == [
        str(tree / "clip2.mp4"),
        str(tree / "clip10.mp4"),
    ]


def test_a_name_that_looks_like_a_pattern(tree: Path) -> None:
    assert expand(tree, "[odd].mp4") == ["[odd].mp4"]


def test_what_matches_nothing_fails_when_opened(tree: Path) -> None:
    for given in ("missing.mp4", "missing*.mp4"):
        (path,) = expand_inputs([str(tree / given)])
        with pytest.raises(SourceError, match=r"no such file.*expected.*check"):
            open_source(path)


def test_source_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = source_id("My clip (1).mp4")
    assert re.fullmatch(r"my-clip-1-[0-9a-f]{8}", name)
    assert name == source_id(tmp_path / "My clip (1).mp4")
    assert name != source_id(tmp_path / "other" / "My clip (1).mp4")
    assert re.fullmatch(r"source-[0-9a-f]{8}", source_id("日本.mp4"))
    assert len(source_id("x" * 250 + ".mp4")) < 80
