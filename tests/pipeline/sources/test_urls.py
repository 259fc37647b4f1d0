"""What of a URL names a source, and what may be said of it."""

from __future__ import annotations

import pickle

import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.objects import shown
from depthmill.pipeline.sources import expand_inputs, open_source, source_id


def test_urls_that_differ_are_told_apart_without_telling_secrets() -> None:
    for query in ("key=videos/{}", "design={}", "keyframe={}", "rlkey=abc{}", "se={}", "st={}", "policy={}", "x={}"):
        urls = [f"https://host/get.mp4?{query.format(number)}" for number in (1, 2)]
        assert list(expand_inputs(urls)) == urls
        assert len({source_id(url) for url in urls}) == 2
    hashed = shown("https://host/get.mp4?key=videos/1&x=y")
    assert "videos" not in hashed
    assert hashed == shown(hashed)
    for query in (
        "Expires=5&AWSAccessKeyId=AKID&Signature=abc",
        "Policy=p&Signature=abc&Key-Pair-Id=k",
        "GoogleAccessId=me&Expires=5&Signature=abc",
        "sv=2024&se=5&sr=b&sp=r&st=4&spr=https&skoid=1&sktid=2&sig=abc",
        "X-Goog-Algorithm=a&X-Goog-Signature=abc",
        "access_token=abc&api_key=k",
    ):
        assert shown(f"https://host/a.mp4?x=1&{query}") == "https://host/a.mp4?x=1"


def test_urls_that_differ_in_their_tokens_alone_are_refused() -> None:
    urls = [f"https://host/get.mp4?token={number}" for number in (1, 1, 2)]
    first, second, other = expand_inputs([*urls, "https://host/other.mp4"])
    assert (first, second, other) == (urls[0], "https://host/get.mp4", "https://host/other.mp4")
    with pytest.raises(
        SourceError, match=r"https://host/get\.mp4 was given twice, with different signatures or tokens"
    ):
        open_source(pickle.loads(pickle.dumps(second)))


def test_what_is_shown_of_names() -> None:
    assert shown("https://user:pass@host/a/b.tar?x=1&token=secret&sig=s#f") == "https://host/a/b.tar?x=1"
    assert shown("/a/b?token=1") == "/a/b?token=1"
    assert shown("S3://user:pass@bucket/a?b/take#1.mp4") == "s3://bucket/a?b/take#1.mp4"
    assert source_id("https://host/a.tar?version=1") != source_id("https://host/a.tar?version=2")
    assert source_id("s3://bucket/a/clip.mp4") != source_id("s3://bucket/b/clip.mp4")
    assert source_id("s3://bucket/a") == source_id("s3://bucket/a/")
    with pytest.raises(SourceError, match="credentials") as raised:
        open_source("https://user:hunter2@host/clip.mp4")
    assert "hunter2" not in str(raised.value)
