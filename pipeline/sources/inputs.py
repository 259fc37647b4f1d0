"""From what the user names (files, folders, patterns, lists) to the paths of sources."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

from depthmill.pipeline.errors import MissingError, SourceError
from depthmill.pipeline.objects import is_bucket, is_url, names_version, path_of
from depthmill.pipeline.sources.naming import canonical_uri, is_preview, natural_key
from depthmill.pipeline.sources.opening import NOT_THERE, file_size, files_below, kind_of, list_files, unseen
from depthmill.pipeline.sources.suffixes import (
    FILE_SUFFIXES,
    IMAGE_SUFFIXES,
    PARQUET_SUFFIXES,
    SUFFIXES,
    UNREAD_SUFFIXES,
    UNREAD_TAR_SUFFIXES,
)

log = logging.getLogger(__name__)

_PICTURE_SUFFIXES = tuple(IMAGE_SUFFIXES)
_UNREAD = (
    ("pictures", tuple(UNREAD_SUFFIXES), "convert them to JPEG or PNG"),
    ("archives", UNREAD_TAR_SUFFIXES, "pack them with gzip, or not at all"),
)
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")

T = TypeVar("T")


class Refused(str):
    """An input that `open_source` does not open, but says why."""

    why = ""


def expand_inputs(inputs: Sequence[str]) -> Iterator[str]:
    """Turn files, folders, patterns and lists into absolute paths of sources: each once, in the order given.

    A folder that holds pictures, at any depth, is one source; each video and shard (tar, Parquet) in it is another.
    Linked subfolders are not looked into, unless they are named, or `**` matches them, which it does once for each
    folder, whatever leads there. What a folder or a glob gives comes in natural order, and of the files only those with
    the suffix of a source, without previews; of pictures and archives of other kinds a warning tells. An input that
    gives nothing stays as it is: opening it says what is wrong with it. Lists are read at once, all else is looked for
    when it is its turn.

    Args:
        inputs: What the user named, unless a file has that very name: `shard-{00000..00099}.tar` and `{a,b}.mp4` are
            all of them, whether they exist or not; `*`, `?`, `[…]` and `**` those that exist; `@list.txt` the lines of
            a text file, relative to its folder, without empty ones and those that start with `#`.

    Raises:
        SourceError: If an input is empty, or a list cannot be read, or names another list. Out of the iterator: if
            object storage does not say what is there. That is asked again with the next, so that nothing is left out.
    """
    if "" in inputs:  # a path of nothing is the current folder, all of which nobody meant
        raise SourceError("an input is empty, as a variable is that a shell does not know; for this folder give `.`")
    return _Expansion(_expanded([name for given in inputs for name in _listed(given)]))


class _Expansion(Iterator[str]):
    """What is found; an error among it is raised, after which there may be more: a generator would have ended."""

    def __init__(self, found: Iterator[str | SourceError]) -> None:
        self._found = found

    def __next__(self) -> str:
        one = next(self._found)
        if isinstance(one, SourceError):
            raise one
        return one


def _answered(ask: Callable[[], T]) -> Generator[SourceError, None, T]:
    """What is answered in the end; until then why it is not, each time that it is asked."""
    while True:
        try:
            return ask()
        except SourceError as error:
            yield error


def _expanded(names: Sequence[tuple[str, str]]) -> Iterator[str | SourceError]:
    """The sources of all names; of URLs that are called the same and are not, all but the first are refused."""
    seen: dict[str, str] = {}
    for folder, given in names:
        literal = False
        with suppress(SourceError):  # those who may read and not list are refused what is not there
            literal = "{" in given and _is_there(_in(folder, given))
        for named in [given] if literal else _braces(given):
            for source in _sources(folder, named):
                if isinstance(source, SourceError | Refused):
                    yield source
                    continue
                name = canonical_uri(source)
                opened = str(source) if is_url(source) else name  # a URL with what signs it
                if name not in seen:
                    seen[name] = opened
                    yield opened
                elif is_url(name) and (why := _another(name, seen[name], opened)):
                    refused = Refused(name)
                    refused.why = why
                    yield refused


def _another(name: str, first: str, second: str) -> str:
    """Why two URLs of the same name are not one input; "" if they are."""
    if is_bucket(name):
        both = name.lower().endswith(SUFFIXES) and first.endswith("/") != second.endswith("/")
        told = f"{name} is both an object and a prefix with pictures, which would be one source"
        return f"{told}; expected one of them: copy the other to a name of its own" if both else ""
    if parse_qsl(urlsplit(first).query) == parse_qsl(urlsplit(second).query):
        return ""
    return (
        f"{name} was given twice, with different signatures or tokens, by which inputs are not told apart: give it "
        "once, or each input in a run and a store of its own"
    )


def _listed(given: str) -> list[tuple[str, str]]:
    """The lines of a list, each with the folder that it is relative to; anything else as it is."""
    if not given.startswith("@") or kind_of(given):
        return [("", given)]
    path = Path(_in("", given[1:]))
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(
            f"the list {path} cannot be read ({error}); expected a text file, one input a line"
        ) from error
    names = []
    for line in (line.strip() for line in lines):
        if line.startswith("@"):
            raise SourceError(f"the list {path} names another list, {line}: give that one as an input of its own")
        if line and not line.startswith("#"):
            names.append((str(path.parent), line))
    return names


def _braces(pattern: str) -> Iterator[str]:
    """Each choice of `{a,b}` and `{08..12}`, the last group's changing fastest; numbers as wide as they are written."""
    for group in re.finditer(r"\{([^{}]*)\}", pattern):
        numbers = _RANGE.fullmatch(group[1])
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            padded = any(re.match(r"-?0\d", end) for end in numbers.groups())
            width = max(map(len, numbers.groups())) if padded else 0
            step = 1 if first <= last else -1
            choices = (f"{number:0{width}}" for number in range(first, last + step, step))
        elif "," in group[1]:
            choices = (choice for choice in group[1].split(","))
        else:
            continue
        for choice in choices:
            yield from _braces(pattern[: group.start()] + choice + pattern[group.end() :])
        return
    yield pattern


