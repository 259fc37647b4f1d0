"""Whether an input may have changed, by what is said of its files."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from depthmill.pipeline.errors import MissingError
from depthmill.pipeline.sources.stamp import stamp
from depthmill.tests import media


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, with one in a subfolder, of an hour ago."""
    folder = tmp_path / "pictures"
    media.write_image_folder(folder, count=2)
    media.write_image(folder / "more" / "2.png")
    for file in folder.rglob("*.png"):
        age(file, 3600)
    return folder


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


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
    age(folder / "3.png", 60)
    assert "" != stamp(str(folder)) != seen, "a picture more"
    (folder / "3.png").unlink()
    assert stamp(str(folder)) == seen
    size, before = file.stat().st_size, file.stat()
    file.write_bytes(b"0" * size)
    age(file, 60)
    assert "" != stamp(str(folder)) != seen, "the same size, later"
    file.write_bytes(b"0" * (size + 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "" != stamp(str(folder)) != seen, "another size, the same time"


def test_nothing_is_said_of_what_may_yet_change_in_the_same_tick_or_is_not_there(folder: Path) -> None:
    for seconds in (0.5, -3600):
        age(folder / "more" / "2.png", seconds)
        assert stamp(str(folder)) == stamp(str(folder / "more" / "2.png")) == ""
    assert stamp(str(folder / "gone.png")) == ""
    shutil.rmtree(folder / "more")
    assert stamp(str(folder)) != ""
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
    for name in ("set/more/2.png", "clip"):
        files.pipe(f"{bucket}/{name}", b"0" * (folder / "more" / "2.png").stat().st_size)
    changed = [stamp(uri) for uri in uris]
    assert not set(changed) & {*seen, ""}
    files.pipe(f"{bucket}/set/notes.txt", b"no picture")
    assert [stamp(uri) for uri in uris] == changed
    with pytest.raises(MissingError):
        stamp(f"{s3.url}/set/gone.mp4")
