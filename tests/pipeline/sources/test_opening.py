"""What is found in object storage: every object that is meant, and nothing is left out that could not be listed."""

from __future__ import annotations

import fsspec
import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.pipeline.sources.opening import list_files


@pytest.fixture
def refuse(s3, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the listings of prefixes are to be refused."""
    refused: dict[str, int] = {}
    files = type(fsspec.filesystem("s3"))
    original = files._call_s3

    async def call(self, method, *args, **options):
        if method == "list_objects_v2" and refused.get(options["Prefix"], 0):
            refused[options["Prefix"]] -= 1
            raise PermissionError("The provided token has expired")
        return await original(self, method, *args, **options)

    monkeypatch.setattr(files, "_call_s3", call)
    return refused


def test_an_object_and_a_prefix_of_the_same_name_are_two(s3) -> None:
    for name in ("clip.mp4", "clip.mp4/extra.mp4", "clip.mp4/more/1.mp4", "other/2.mp4"):
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/kp/{name}", b"")
    both = ["clip.mp4", "clip.mp4/extra.mp4", "clip.mp4/more/1.mp4"]
    for pattern, expected in {
        "*": [*both, "other/2.mp4"],
        "clip*": both,
        "**": [*both, "other/2.mp4"],
        "*/": [*both[1:], "other/2.mp4"],
        "*/*": [*both[1:], "other/2.mp4"],
        "*/more/*.mp4": both[2:],
        "**/more/*": both[2:],
    }.items():
        urls = [url.removeprefix(f"{s3.url}/kp/") for url in expand_inputs([f"{s3.url}/kp/{pattern}"])]
        assert urls == expected, pattern
    fsspec.filesystem("s3").pipe_file(f"{s3.url}/kp/clip.mp4/1.png", b"")
    clip, folder, *_ = expand_inputs([f"{s3.url}/kp/*"])
    assert (clip, folder) == (f"{s3.url}/kp/clip.mp4",) * 2
    with pytest.raises(SourceError, match=r"clip\.mp4 is both an object and a prefix.*expected one"):
        open_source(folder)


def test_a_pattern_that_cannot_be_listed_leaves_nothing_out(s3, refuse: dict[str, int]) -> None:
    for name in "abc":
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/in/{name}/clip.mp4", b"")
    for pattern, prefix in {"*": "in/", "*/clip.mp4": "in/b/", "*/*": "in/b/", "b/*.mp4": "in/b/", "**": "in/"}.items():
        refuse[prefix] = 1
        with pytest.raises(SourceError, match=r"cannot be read.*token has expired"):
            list_files(f"{s3.url}/in/{pattern}", pattern=True)
    assert list_files(f"{s3.url}/in/*/clip.mp4", pattern=True) == [f"{s3.url}/in/{name}/clip.mp4" for name in "abc"]
    assert list_files(f"{s3.url}/missing/*", pattern=True) == []
