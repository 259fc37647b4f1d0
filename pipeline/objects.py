"""Object storage and the web, through fsspec: which library opens a URL, and what may be said of it.

Credentials are found by those libraries in the usual places: the environment (`AWS_*`, `GOOGLE_*`), files such as
`~/.aws`, fsspec's own configuration. What a URL itself carries (a signature, a token) opens it in this process, and is
in nothing that is shown, stored or raised.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from depthmill.pipeline.errors import DepthmillError

EXTRAS = {"s3": "s3", "gs": "gs", "https": "https", "http": "https"}  # scheme -> what pip installs for it

_BUCKETS = ("s3", "gs")

_SECRET_NAME = re.compile(r"(AWS|FSSPEC|GOOGLE)_.*(KEY|SECRET|TOKEN)")  # in the environment
# Of a query, in small letters: what opens a URL and is another on another day, and what goes with a signature.
_SECRETS = re.compile(r"x-(amz|goog)-.*|sig|signature|(access_?|auth_?)?token|api_?key|password|secret")
_BESIDE_SIGNATURE = re.compile(
    r"expires|policy|(key-pair|awsaccesskey|ossaccesskey|googleaccess)-?id|security-token"  # CloudFront, S3, Google
    r"|s[eiprstv]|s(pr|ip|rt|dd|ks|kt|ke|kv|koid|ktid|aoid|uoid|cid|es)"  # Azure
)
# What may be a secret, or the name of something: it tells URLs apart, without being told.
_MAYBE_SECRET = re.compile(r".*(sign|token|key|secret|passw|cred|auth)")
_HASHED = re.compile(r"~[0-9a-f]{12}")

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints the traceback of whatever it raises

_signed: dict[str, str] = {}  # URL without secrets -> the URL that was given


def is_url(uri: object) -> bool:
    """Whether this is a URL, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(uri)) is not None


def is_bucket(uri: str) -> bool:
    """Whether this is a URL of object storage, where prefixes can be listed."""
    return uri.partition("://")[0].lower() in _BUCKETS


def names_version(uri: str) -> bool:
    """Whether this is a URL of one version of an object."""
    return uri.lower().startswith("s3://") and "?versionId=" in uri


def shown(uri: str) -> str:
    """What may be shown and stored of a path or URL: no user, no password, nothing of a query that signs or expires.

    Of a query's values that may be secret, or may say which input this is, a hash is left.
    """
    if not is_url(uri):
        return uri
    parts = urlsplit(uri)
    if parts.scheme in _BUCKETS:
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path_of(uri)}".rstrip("/")
    query = parse_qsl(parts.query, True)
    signed = any(name.lower() in ("sig", "signature") for name, _ in query)
    query = [(name, _told(name.lower(), value)) for name, value in query if not _is_secret(name.lower(), signed)]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), urlencode(query), ""))


def _is_secret(name: str, signed: bool) -> bool:
    return bool(_SECRETS.fullmatch(name) or (signed and _BESIDE_SIGNATURE.fullmatch(name)))


def _told(name: str, value: str) -> str:
    if not _MAYBE_SECRET.match(name) or _HASHED.fullmatch(value):
        return value
    return "~" + hashlib.sha256(value.encode()).hexdigest()[:12]


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


def with_secrets(uri: str) -> str:
    """The URL that `without_secrets` was given for this one, for a worker that was not; others as they are."""
    return _signed.get(uri, uri)


def locate(uri: str, error: type[DepthmillError]) -> tuple[Any, str]:
    """The file system that a URL is on, as `without_secrets` gave it, and its path there.

    Raises:
        DepthmillError: If nothing opens such URLs, a library for it is not installed, or it names a version, which that
            would silently leave out; of the type `error`.
    """
    import fsspec

    scheme = urlsplit(uri).scheme
    if scheme not in EXTRAS:
        raise error(f"{uri}: {scheme}:// is not known; expected a path, or one of {', '.join(EXTRAS)}")
    if names_version(uri):
        raise error(
            f"{uri}: names a version of an object; expected one without, since only current versions are read: copy "
            "that version to a key of its own"
        )
    try:
        files = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        raise error(
            f"{uri}: {scheme}:// needs a library that is not installed: pip install 'depthmill[{EXTRAS[scheme]}]'"
        ) from None
    except Exception as problem:
        raise error(f"{uri}: {scheme}:// cannot be opened: {said(problem)}") from None
    full = with_secrets(uri)
    return files, full if scheme.startswith("http") else full.partition("://")[2]


def said(error: BaseException) -> str:
    """What an error says, in one line and without the secrets of the environment or of URLs."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # Some libraries write a URL otherwise than it was given, or where it was redirected to.
    text = re.sub(r"https?://[^\s'\"<>\[\]]+", lambda url: shown(url[0]), text)
    for full in _signed.values():
        for _, value in parse_qsl(urlsplit(full).query):
            text = text.replace(value, "***") if len(value) > 7 else text
    for name, value in os.environ.items():
        if value and _SECRET_NAME.match(name):
            text = text.replace(value, "***")
    return text
