"""What is said of an input by where it lies, at the cost of none of its bytes: whether it may have changed since."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from depthmill.pipeline.objects import is_bucket, is_url, path_of
from depthmill.pipeline.sources import checked
from depthmill.pipeline.sources.naming import is_preview
from depthmill.pipeline.sources.opening import details, files_below, kind_of, translated
from depthmill.pipeline.sources.suffixes import IMAGE_SUFFIXES, SUFFIXES

# A file that is written twice within one tick of its disk's clock keeps its time: of 2 s on FAT, of ms elsewhere.
_TICK_NS = 2 * 10**9


def stamp(uri: str, *options: object) -> str:
    """Names, sizes and both times of change of an input's files, or ETags of its objects, in short.

    As long as it stays the same, so does the input, as Git takes it: files that are written over, renamed or unpacked
    have another inode's time. A fingerprint says more, being that of a copy, too; but videos are read whole for it, and
    of pictures each one's header.

    Args:
        uri: Path or URL, as `checked` gives it.
        options: What else decides what probing finds.

    Returns:
        32 hexadecimal digits; "" if nothing can be said: the input was written just now, or its server gives no strong
        ETag.

    Raises:
        SourceError: As `checked`, or if a URL's server does not answer; MissingError if there is nothing.
    """
    digest = hashlib.blake2b(repr(options).encode(), digest_size=16)
    known = ""
    plain = checked(uri)
    for name, known in _objects(plain, uri.endswith("/")) if is_url(plain) else _files(plain):
        if not known:
            return ""
        digest.update(f"{name}\0{known}\0".encode(errors="surrogateescape"))
    return digest.hexdigest() if known else ""


def _files(path: str) -> Iterator[tuple[str, str]]:
    """Each file, in order, and what is known of it; "" if that may stay the same while it changes."""
    names = [path]
    if kind_of(path) == "folder":
        files, error = files_below(Path(path))
        names = [""] if error else sorted(str(file) for file in files if _is_picture(file.name))
    settled_ns = time.time_ns() - _TICK_NS
    for name in names:
        try:
            found = os.stat(name)  # noqa: PTH116 (a Path per name takes longer)
        except (OSError, ValueError):
            yield name, ""
        else:
            settled = max(found.st_mtime_ns, found.st_ctime_ns) < settled_ns
            yield name, f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}" if settled else ""


def _objects(uri: str, is_prefix: bool) -> Iterator[tuple[str, str]]:
    """The same of a URL: of an object, or of all pictures below a prefix."""
    is_object = not is_bucket(uri) or (path_of(uri).lower().endswith(SUFFIXES) and not is_prefix)
    with translated(uri) as (files, path):
        found = {path: details(uri)} if is_object else files.find(path, detail=True)
    for name in sorted(found):
        if name == path or (_is_picture(name) and not is_preview(name)):
            tag = str(found[name].get("ETag") or found[name].get("generation") or "")
            yield name, "" if tag.startswith("W/") else tag  # a weak one may stay where bytes change


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (a Path per name takes longer)
