"""From what the user names (files, folders, patterns) to the paths of sources."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from depthmill.pipeline.sources.images import IMAGE_SUFFIXES
from depthmill.pipeline.sources.naming import absolute, natural_key
from depthmill.pipeline.sources.video import VIDEO_SUFFIXES


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """Turn files, folders and patterns into absolute paths of sources: each once, in the order given.

    A folder that holds pictures, at any depth, is one source; each video in it is another. What a folder or a pattern
    gives comes in natural order, and of the files only those with the suffix of a picture or a video. An input that
    gives nothing stays as it is: opening it says what is wrong with it.

    Args:
        inputs: What the user named. `*`, `?`, `[…]` and `**` make a pattern, unless a file has that very name.
    """
    found: dict[str, None] = {}
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            sources = list(_in_folder(path))
        elif not path.exists() and glob.has_magic(given):
            sources = list(_matches(str(path)))
        else:
            sources = [path]
        found.update(dict.fromkeys(str(absolute(source)) for source in sources or [path]))
    return list(found)


def _in_folder(folder: Path) -> Iterator[Path]:
    files = [path for path in folder.rglob("*") if not _is_hidden(path.relative_to(folder)) and path.is_file()]
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in files):
        yield folder
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    yield from sorted(videos, key=lambda path: natural_key(path.as_posix()))


def _matches(pattern: str) -> Iterator[Path]:
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True), key=natural_key)]  # noqa: PTH207 (absolute patterns)
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    files = [path for path in paths if path.is_file() and path.suffix.lower() in known]
    # `**` matches a folder and what is in it: files count before their folder, an outer folder before inner ones.
    inner = {parent for path in files for parent in path.parents}
    folders = [path for path in paths if path.is_dir() and path not in inner]
    outer = [path for path in folders if not set(path.parents) & set(folders)]
    for path in paths:
        if path in files:
            yield path
        elif path in outer:
            yield from _in_folder(path)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
