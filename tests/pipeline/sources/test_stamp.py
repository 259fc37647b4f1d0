"""Whether an input may have changed, by what is said of its files."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from depthmill.pipeline.errors import MissingError, SourceError
from depthmill.pipeline.sources.stamp import stamp
from depthmill.tests import media


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, with one in a subfolder, that were written some time ago."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 10**10)
    media.write_image_folder(tmp_path / "pictures", count=2)
    media.write_image(tmp_path / "pictures" / "more" / "2.png")
    return tmp_path / "pictures"


def test_what_changes_it(folder: Path) -> None:
    file = folder / "more" / "2.png"
    for path in (folder, file):
        seen = stamp(str(path), 1)
        assert len(seen) == 32
        assert stamp(str(path), 1) == seen != stamp(str(path), 2)
    seen = stamp(str(folder))
    (folder / "notes.txt").write_text("no picture")
    media.write_image(folder / ".hidden.png")
    assert stamp(str(folder)) == seen

    media.write_image(folder / "3.png")
    assert "" != stamp(str(folder)) != seen, "a picture more"
    (folder / "3.png").unlink()
    assert stamp(str(folder)) == seen
    before = file.stat()
    file.write_bytes(b"0" * before.st_size)
    assert "" != stamp(str(folder)) != seen, "the same size, later"
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "" != stamp(str(folder)) != seen, "the same size and time"


def test_pictures_of_one_size_and_time_that_are_exchanged_change_it(folder: Path) -> None:
    first, second, between = (folder / name for name in ("a.png", "b.png", "between"))
    for path in (first, second):
        path.write_bytes(os.urandom(100))
        os.utime(path, (1e9, 1e9))
    seen = stamp(str(folder))
    time.sleep(0.05)  # a tick of the disk's clock, and more
    for path, new in ((first, between), (second, first), (between, second)):
        path.rename(new)
    assert stamp(str(folder)) != seen


def test_nothing_is_said_of_what_may_yet_change_in_the_same_tick(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stamp(str(folder)) != ""
    os.utime(folder / "more" / "2.png", (time.time() + 3600,) * 2)
    assert stamp(str(folder)) == ""
    os.utime(folder / "more" / "2.png", (1e9, 1e9))
    assert stamp(str(folder)) != ""
    monkeypatch.setattr(time, "time_ns", lambda: (folder / "more" / "2.png").stat().st_ctime_ns + 10**9)
    assert stamp(str(folder)) == ""


def test_a_picture_that_is_not_there(folder: Path) -> None:
    (folder / "gone.png").symlink_to("nowhere")
    assert stamp(str(folder)) == ""


def test_names_that_are_no_utf_8(folder: Path) -> None:
    (folder / "more" / "2.png").rename(folder / os.fsdecode(b"\xff.png"))
    assert len(stamp(str(folder))) == 32


def test_objects_by_their_etags(s3: SimpleNamespace, folder: Path) -> None:
    files = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = s3.url.removeprefix("s3://")
    files.put(str(folder) + "/", f"{bucket}/set/", recursive=True)
    files.put(str(folder / "more" / "2.png"), f"{bucket}/clip")
    uris = [f"{s3.url}/set", f"{s3.url}/set/more/2.png", f"{s3.url}/clip"]
    seen = [stamp(uri) for uri in uris]
    assert len(set(seen)) == 3
    assert "" not in seen
    assert stamp(uris[0] + "/") != ""
    files.put(str(folder) + "/", f"{bucket}/clip.mp4/", recursive=True)
    files.pipe(f"{bucket}/clip.mp4", b"a video")
    assert "" not in {stamp(f"{s3.url}/clip.mp4"), stamp(f"{s3.url}/clip.mp4/")}
    assert stamp(f"{s3.url}/clip.mp4") != stamp(f"{s3.url}/clip.mp4/")
    for name in ("set/more/2.png", "clip"):
        files.pipe(f"{bucket}/{name}", b"0" * (folder / "more" / "2.png").stat().st_size)
    changed = [stamp(uri) for uri in uris]
    assert not set(changed) & {*seen, ""}
    files.pipe(f"{bucket}/set/notes.txt", b"no picture")
    assert [stamp(uri) for uri in uris] == changed
    with pytest.raises(MissingError):
        stamp(f"{s3.url}/set/gone.mp4")


@pytest.mark.parametrize(("tag", "stamped"), [('"a"', True), ('W/"a"', False), ("", False)])
def test_a_server_s_strong_tags_alone(monkeypatch: pytest.MonkeyPatch, tag: str, stamped: bool) -> None:
    monkeypatch.setattr("depthmill.pipeline.sources.stamp.details", lambda uri: {"size": 3, "ETag": tag})
    assert bool(stamp("https://127.0.0.1/clip.mp4")) == stamped


def test_what_is_not_opened_has_none(folder: Path) -> None:
    for uri in (str(folder / "gone.png"), "https://user:word@127.0.0.1:1/clip.mp4"):
        with pytest.raises(SourceError, match=r"no such file|credentials"):
            stamp(uri)
