from __future__ import annotations

import errno
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.sources import expand_inputs, images, open_source, pictures
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import SourceContract, read_all


class TestFolder(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        folder = tmp_path / "pictures"
        make.write_image_folder(folder, count=20, sizes=((48, 64), (80, 40), (33, 101)), suffixes=(".png", ".jpg"))
        make.write_image_folder(folder / "more", count=20, suffixes=(".webp", ".bmp", ".tif"))
        return folder

    def test_order_keys_and_sizes(self, media: Path) -> None:
        probed = open_source(media).probe()
        assert probed.keys is not None
        assert list(probed.keys) == sorted(probed.keys)
        assert probed.keys[0] == "000.png"
        assert probed.keys[-1] == "more/019.bmp"
        assert (probed.height, probed.width, probed.fps) == (80, 101, None)
        found = [make.read_index(frame.image) for frame in read_all(media) if frame.image is not None]
        assert found == [*range(20), *range(20)]


class TestBrokenFolder(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        folder = tmp_path / "broken"
        make.write_image_folder(folder, count=12, suffixes=(".png", ".jpg"))
        (folder / "002.png").write_bytes(b"")
        make.truncate(folder / "003.jpg")
        make.truncate(folder / "004.png")
        (folder / "005.jpg").write_text("no picture")
        make.write_image(folder / "006.png", height=1, width=1)
        make.truncate(folder / "007.jpg", 0.05)
        return folder

    def test_the_bad_ones_say_why(self, media: Path) -> None:
        frames = read_all(media)
        assert [frame.index for frame in frames if frame.image is None] == [2, 3, 4, 5, 7]
        assert "0 bytes" in frames[2].error
        assert "runcated" in frames[3].error
        assert "no picture" in frames[5].error
        assert frames[6].image is not None
        assert frames[6].image.shape == (1, 1, 3)


class TestSinglePicture(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        return make.write_image(tmp_path / "one" / "Only One.png", 7)

    # Of the contract's tests, those that need more than one frame have nothing to say here.
    test_bounds = None  # type: ignore[assignment]
    test_interleaved_reads = None  # type: ignore[assignment]
    test_a_read_that_stops_early_harms_no_other = None  # type: ignore[assignment]

    def test_one_frame(self, media: Path) -> None:
        probed = open_source(media).probe()
        assert (probed.frames, probed.keys, probed.height, probed.width) == (1, ("Only One.png",), 48, 64)


def test_fifty_megapixels_and_too_many(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "a.png")  # over Pillow's own limit: no warning may come
    Image.new("1", (5_000, 10_000), 1).save(tmp_path / "b.png")
    make.write_image(tmp_path / "c.png", 3)
    source = open_source(tmp_path, max_pixels=50_000_000)
    frames = list(source.read(0, 3))
    assert source.probe().frames == 3
    assert frames[0].image is None
    assert "at most 50000000" in frames[0].error
    assert frames[1].image is not None
    assert frames[1].image.shape == (10_000, 5_000, 3)
    assert frames[2].image is not None


def test_too_many_frames(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=3)
    assert open_source(tmp_path, max_frames=3).probe().frames == 3
    with pytest.raises(SourceError, match=r"more than 2 frames.*max_frames"):
        open_source(tmp_path, max_frames=2).probe()


def test_few_headers_are_asked_for_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.write_image_folder(tmp_path, count=10)
    whole, asked = open_source(tmp_path).probe().fingerprint, []

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: object) -> Future[object]:
            asked.append(super().submit(*arguments))
            assert sum(not one.done() for one in asked) <= 4
            return asked[-1]

    monkeypatch.setattr(images, "_HEADERS_AT_ONCE", 4)
    monkeypatch.setattr(images, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(images, "read_header", lambda *arguments: time.sleep(0.01) or pictures.read_header(*arguments))
    assert open_source(tmp_path).probe().fingerprint == whole
    assert len(asked) == 10


def test_all_bad_is_still_a_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").write_text("text")
    probed = open_source(tmp_path).probe()
    assert (probed.frames, probed.height, probed.width) == (2, 1, 1)
    assert all(frame.image is None and frame.error for frame in read_all(tmp_path))


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"no pictures.*expected"):
        open_source(tmp_path).probe()


def test_a_picture_that_vanishes_fails_alone(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=3)
    source = open_source(tmp_path)
    source.probe()
    (tmp_path / "001.png").unlink()
    frames = list(source.read(0, 3))
    assert [frame.image is None for frame in frames] == [False, True, False]
    assert "001.png" in frames[1].error


@pytest.mark.parametrize(("height", "width"), [(50, 64), (48, 66)])
def test_a_picture_that_became_larger_is_a_changed_source(tmp_path: Path, height: int, width: int) -> None:
    """The store has no room for it: that is no fault of the store's, for which a run would stop."""
    make.write_image_folder(tmp_path, count=3, suffixes=(".jpg",))

    def write(height: int, width: int) -> None:
        picture = make.encode(1, ".jpg", height=height, width=width)
        comment = b"\xff\xfe\x20\x02" + bytes(0x2000)
        (tmp_path / "001.jpg").write_bytes((picture[:2] + comment + picture[2:]).ljust(1 << 15, b"\0"))

    write(48, 64)
    source = open_source(tmp_path)
    source.probe()
    write(height, width)  # neither its size nor its ends tell
    frames = source.read(0, 3)
    assert make.read_index(next(frames).image) == 0
    with pytest.raises(SourceChangedError, match=rf"001\.jpg is larger \({width}x{height}\) than any"):
        next(frames)


def test_a_picture_that_became_larger_is_another_one(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=3)
    source = open_source(tmp_path)
    source.probe()
    make.write_image(tmp_path / "001.png", 1, height=50)
    frames = source.read(0, 3)
    assert make.read_index(next(frames).image) == 0
    with pytest.raises(SourceChangedError, match=r"001\.png changed since it was labelled, or was to be"):
        next(frames)


def test_names_that_read_alike_are_two_pictures(tmp_path: Path) -> None:
    for index, name in enumerate((b"caf\xe9.png", rb"caf\xe9.png")):
        (tmp_path / os.fsdecode(name)).write_bytes(make.encode(index))
    source = open_source(tmp_path)
    assert source.probe().keys == (r"caf\xe9.png", r"caf\xe9.png~2")
    assert {make.read_index(frame.image) for frame in read_all(tmp_path)} == {0, 1}


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Let opening one picture fail, from now on."""
    original = pictures.open_binary

    def fail(picture: Path, **options: bool) -> object:
        if picture.name == name:
            raise OSError(code, os.strerror(code), str(picture))
        return original(picture, **options)

    monkeypatch.setattr(pictures, "open_binary", fail)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_once_is_no_property_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make.write_image_folder(tmp_path, count=3)
    before = open_source(tmp_path).probe().fingerprint
    with monkeypatch.context() as patch:
        unreadable(patch, "001.png", code)
        source = open_source(tmp_path)
        with pytest.raises(SourceError, match=r"001\.png: cannot be read.*same command again"):
            source.probe()
    assert source.probe().fingerprint == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_fails_while_pictures_are_decoded_fails_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make.write_image_folder(tmp_path, count=3)
    source = open_source(tmp_path)
    source.probe()

    def fail(picture: Path, *arguments: object, original=Image.open, **words: object) -> object:
        if picture.name == "001.png":
            raise OSError(code, os.strerror(code))
        return original(picture, *arguments, **words)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(SourceError, match=r"001\.png: cannot be read.*same command again"):
            list(source.read(0, 3))
    assert all(frame.image is not None for frame in source.read(0, 3))


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder", "one file"])
def test_a_folder_that_goes_away_fails_no_frame(tmp_path: Path, leaves: str) -> None:
    folder = tmp_path / "photos"
    make.write_image_folder(folder, count=1 if leaves == "an empty folder" else 12)
    source = open_source(folder)
    frames = source.probe().frames
    folder.rename(tmp_path / "away")
    if leaves != "nothing":
        folder.mkdir()
    if leaves == "one file":
        (folder / "mount it here").touch()
    for start, stop in ((0, frames), (frames - 1, frames)):
        with pytest.raises(SourceError, match=r"photos/.*: cannot be read \(No such file.*same command again"):
            list(source.read(start, stop))
    with pytest.raises(SourceError, match="photos"):
        open_source(folder).probe()


def test_a_folder_that_goes_away_while_it_is_probed_is_not_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.write_image_folder(tmp_path, count=4)
    original, seen = pictures.open_binary, []

    def fail(picture: Path, **options: bool) -> object:
        seen.append(picture)
        if len(seen) > 2:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(picture))
        return original(picture, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "open_binary", fail)
        source = open_source(tmp_path)
        with pytest.raises(SourceError, match=r"003\.png: cannot be read \(nor can others.*same command again"):
            source.probe()
    assert (source.probe().height, source.probe().width) == (48, 64)


def test_rights_that_are_gone_fail_no_frame_but_one_picture_s_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.write_image_folder(tmp_path, count=12)
    source = open_source(tmp_path)
    source.probe()
    denied = {"003.png"}

    def fail(picture: object, *arguments: object, original=Image.open, **words: object) -> object:
        name = Path(str(getattr(picture, "name", picture))).name
        if not denied or name in denied:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return original(picture, *arguments, **words)

    monkeypatch.setattr(Image, "open", fail)
    assert [frame.index for frame in source.read(0, 12) if frame.image is None] == [3]
    denied.clear()
    for start in (0, 3, 11):
        with pytest.raises(SourceError, match=r"\.png: cannot be read \(Permission denied.*same command again"):
            list(source.read(start, start + 1))


def test_pictures_that_are_removed_fail_alone_as_long_as_others_are_there(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=40)
    source = open_source(tmp_path)
    source.probe()
    for index in range(30):
        (tmp_path / f"{index:03}.png").unlink()
    assert [frame.image is None for frame in source.read(0, 40)] == [True] * 30 + [False] * 10


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES])
def test_a_picture_that_may_not_be_read_is_a_frame_without_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    make.write_image_folder(tmp_path, count=3, sizes=[(48, 64), (80, 96), (48, 64)])
    unreadable(monkeypatch, "001.png", code)
    probed = open_source(tmp_path).probe()
    assert (probed.frames, probed.height, probed.width) == (3, 48, 64)


def test_a_subfolder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.write_image_folder(tmp_path, count=1)
    make.write_image_folder(tmp_path / "more", count=2)
    make.write_video(tmp_path / "clip.mp4", frames=1)

    def fail(path: Path, original=os.scandir) -> object:
        if Path(path).name == "more":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        assert list(expand_inputs([str(tmp_path)])) == [str(tmp_path), str(tmp_path / "clip.mp4")]
        source = open_source(tmp_path)
        with pytest.raises(SourceError, match=r"more: cannot be listed \(Input/output error\); expected all of"):
            source.probe()
        (tmp_path / "000.png").unlink()
        assert list(expand_inputs([str(tmp_path)])) == [str(tmp_path), str(tmp_path / "clip.mp4")]
    assert source.probe().keys == ("more/000.png", "more/001.png")


def test_linked_subfolders_are_not_looked_into(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path / "photos", count=1)
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")
    assert open_source(tmp_path / "photos").probe().keys == ("000.png",)
    assert list(expand_inputs([str(tmp_path / "photos")])) == [str(tmp_path / "photos")]


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path / "photos", count=1)
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    (tmp_path / "photos" / "gone.jpg").symlink_to("nothing.jpg")
    (tmp_path / "photos" / "linked.png").symlink_to("000.png")
    assert open_source(tmp_path / "photos").probe().keys == ("000.png", "gone.jpg", "linked.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "photos" / "pipe.jpg", tmp_path / "pipe.mp4"):
        with pytest.raises(SourceError, match="a pipe or a device"):
            open_source(path)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG"])
def test_suffixes_of_jpeg(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(make.encode(5, ".jpg"))
    (frame,) = read_all(tmp_path)
    assert make.read_index(frame.image) == 5


def test_numbers_need_no_zeros_before_them(tmp_path: Path) -> None:
    for index in range(12):
        make.write_image(tmp_path / "color" / f"{index}.png", index)
    assert open_source(tmp_path).probe().keys == tuple(f"color/{index}.png" for index in range(12))
    assert [make.read_index(frame.image) for frame in read_all(tmp_path)] == list(range(12))


def test_a_header_that_points_far_behind_its_end_is_a_bad_picture(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=1)
    (tmp_path / "big.tif").write_bytes(b"II+\0\x08\0\0\0" + (2**63 - 1).to_bytes(8, "little") + bytes(64))
    source = open_source(tmp_path)
    assert [frame.image is None for frame in source.read(0, source.probe().frames)] == [False, True]


def test_fingerprint(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, count=3)
    before = open_source(tmp_path).probe().fingerprint
    make.write_image(tmp_path / "001.png", 1)
    assert open_source(tmp_path).probe().fingerprint == before
    make.write_image(tmp_path / "001.png", 9)
    assert open_source(tmp_path).probe().fingerprint != before
    make.write_image(tmp_path / "001.png", 1)
    (tmp_path / "001.png").rename(tmp_path / "001b.png")
    assert open_source(tmp_path).probe().fingerprint != before, "the same pictures, another key"


def test_one_picture_is_probed_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store of pictures that are sources of their own, training probes very many."""
    make.write_image_folder(tmp_path / "a", count=1)
    expected = open_source(tmp_path / "a").probe()
    monkeypatch.setattr(images, "ThreadPoolExecutor", None)
    found = open_source(tmp_path / "a/000.png").probe()
    assert (found.frames, found.height, found.width) == (1, expected.height, expected.width)
    assert open_source(tmp_path / "a").probe().fingerprint == expected.fingerprint
