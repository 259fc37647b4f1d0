"""Object storage and the web, through fsspec: which library opens a URL, and what may be said of it.

Credentials are found by those libraries in the usual places: the environment (`AWS_*`, `GOOGLE_*`), files such as
`~/.aws`, fsspec's own configuration. What a URL itself carries (a signature, a token) opens it in this process, and is
in nothing that is shown, stored or raised.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from depthmill.pipeline.errors import DepthmillError

EXTRAS = {"s3": "s3", "gs": "gs", "https": "https", "http": "https"}  # scheme -> what pip installs for it

_BUCKETS = ("s3", "gs")

_SECRET_NAME = re.compile(r"(AWS|FSSPEC|GOOGLE)_.*(KEY|SECRET|TOKEN)")  # in the environment
# Of a query: signed URLs of S3, Google, Azure and CloudFront, and what is called a key, token or password anywhere.
_SECRET_QUERY = re.compile(
    r"(?i)^(x-(amz|goog)-.*|s[eiprtvk]|s(ks|kt|ke|kv|koid|ktid)|sig|expires|policy|.*(sign|token|key|secret|passw|cred).*)$"
)

_signed: dict[str, str] = {}  # URL without secrets -> the URL that was given


def is_url(uri: object) -> bool:
    """Whether this is a URL, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(uri)) is not None


def shown(uri: str) -> str:
    """What may be shown and stored of a path or URL: no user, no password, nothing of a query that signs or expires."""
    if not is_url(uri):
        return uri
    parts = urlsplit(uri)
    if parts.scheme in _BUCKETS:
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path_of(uri)}".rstrip("/")
    query = [(name, value) for name, value in parse_qsl(parts.query, True) if not _SECRET_QUERY.match(name)]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), urlencode(query), ""))


def path_of(url: str) -> str:
    """The path in a URL, with its first slash; `?` and `#` are letters of a key in a bucket, which has no query."""
    parts = urlsplit(url)
    if parts.scheme not in _BUCKETS:
        return parts.path
    _, slash, key = url.partition("://")[2].partition("/")
    return slash + key


def without_secrets(uri: str) -> str:
    """The same URL as `shown`, by which this process can open it from now on."""
    plain = shown(uri)
    if plain != uri.rstrip("/"):
        _signed[plain] = uri
    return plain


def locate(uri: str, error: type[DepthmillError]) -> tuple[Any, str]:
    """The file system that a URL is on, and its path there.

    Args:
        uri: As `without_secrets` gave it.
        error: What to raise.

    Raises:
        DepthmillError: If nothing opens such URLs, or a library for it is not installed; of the type `error`.
    """
    import fsspec

    scheme = urlsplit(uri).scheme
    if scheme not in EXTRAS:
        raise error(f"{uri}: {scheme}:// is not known; expected a path, or one of {', '.join(EXTRAS)}")
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        raise error(
            f"{uri}: {scheme}:// needs a library that is not installed: pip install 'depthmill[{EXTRAS[scheme]}]'"
        ) from None
    except Exception as problem:
        raise error(f"{uri}: {scheme}:// cannot be opened: {said(problem)}") from None
    full = _signed.get(uri, uri)
    return files, full if scheme.startswith("http") else full.partition("://")[2]


def said(error: BaseException) -> str:
    """What an error says, in one line and without the secrets of the environment or of URLs."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for plain, full in _signed.items():
        text = text.replace(full, plain)
        for _, value in parse_qsl(urlsplit(full).query):
            text = text.replace(value, "***") if len(value) > 7 else text
    for name, value in os.environ.items():
        if value and _SECRET_NAME.match(name):
            text = text.replace(value, "***")
    return text