def _sources(folder: str, given: str) -> Iterator[str | Path | SourceError]:
    """The sources of one name, relative to a folder: a file, a folder or a glob."""
    path = _in(folder, given)
    found: Iterator[str | Path | SourceError] = iter(())
    if is_url(path):
        found = _at_url(path)
    elif kind_of(path) == "folder":
        found = _in_folder(Path(path))
    elif glob.has_magic(given) and not kind_of(path):
        found = _matches(_in(glob.escape(folder), given))
    empty = True
    for source in found:
        empty = empty and isinstance(source, SourceError)
        yield source
    if empty:
        yield path


def _at_url(given: str) -> Iterator[str | SourceError]:
    """As for paths: nothing of a file, the sources of a prefix or a glob. What is not there is given as it is."""
    name = path_of(given)
    if "@" in urlsplit(given).netloc or names_version(given):  # opening it refuses that, and tells no password
        return
    if glob.has_magic(name) and not (yield from _answered(partial(_is_there, given))):
        yield from _matching_urls(given)
    elif is_bucket(given) and not name.lower().endswith(SUFFIXES):
        yield from _in_prefix(given)


def _matching_urls(pattern: str) -> Iterator[str | SourceError]:
    if is_bucket(pattern):
        found = yield from _answered(partial(list_files, pattern, pattern=True))
    else:
        try:
            found = list_files(pattern, pattern=True)
        except SourceError:  # a server on the web may have a file of that very name, and list nothing
            return
    if "/." not in pattern:
        found = [url for url in found if "/." not in url]
    _tell_unread(pattern, found)
    files = {url for url in found if url.lower().endswith(SUFFIXES)}
    prefixes = {url for url in found if url.endswith("/") and is_bucket(url)}
    for url in _outermost(files, prefixes):
        yield from [url] if url in files else _in_prefix(url)


