import errno
import os
import shutil
import threading

import pytest

from depthmill.pipeline.errors import StoreError, StoreForbiddenError
from depthmill.pipeline.store.files import LocalDirectory, decoding, write_atomically

"""Files on a local disk: whole or absent, however many write them."""


def test_many_may_write_one_file(tmp_path):
    path = tmp_path / "a" / "b" / "zarr.json"
    errors = []

    def write(content):
        try:
            for _ in range(100):
                write_atomically(path, content)
        except OSError as error:
            errors.append(error)

    contents = [bytes([number]) * 1000 for number in range(8)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path], "no unfinished write is left, nor a folder for them"


def test_a_file_is_on_the_disk_whole_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "zarr.json", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, path.exists())))
    write_atomically(path, b"0123456789")
    assert synced == [(10, False)]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "zarr.json").write_text("{}")
    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(StoreError, match=r"zarr\.json cannot be read"):
        LocalDirectory(tmp_path).read("zarr.json")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_told_from_one_that_is_away(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreForbiddenError, match=rf"zarr\.json cannot be written: {os.strerror(code)}; check"):
        LocalDirectory(tmp_path).write("zarr.json", b"{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["delete", "remove"])
@pytest.mark.parametrize(("code", "raised"), [(errno.EROFS, StoreForbiddenError), (errno.EIO, StoreError)])
def test_what_may_not_be_removed_is_not_waited_for(tmp_path, monkeypatch, method, code, raised):
    def fail(*_, **more):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "unlink", fail)
    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(StoreError, match=f"a cannot be removed: {os.strerror(code)}; check") as error:
        getattr(LocalDirectory(tmp_path), method)("a")
    assert error.type is raised


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTCONN])
def test_a_store_that_goes_away_while_a_file_of_it_is_written_is_told_as_that(tmp_path, monkeypatch, code):
    """What is left of a mount may not be there, nor be listed."""

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "scandir", fail)
    for key in ("zarr.json", "a/b/zarr.json"):
        with pytest.raises(StoreError, match="is gone, or there is nothing in it"):
            LocalDirectory(tmp_path / "labels.zarr").write(key, b"{}")


@pytest.mark.parametrize("key", ["a/zarr.json", "a/b/zarr.json"])
def test_no_folder_is_made_in_what_a_mount_has_left(tmp_path, key):
    with pytest.raises(StoreError, match="is gone, or there is nothing in it"):
        LocalDirectory(tmp_path).write(key, b"{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EEXIST, errno.ESTALE])
def test_a_write_whose_folder_went_with_another_begins_again(tmp_path, monkeypatch, code):
    replace, errors = os.replace, [OSError(code, os.strerror(code))]

    def fail_once(*paths):
        if errors:
            raise errors.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_once)
    write_atomically(tmp_path / "zarr.json", b"{}")
    assert (tmp_path / "zarr.json").read_bytes() == b"{}"


def test_parts_of_a_file(tmp_path):
    directory = LocalDirectory(tmp_path)
    directory.write("zarr.json", b"0123456789")
    parts = {(): b"0123456789", (3,): b"3456789", (3, 5): b"34", (0, 1): b"0", (8, 99): b"89", (-4,): b"6789"}
    parts[-99,] = parts[()]  # an index that is longer than what is left of its file
    assert {part: directory.read("zarr.json", *part) for part in parts} == parts


def test_memory_that_does_not_suffice_is_no_damage():
    with pytest.raises(MemoryError), decoding("labels.zarr", "video/depth"):
        raise MemoryError


def test_sizes_are_of_whole_files_and_of_none_behind_links(tmp_path):
    directory, elsewhere = LocalDirectory(tmp_path / "store"), tmp_path / "elsewhere"
    directory.make_root()
    for key in ("zarr.json", "a/zarr.json", "a/depth/c/0/0", "b/c"):
        directory.write(key, key.encode())
    (tmp_path / "store/a/.zarr.json.partial").mkdir()
    (tmp_path / "store/a/.zarr.json.partial/.0.partial").write_bytes(b"0")
    elsewhere.mkdir()
    (elsewhere / "file").write_bytes(b"12345678")
    for name, target in (("folder", elsewhere), ("gone", tmp_path / "gone"), ("linked", elsewhere / "file")):
        (tmp_path / "store" / name).symlink_to(target)
    found = {"zarr.json": 9, "a/zarr.json": 11, "a/depth/c/0/0": 13, "b/c": 3, "linked": 8}
    assert dict(directory.sizes()) == found
    assert dict(directory.sizes("a")) == {key: size for key, size in found.items() if key.startswith("a/")}
    assert dict(directory.sizes("none")) == {}


def test_sizes_come_one_by_one(tmp_path, monkeypatch):
    directory, scandir, listed = LocalDirectory(tmp_path), os.scandir, []
    for key in ("zarr.json", "a/b", "c/d", "e/f"):
        directory.write(key, b"0")
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    next(directory.sizes())
    assert len(listed) <= 2, "the root, and perhaps one of its folders"
