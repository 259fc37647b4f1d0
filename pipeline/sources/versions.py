"""Whether an input is still the one that was probed, from which its fingerprint is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from depthmill.pipeline.errors import SourceChangedError
from depthmill.pipeline.objects import is_bucket, is_url
from depthmill.pipeline.sources.opening import OWN_ERRORS, details, unanswered
from depthmill.pipeline.types import Source

Probed = TypeVar("Probed", bound=tuple[Source, *tuple[Any, ...]])  # a source, and what its reader keeps of it

_SAMPLE_BYTES = 4096  # of the beginning and end of each picture, for the fingerprint
_ENDS_BYTES = 1 << 16  # of a whole file


@dataclass(frozen=True)
class Version:
    """What can be said of a file without reading all of it.

    Attributes:
        size: In bytes; None if that is unknown.
        etag: Its server's tag (RFC 9110, 8.8.3), or Google's generation; of a path, a hash of its ends; or "".
        modified: When it was changed last, in its server's words; "" for a path, since touching it changes nothing, or
            in a bucket, where the tag says all.
    """

    size: int | None
    etag: str = ""
    modified: str = ""

    def same(self, other: Version) -> bool:
        """Whether it may be the same file.

        Equal strong tags say so, and after them equal times: servers with one name may give the same bytes tags of
        their own (of inodes, of a packing on the way). Without times, tags decide, weak ones included; without either,
        the size.
        """
        if None not in (self.size, other.size) and self.size != other.size:
            return False
        if self.etag and self.etag == other.etag and not self.etag.startswith("W/"):
            return True
        if self.modified and other.modified:
            return self.modified == other.modified
        tags = {version.etag.removeprefix("W/") for version in (self, other)}
        return "" in tags or len(tags) == 1


def version_of(uri: str) -> Version:
    """The version that is there now, nothing being known of a path where there is none; of a URL, after one request.

    Raises:
        SourceError: If its server cannot be asked.
    """
    if not is_url(uri):
        ends = hashlib.sha256()
        try:
            with Path(uri).open("rb") as file:
                return Version(sample(file, ends, _ENDS_BYTES)[0], ends.hexdigest())
        except OSError:
            return Version(None)
    told = details(uri)
    etag, modified = (
        next((str(told[name]) for name in names if told.get(name)), "")
        for names in (("ETag", "generation"), ("Last-Modified", "LastModified", "mtime"))
    )
    return Version(told["size"], etag, "" if etag and is_bucket(uri) else modified)


def check_unchanged(uri: str, version: Version) -> None:
    """Ask whether a file is still of this version: where reading it failed, and before what was read is believed.

    Raises:
        SourceChangedError: If it is of another.
        SourceError: If its server cannot be asked.
    """
    if not version.same(version_of(uri)):
        raise changed(uri)


def settled(uri: str, probe: Callable[[], tuple[Version, Probed]]) -> tuple[Version, Probed]:
    """What probing gives of a file that stayed the same meanwhile, and the file's version before.

    Where a server's words change and a second probe finds the same, its words say nothing: the size alone is compared
    from then on.

    Raises:
        SourceChangedError: If the file did not stay the same.
    """
    version, probed = probe()
    if version.same(version_of(uri)):
        return version, probed
    version, again = probe()
    if again[0].fingerprint != probed[0].fingerprint:
        raise changed(uri)
    return Version(version.size), again


def changed(what: str, why: str = "") -> SourceChangedError:
    """What to raise where an input, or a picture in it, is another one than when it was probed."""
    return SourceChangedError(
        f"{what} changed since it was labelled, or was to be{why and f' ({why})'}; expected it unchanged, and "
        "the same on every machine: put it back, or label it anew"
    )


def is_another(picture: Path | BinaryIO, digest: str) -> bool:
    """Whether a picture has another digest than this one of `sample`; of one that cannot be read, that is unknown.

    Raises:
        SourceError: If it cannot be read for a reason that is not its own.
    """
    now = hashlib.sha256()
    try:
        with picture.open("rb") if isinstance(picture, Path) else nullcontext(picture) as file:
            sample(file, now)
    except OSError as error:
        if error.errno not in OWN_ERRORS:
            raise unanswered(picture, error) from error
        return False
    return now.hexdigest() != digest


def sample(file: BinaryIO, digest: Any, ends_bytes: int = _SAMPLE_BYTES) -> tuple[int, bytes]:
    """Hash a file's size and its first and last bytes: fingerprints of folders and shards are made of their pictures'.

    Returns:
        The size, and the first bytes.
    """
    size = file.seek(0, os.SEEK_END)
    digest.update(str(size).encode())
    head = b""
    for start in (0, max(0, size - ends_bytes)):
        file.seek(start)
        part = file.read(ends_bytes)
        digest.update(part)
        head = head or part
    return size, head
