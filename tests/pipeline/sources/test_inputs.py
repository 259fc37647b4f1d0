from __future__ import annotations

import errno
import glob
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import expand_inputs, open_source, source_id
from depthmill.pipeline.sources.inputs import _glob
from depthmill.pipeline.sources.naming import unique_names
from depthmill.tests import media as make


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("clip2.mp4", "clip10.mp4", "deep/er/clip1.mkv", "notes.txt", "[odd].mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    make.write_image_folder(tmp_path / "photos", count=2)
    return tmp_path


def expand(tree: Path, *inputs: str) -> list[str]:
    return [Path(path).relative_to(tree).as_posix() for path in expand_inputs([str(tree / given) for given in inputs])]


def test_files_folders_and_patterns(tree: Path) -> None:
    assert expand(tree, "clip10.mp4", "clip2.mp4") == ["clip10.mp4", "clip2.mp4"]
    assert expand(tree, "clip*.mp4") == ["clip2.mp4", "clip10.mp4"]
    assert expand(tree, "photos") == ["photos"]
    assert expand(tree, "photos/*.png") == ["photos/000.png", "photos/001.png"]
    assert expand(tree, "deep") == ["deep/er/clip1.mkv"]
    assert expand(tree, "**/*.mkv") == ["deep/er/clip1.mkv"]
    assert expand(tree, "p*", "clip2.mp4") == ["photos", "clip2.mp4"]
    assert expand(tree, "notes.txt") == ["notes.txt"]  # named itself: opening it says what it is
    assert expand(tree, "*.txt") == ["*.txt"]


def test_shards_are_sources_each(tree: Path) -> None:
    for name in ("shard-10.tar", "shard-9.tar.gz", "shard-8.TGZ", "train.parquet", "archive.gz"):
        (tree / "shards" / name).parent.mkdir(exist_ok=True)
        (tree / "shards" / name).write_bytes(b"")
    shards = ["shards/shard-8.TGZ", "shards/shard-9.tar.gz", "shards/shard-10.tar", "shards/train.parquet"]
    assert expand(tree, "shards") == shards
    assert expand(tree, "shards/*") == shards


def test_metadata_beside_what_img2dataset_writes_is_no_source(tree: Path) -> None:
    for name in ("00000.parquet", "00000/000000000.jpg", "00000/000000000.json", "00001.tar", "00001.parquet"):
        (tree / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "data" / name).write_bytes(b"")
    (tree / "data" / "00002.parquet").write_bytes(b"")
    assert expand(tree, "data") == ["data", "data/00001.tar", "data/00002.parquet"]


def test_previews_are_inputs_only_if_named(tree: Path) -> None:
    for name in ("clip2-1.depthmill.mp4", "photos/a-1.depthmill.png", "previews/a-1.depthmill.png"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes((tree / "photos/000.png").read_bytes())
    assert expand(tree, "clip*") == ["clip2.mp4", "clip10.mp4"]
    assert expand(tree, "photos/*") == ["photos/000.png", "photos/001.png"]
    assert expand(tree, "p*") == ["photos"]
    assert open_source(tree / "photos").probe().keys == ("000.png", "001.png")
    with pytest.raises(SourceError, match="no pictures"):
        open_source(tree / "previews").probe()
    assert expand(tree, "previews/a-1.depthmill.png") == ["previews/a-1.depthmill.png"]
    assert open_source(tree / "previews/a-1.depthmill.png").probe().frames == 1


def test_links_in_circles_end(tree: Path) -> None:
    (tree / "deep" / "latest").symlink_to(tree)
    (tree / "deep" / "again").symlink_to("er")
    (tree / "deep" / "itself").symlink_to("itself")
    (tree / "deep" / "linked.mkv").symlink_to("er/clip1.mkv")
    (tree / "other" / "more").mkdir(parents=True)
    (tree / "other" / "more" / "clip3.mkv").write_bytes(b"")
    (tree / "photos" / "more").symlink_to(tree / "other")
    assert expand(tree, "**/*.mkv") == ["deep/er/clip1.mkv", "deep/linked.mkv", "other/more/clip3.mkv"]
    assert expand(tree, "deep/**/*.mkv")[:2] == ["deep/er/clip1.mkv", "deep/latest/other/more/clip3.mkv"]
    assert expand(tree, "photos/**/more/**/*.mkv") == ["photos/more/more/clip3.mkv"]
    assert expand(tree, "deep/la*/**/clip2.mp4") == ["deep/latest/clip2.mp4"]
    assert expand(tree, "other/**") == ["other/more/clip3.mkv"]
    assert not any(name.startswith(("deep/again", "deep/latest/deep")) for name in expand(tree, "deep/**"))
    (tree / "deep" / "latest").unlink()
    (tree / "deep" / "gone.mkv").symlink_to("nowhere")
    for given, others in (("deep", ["deep/linked.mkv"]), ("deep/**/*.mkv", ["deep/linked.mkv"]), ("deep/g*", [])):
        assert sorted(expand(tree, given)) == sorted(["deep/er/clip1.mkv"] * bool(others) + ["deep/gone.mkv", *others])


def test_what_stars_match(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / ".hidden").mkdir()
    (tree / ".hidden" / "clip4.mkv").write_bytes(b"")
    monkeypatch.chdir(tree)
    for pattern in (
        *("**", "**/*", "**/**/*.mkv", "*/**/*.mkv", "**/er", "**/deep/**", "deep/**", "p*/**/*.png", "./**/*.mp4"),
        *("*/", "cl*/", "deep/**/"),
        *("**/.hidden/*", "cl**.mp4", f"{tree}/**", f"{tree}/de*p/**/clip*"),
    ):
        expected = {Path(match) for match in glob.glob(pattern, recursive=True)}  # noqa: PTH207
        assert {Path(match) for match in _glob(pattern, {})} - {Path()} == expected, pattern


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("deep/**/*.mkv", ["deep/er/clip1.mkv", "deep/shut"]),
        ("deep/*/*.mkv", ["deep/er/clip1.mkv", "deep/shut"]),
        ("deep/shut/*.mkv", ["deep/shut"]),
        ("deep/*", ["deep/er/clip1.mkv", "deep/shut"]),
        ("deep/shut/../er/*.mkv", ["deep/er/clip1.mkv"]),
    ],
)
def test_a_folder_that_cannot_be_listed_is_told_of(
    tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    shut, scandir = tree / "deep" / "shut", os.scandir
    shut.mkdir()
    (shut / "clip5.mkv").write_bytes(b"")

    def fail(folder: str) -> object:
        if Path(folder) == shut:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", fail)
    found = list(expand_inputs([str(tree / pattern)]))
    assert [Path(source).relative_to(tree).as_posix() for source in found] == expected
    for source in found:
        if Path(source) == shut:
            with pytest.raises(SourceError, match=r"shut: cannot be (listed|read) \(Permission denied\)"):
                open_source(source).probe()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("deep/*/clips/*.mkv", ["deep/er/clips/a.mkv", "deep/shut/clips"]),
        ("deep/*/clips", ["deep/er/clips/a.mkv", "deep/shut/clips"]),
        ("deep/shut/*", ["deep/shut/b.mkv", "deep/shut/clips"]),
        ("deep/shut", ["deep/shut/b.mkv", "deep/shut/clips/a.mkv"]),
    ],
)
def test_what_cannot_be_looked_at_is_told_of(
    tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    """A folder that may be listed and not searched."""
    for name in ("er/clips/a.mkv", "shut/clips/a.mkv", "shut/b.mkv"):
        make.write_video((tree / "deep" / name).parent / "x.mkv", frames=1).rename(tree / "deep" / name)
    for ask in ("stat", "lstat"):
        answer = getattr(os, ask)

        def fail(path: Any, *options: Any, answer: Any = answer, **more: Any) -> object:
            if "/shut/" in os.fspath(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return answer(path, *options, **more)

        monkeypatch.setattr(os, ask, fail)
    found = list(expand_inputs([str(tree / pattern)]))
    assert [Path(source).relative_to(tree).as_posix() for source in found] == expected
    for source in found:
        if "/shut/" in source:
            with pytest.raises(SourceError, match=r"cannot be (read|looked at) \(Permission denied\)"):
                open_source(source).probe()


def test_a_file_system_that_gives_no_types_and_refuses_them(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path

        def is_symlink(self) -> bool:
            if self.name == "er":
                raise PermissionError(errno.EACCES, "Permission denied", self.path)
            return False

        def is_dir(self, *, follow_symlinks: bool) -> bool:
            return Path(self.path).is_dir()

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: closing(_Entries(map(Entry, scandir(folder)))))
    found = list(expand_inputs([str(tree / "**" / "*.mkv")]))
    assert [Path(source).relative_to(tree).as_posix() for source in found] == ["deep/er"]


class _Entries(list[Any]):
    def close(self) -> None:
        pass


def test_what_is_not_read_is_counted(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("IMG_1.HEIC", "IMG_2.heic", "more/render.exr", "a.tar.ZST", "b.tar.xz", "c.tar.xz"):
        (tree / "photos" / name).parent.mkdir(exist_ok=True)
        (tree / "photos" / name).write_bytes(b"")
    assert expand(tree, "photos", "photos") == ["photos"]
    said = "pictures of kinds that are not read are left out"
    archives = f"{said.replace('pictures', 'archives')} (2 .tar.xz, 1 .tar.zst)"
    assert caplog.messages == [
        f"{tree}/photos: {said} (2 .heic, 1 .exr): convert them to JPEG or PNG",
        f"{tree}/photos: {archives}: pack them with gzip, or not at all",
    ]
    expand(tree, "photos/*")
    assert f"photos/*: {said} (2 .heic)" in caplog.messages[2]
    assert f"photos/*: {archives}" in caplog.messages[3]


def test_videos_are_told_by_their_suffix(tmp_path: Path) -> None:
    names = sorted(f"clip{suffix}" for suffix in (".264", ".divx", ".INSV", ".m1v", ".mpe", ".obu", ".rm", ".webm"))
    for name in (*names, "proxy.lrv"):  # a small copy, which cameras write beside the video
        (tmp_path / name).write_bytes(b"")
    assert sorted(expand(tmp_path, ".")) == names


def test_duplicates_are_dropped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    given = ["clip2.mp4", "./clip2.mp4", str(tree / "photos" / ".." / "clip2.mp4"), "clip*.mp4"]
    assert list(expand_inputs(given)) == [str(tree / "clip2.mp4"), str(tree / "clip10.mp4")]


def test_braces_name_all_whether_they_exist_or_not(tree: Path) -> None:
    assert expand(tree, "clip{9..10}.mp4") == ["clip9.mp4", "clip10.mp4"]
    assert expand(tree, "s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand(tree, "s-{8..010}") == ["s-008", "s-009", "s-010"]
    assert expand(tree, "{9..-01}")[-2:] == ["000", "-01"]
    assert expand(tree, "{0..10}") == [str(number) for number in range(11)]
    assert expand(tree, "{3..1}{a,b}") == ["3a", "3b", "2a", "2b", "1a", "1b"]
    assert expand(tree, "{a,b{1,2}}") == ["a", "b1", "b2"]
    assert expand(tree, "{clip2,clip10}*.mp4") == ["clip2.mp4", "clip10.mp4"]
    assert expand(tree, "{odd}.mp4") == ["{odd}.mp4"]
    (tree / "{a,b}.mp4").write_bytes(b"")
    assert expand(tree, "{a,b}.mp4") == ["{a,b}.mp4"]


def test_names_that_no_file_can_have(tree: Path) -> None:
    names = ",".join(f"clip-number-{number}" for number in range(100))
    assert len(expand(tree, f"{{{names}}}.mp4")) == 100
    for given in (f"{'x' * 300}.mp4", f"@{'x' * 300}", "~nosuchuser/clip.mp4", "a\0b.mp4"):
        with pytest.raises(SourceError, match=r"no such file|cannot be read"):
            open_source(next(expand_inputs([given])))


def test_a_long_pattern_is_read_as_far_as_it_is_needed(tree: Path) -> None:
    uris = expand_inputs([str(tree / "shard-{0000000000..9999999999}.tar")])
    assert [Path(next(uris)).name for _ in range(2)] == ["shard-0000000000.tar", "shard-0000000001.tar"]


def test_a_list_of_inputs(tree: Path) -> None:
    (tree / "list.txt").write_text("# two\nclip2.mp4\n\n  clip{9..10}.mp4  \ns3://bucket/a.tar\nphotos\n")
    first, *rest = expand_inputs([f"@{tree / 'list.txt'}"])
    assert first == str(tree / "clip2.mp4")
    assert rest == [str(tree / "clip9.mp4"), str(tree / "clip10.mp4"), "s3://bucket/a.tar", str(tree / "photos")]
    (tree / "list.txt").write_text("clip2.mp4\n", encoding="utf-8-sig")  # as Windows writes it
    assert list(expand_inputs([f"@{tree / 'list.txt'}"])) == [str(tree / "clip2.mp4")]
    (tree / "list.txt").write_text("@other.txt\n")
    with pytest.raises(SourceError, match=r"names another list, @other\.txt"):
        expand_inputs(["clip2.mp4", f"@{tree / 'list.txt'}"])  # at once, before the first is opened
    with pytest.raises(SourceError, match=r"cannot be read.*one input a line"):
        expand_inputs(["clip2.mp4", f"@{tree / 'missing.txt'}"])


def test_a_list_in_a_folder_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "Show [1-2] {a,b}"
    folder.mkdir()
    for name in ("clip1.mp4", "clip2.mp4", "{x,y}.mp4"):
        (folder / name).write_bytes(b"")
    (folder / "list.txt").write_text("clip*.mp4\nclip{2..3}.mp4\n{x,y}.mp4\n**\n[x].mp4\n")
    names = ("clip1.mp4", "clip2.mp4", "clip3.mp4", "{x,y}.mp4", "[x].mp4")
    assert list(expand_inputs([f"@{folder / 'list.txt'}"])) == [str(folder / name) for name in names]


def test_shards_in_folders_and_patterns(tree: Path) -> None:
    for name in ("00000.tar", "00000.parquet", "00001.tar.gz", "labels.parquet", "00000_stats.json"):
        (tree / "deep" / name).write_bytes(b"")
    expected = ["deep/00000.tar", "deep/00001.tar.gz", "deep/er/clip1.mkv", "deep/labels.parquet"]
    assert expand(tree, "deep") == expected  # not the metadata that img2dataset writes beside a tar
    assert expand(tree, "deep/*.tar*") == ["deep/00000.tar", "deep/00001.tar.gz"]
    assert expand(tree, "deep/00000.parquet") == ["deep/00000.parquet"]


def test_a_name_that_looks_like_a_pattern(tree: Path) -> None:
    assert expand(tree, "[odd].mp4") == ["[odd].mp4"]


def test_what_matches_nothing_fails_when_opened(tree: Path) -> None:
    for given, why in (("missing.mp4", "no such file or folder"), ("missing*.mp4", "nothing that it matches")):
        (path,) = expand_inputs([str(tree / given)])
        with pytest.raises(SourceError, match=rf"{why}; expected.*check"):
            open_source(path)


def test_an_empty_input_is_not_the_current_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(SourceError, match="an input is empty"):
        expand_inputs([str(tree), ""])


def test_source_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = source_id("My clip (1).mp4")
    assert re.fullmatch(r"my-clip-1-[0-9a-f]{12}", name)
    assert name == source_id(tmp_path / "My clip (1).mp4")
    assert name != source_id(tmp_path / "other" / "My clip (1).mp4")
    assert re.fullmatch(r"source-[0-9a-f]{12}", source_id("日本.mp4"))
    assert len(source_id("x" * 250 + ".mp4")) < 80


def test_unique_names() -> None:
    assert unique_names(["a", "a~2", "a", "b", "a"]) == ("a", "a~2", "a~3", "b", "a~4")
