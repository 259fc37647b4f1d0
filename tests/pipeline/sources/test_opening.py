"""What is found in object storage: every object that is meant, and nothing is left out that could not be listed."""

from __future__ import annotations

import errno

import fsspec
import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import expand_inputs, open_source, video_container
from depthmill.pipeline.sources.opening import list_files, open_binary
from depthmill.tests import media as make


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


def test_what_cannot_be_listed_is_asked_for_again(s3, refuse: dict[str, int]) -> None:
    for name in ("p1.png", "clip.mp4", "photo1.png", "a/clip.mp4"):
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/in/{name}", b"")
    for given, prefix, count in (
        ("", "in/", 3),
        ("*/", "in/", 1),
        ("*/", "in/a/", 1),
        ("photo[1].png", "in/photo[1].png/", 1),
    ):
        expected = list(expand_inputs([f"{s3.url}/in/{given}"]))
        refuse[prefix] = 2
        found = expand_inputs([f"{s3.url}/in/{given}"])
        for _ in range(2):
            with pytest.raises(SourceError, match=r"cannot be read.*token has expired"):
                next(found)
        assert list(found) == expected
        assert len(expected) == count


def test_an_object_that_shows_a_folder_is_no_input(s3) -> None:
    for name, data in {"a.mp4/": b"", "a.mp4/1.png": make.encode(1), "2.png/": b"", "b/": b"", "clip.mp4": b""}.items():
        fsspec.filesystem("s3").call_s3("put_object", Bucket=s3.url[5:], Key=f"in/{name}", Body=data)
    for given, first in {"in/": "in/", "in/*": "in/a.mp4/", "**": "in/a.mp4/1.png"}.items():
        assert list(expand_inputs([f"{s3.url}/{given}"])) == [f"{s3.url}/{first}", f"{s3.url}/in/clip.mp4"]
    assert open_source(f"{s3.url}/in/").probe().keys == ("a.mp4/1.png",)


def test_a_service_that_fails_while_a_video_is_opened_is_no_fault_of_the_video(s3, tmp_path, monkeypatch) -> None:
    clip, files = make.write_video(tmp_path / "clip.mkv", frames=9).read_bytes(), type(fsspec.filesystem("s3"))
    fsspec.filesystem("s3").pipe_file(f"{s3.url}/clip.mkv", clip)
    fsspec.filesystem("s3").pipe_file(f"{s3.url}/cut.mkv", clip[:100])
    original, opened = files._call_s3, []
    monkeypatch.setattr(video_container, "open_binary", lambda uri: opened.append(open_binary(uri)) or opened[-1])

    async def fail(self, method, *args, **options):
        if method == "get_object":
            raise OSError(errno.EREMOTEIO, "Internal Error")
        return await original(self, method, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_call_s3", fail)
        with pytest.raises(SourceError, match=r"clip\.mkv: cannot be read \(.*Internal Error.*same command again"):
            open_source(f"{s3.url}/clip.mkv").probe()
    with pytest.raises(SourceError, match=r"cut\.mkv: cannot be opened as a video.*whole up to its index"):
        open_source(f"{s3.url}/cut.mkv").probe()
    assert [file.closed for file in opened] == [True, True]


def test_keys_with_two_slashes_are_others(s3) -> None:
    for index, name in enumerate(("p.png", "/p.png", "a/p.png", "a//p.png")):
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/ds/{name}", make.encode(index))
    for given in ("ds", "ds/", "ds//"):
        (found,) = expand_inputs([f"{s3.url}/{given}"])
        source = open_source(found)
        assert source.probe().keys == ("/p.png", "a//p.png", "a/p.png", "p.png")
        assert [make.read_index(frame.image) for frame in source.read(0, 4)] == [1, 3, 2, 0]


def test_a_version_of_an_object_is_refused(s3) -> None:
    for name in ("clip.mp4", "1.png", "clip"):
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/in/{name}", b"")
        (found,) = expand_inputs([f"{s3.url}/in/{name}?versionId=3HL4kqtJvjVBH40Nrjfkd"])
        with pytest.raises(SourceError, match=r"only current versions are read: copy that version to a key"):
            open_source(found).probe()


def test_a_password_is_in_no_error_of_a_listing(s3) -> None:
    for given in ("s3://user:hunter2@bucket/in/", "s3://user:hunter2@bucket/in/*.mp4"):
        (found,) = expand_inputs([given])
        with pytest.raises(SourceError, match="given with credentials") as raised:
            open_source(found)
        assert "hunter2" not in str(raised.value)