def _in_prefix(prefix: str) -> Iterator[str | SourceError]:
    found = yield from _answered(partial(list_files, prefix))
    found = [url for url in found if "/." not in url.removeprefix(prefix.rstrip("/"))]
    _tell_unread(prefix, found)
    if any(url.lower().endswith(_PICTURE_SUFFIXES) for url in found):
        yield prefix
    names = {*found, *(url.rpartition("/")[0] for url in found)}
    for url in sorted(found, key=natural_key):
        if url.lower().endswith(FILE_SUFFIXES) and not _is_metadata(url, names):
            yield url


def _in_folder(folder: Path) -> Iterator[Path]:
    found, error = files_below(folder)
    _tell_unread(folder, [path.name for path in found])
    if error or any(path.name.lower().endswith(_PICTURE_SUFFIXES) and _is_file(path) for path in found):
        yield folder  # opening it says what could not be listed
    files = [path for path in found if path.name.lower().endswith(FILE_SUFFIXES) and (_is_file(path) or unseen(path))]
    names = {path.as_posix() for path in files} | {path.parent.as_posix() for path in found}
    for path in sorted(files, key=lambda path: natural_key(path.as_posix())):
        if not _is_metadata(path.as_posix(), names):
            yield path


def _is_file(path: str | Path) -> bool:
    """Whether this is a file, or a link that leads nowhere, as when a mount is away: opening it says so."""
    return kind_of(path) == "file" or (os.path.islink(path) and not (kind_of(path) or unseen(path)))  # noqa: PTH114


def _tell_unread(folder: object, names: Sequence[str]) -> None:
    for what, unread, remedy in _UNREAD:
        left_out = [name.lower() for name in names if name.lower().endswith(unread)]
        suffixes = Counter(suffix for name in left_out for suffix in unread if name.endswith(suffix))
        if suffixes:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common())
            _warn_once(f"{folder}: {what} of kinds that are not read are left out ({kinds}): {remedy}")


@cache
def _warn_once(text: str) -> None:
    log.warning(text)


def _is_metadata(name: str, names: set[str]) -> bool:
    """Whether this is a Parquet file of metadata, as img2dataset writes beside a tar, or a numbered folder."""
    stem, dot, suffix = name.rpartition(".")
    beside = f"{stem}.tar" in names or (stem.rpartition("/")[2].isdecimal() and stem in names)
    return dot + suffix.lower() in PARQUET_SUFFIXES and beside


def _matches(pattern: str) -> Iterator[str | Path]:
    unlisted: dict[str, OSError] = {}
    matches = _glob(pattern, unlisted)
    found = [os.path.abspath(match) for match in matches if not is_preview(match)]  # noqa: PTH100 (as canonical_uri)
    _tell_unread(pattern, found)
    for path in found:
        if path.lower().endswith(SUFFIXES) or not os.path.splitext(path)[1]:  # noqa: PTH122 (a Path takes longer)
            _found(os.stat, path, unlisted)
    files = {path for path in found if path.lower().endswith(SUFFIXES) and _is_file(path)}
    folders = {os.path.join(path, "") for path in found if kind_of(path) == "folder"}  # noqa: PTH118 (keeps the slash)
    given = _outermost(files, folders)
    for path in given:
        yield from [Path(path)] if path in files else _in_folder(Path(path))
    for folder, error in unlisted.items():
        path = os.path.join(os.path.abspath(folder), "")  # noqa: PTH100, PTH118 (as above)
        if not {path, *_parents(path)} & set(given):  # else opening it says so
            refused = Refused(path)
            refused.why = (
                f"{folder}: cannot be read ({error.strerror}); expected all that {pattern} matches: let it be read, or "
                "name the others"
            )
            yield refused


def _outermost(files: set[str], folders: set[str]) -> list[str]:
    """What matches, in order, without folders (with `/`) that hold a file that does, or lie in a folder that does.

    `**` matches a folder and what is in it: files count before their folder, an outer folder before inner ones.
    """
    folders = folders.difference(*map(_parents, files))
    names = sorted(files | folders, key=lambda name: (natural_key(name.removesuffix("/")), name))
    return [name for name in names if not folders.intersection(_parents(name))]


