"""What is said of an input by where it lies, at the cost of none of its bytes: whether it may have changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from depthmill.pipeline.file_state import file_state
from depthmill.pipeline.objects import is_bucket, is_url, path_of
from depthmill.pipeline.sources import checked
from depthmill.pipeline.sources.naming import is_preview
from depthmill.pipeline.sources.opening import below, details, files_below, kind_of, translated
from depthmill.pipeline.sources.suffixes import SUFFIXES, is_picture


def stamp(uri: str, *options: object) -> str:
    """Names, sizes and both times of change of an input's files, or ETags of its objects, in short.

    As long as it stays the same, so does the input, as Git takes it: files that are written over, renamed or unpacked
    have another inode's time. A fingerprint says more, being that of a copy, too; but videos are read whole for it, and
    of pictures each one's header.

    Args:
        uri: Path or URL, as for `open_source`.
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
        names = [""] if error else sorted(str(file) for file in files if is_picture(file.name))
    for name in names:
        state = ""
        with suppress(OSError, ValueError):
            state = file_state(name)
        yield name, state


def _objects(uri: str, is_prefix: bool) -> Iterator[tuple[str, str]]:
    """The same of a URL: of an object, or of all pictures below a prefix."""
    is_object = not is_bucket(uri) or (path_of(uri).lower().endswith(SUFFIXES) and not is_prefix)
    with translated(uri) as (files, path):
        found = {path: details(uri)} if is_object else below(files, path)
    for name in sorted(found):
        if name == path or (is_picture(name) and not is_preview(name)):
            tag = str(found[name].get("ETag") or found[name].get("generation") or "")
            yield name, "" if tag.startswith("W/") else tag  # a weak one may stay where bytes change