def _parents(name: str) -> list[str]:
    return [name[: slash.end()] for slash in re.finditer(r"/(?!\Z)", name)]


def _glob(pattern: str, unlisted: dict[str, OSError]) -> list[str]:
    """What matches, as `glob.glob` has it, but that `**` goes once into each folder, however many links lead there.

    What cannot be listed, or looked at, is added to `unlisted`, with the reason: `glob.glob` says nothing of it.
    """
    places = ["/" * pattern.startswith("/")]
    parts = [part for part in pattern.split("/") if part]
    for part in parts:
        if part == "**":
            places = _walk([place or os.curdir for place in places], unlisted)
        else:
            places = [match for place in places for match in _entries(place, part, unlisted)]
    if parts[-1:] == ["**"]:
        found = [match for place in places for match in _entries(place, "*", unlisted)]
        places += [match for match in found if kind_of(match) != "folder"]  # of which each is there, once
    found = [place for place in places if kind_of(place) == "folder"] if pattern.endswith("/") else places
    return list(dict.fromkeys(found))


def _entries(place: str, part: str, unlisted: dict[str, OSError]) -> list[str]:
    """What in a folder is called like a part of a pattern."""
    if not glob.has_magic(part):
        path = os.path.join(place, part)  # noqa: PTH118 (as above)
        return [path] if _found(os.lstat, path, unlisted) else []
    names = fnmatch.filter((entry.name for entry in _listing(place or os.curdir, unlisted)), part)
    names = [name for name in names if part.startswith(".") or not name.startswith(".")]
    return [os.path.join(place, name) for name in names]  # noqa: PTH118 (as above)


def _listing(folder: str, unlisted: dict[str, OSError]) -> list[os.DirEntry[str]]:
    with _found(os.scandir, folder, unlisted) or nullcontext(()) as entries:
        return list(entries)


def _found(ask: Callable[[str], T], path: str, unlisted: dict[str, OSError]) -> T | None:
    """What is answered of a path; None if nothing is there, or that cannot be seen: then it is added to `unlisted`."""
    try:
        return ask(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            unlisted[path] = error
    except ValueError:  # a name with a NUL in it
        pass
    return None


def _walk(given: Iterable[str], unlisted: dict[str, OSError]) -> list[str]:
    """The folders and those below, without hidden ones, each once: by a path without a link if there is one."""
    folders: dict[str, str] = {}  # without links -> as found
    waiting, linked = deque[str](), deque[str]()
    for folder in given:
        if kind_of(folder) == "folder":
            (linked if os.path.islink(folder.rstrip("/")) else waiting).append(folder)  # noqa: PTH114
    while waiting or linked:
        folder = waiting.popleft() if waiting else linked.popleft()
        real = os.path.realpath(folder)
        if real in folders:
            continue
        folders[real] = folder
        for entry in sorted(_listing(folder, unlisted), key=lambda entry: entry.path):
            if not entry.name.startswith("."):
                # Not every file system gives types with names; then each is asked for, and that may be refused.
                kind = _found(partial(_kind, entry), entry.path, unlisted)
                waiting += [entry.path] if kind == "folder" else []
                linked += [entry.path] if kind == "link" and kind_of(entry.path) == "folder" else []
    return list(folders.values())


def _kind(entry: os.DirEntry[str], _: str) -> str:
    return "link" if entry.is_symlink() else "folder" if entry.is_dir(follow_symlinks=False) else "other"


def _in(folder: str, name: str) -> str:
    """A URL as it is; a path relative to the folder. `~` is a home folder, if there is such a one."""
    # Path.expanduser raises where there is none, and a Path has no slash at its end.
    return name if is_url(name) else os.path.join(folder, os.path.expanduser(name))  # noqa: PTH111, PTH118


def _is_there(name: str) -> bool:
    """Whether there is a file or a folder of this very name, on a disk or in a bucket.

    Raises:
        SourceError: If that cannot be told.
    """
    if not is_url(name):
        return bool(kind_of(name))
    with suppress(MissingError):
        return is_bucket(name) and file_size(name) >= 0
    return False
