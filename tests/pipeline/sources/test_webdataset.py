from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import open_source, tar_members, webdataset
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import SourceContract, probe_and_read


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


BROKEN = [
    *make.samples(20),
    ("text.txt", b"a sample without a picture"),
    ("broken.jpg", make.encode(1, ".jpg")[:300]),
    ("nothing.png", b""),
    special("link.jpg", tarfile.SYMTYPE, "00000.jpg"),
    special("hard.jpg", tarfile.LNKTYPE, "00000.jpg"),
    special("device.jpg", tarfile.CHRTYPE),
    special("folder.jpg", tarfile.DIRTYPE),
    ("../out.png", make.encode(2)),
    ("/abs/olute.png", make.encode(3)),
    ("00000.png", make.encode(4)),
    *((f"more/{index}.bmp", make.encode(index, ".bmp", height=30 + index, width=90 - index)) for index in range(12)),
]


class TestTar(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        return make.write_tar(tmp_path / "shard-000.tar", BROKEN)

    def test_keys_and_reasons(self, media: Path) -> None:
        source, frames = probe_and_read(media)
        assert source.keys is not None
        assert source.keys[:3] == ("00000", "00001", "00002")
        by_key = dict(zip(source.keys, frames, strict=True))
        reasons = {key: frame.error for key, frame in by_key.items() if frame.image is None}
        assert list(reasons) == ["broken", "nothing", "link", "hard", "device", "../out"]
        assert "0 bytes" in reasons["nothing"]
        assert reasons["link"].startswith("a link to 00000.jpg; links are not followed")
        assert "links are not followed" in reasons["hard"]
        assert "device" in reasons["device"]
        assert "leads out of the archive" in reasons["../out"]
        found = {key: make.read_index(frame.image) for key, frame in by_key.items() if frame.image is not None}
        assert found["abs/olute"] == 3
        assert found["00000~2"] == 4
        assert [found[f"{index:05d}"] for index in range(20)] == list(range(20))
        assert [found[f"more/{index}"] for index in range(12)] == list(range(12))
        assert (source.height, source.width, source.kind) == (48, 90, "webdataset")


class TestTarGz(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        return make.write_tar(tmp_path / "shard.tar.gz", BROKEN)


class TestTgzCutOff(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        return make.truncate(make.write_tar(tmp_path / "shard.tgz", make.samples(60)), 0.7)

    def test_what_is_whole_is_read(self, media: Path) -> None:
        source, frames = probe_and_read(media)
        assert 30 < source.frames < 50
        assert all(frame.image is not None for frame in frames[:-1])
        assert "what lies behind is unknown" in frames[-1].error


@pytest.mark.parametrize("name", ["shard.tar", "shard.tar.gz"])
def test_a_picture_cut_off_fails_and_the_others_are_read(name: str, tmp_path: Path) -> None:
    whole = make.write_tar(tmp_path / "whole.tar", make.samples(3, suffixes=(".bmp",))).read_bytes()
    cut = whole[: whole.rindex(b"BM") + 100]
    path = tmp_path / name
    path.write_bytes(gzip.compress(cut) if name.endswith("gz") else cut)
    source, frames = probe_and_read(path)
    assert source.keys == ("00000", "00001", "00002")
    assert [frame.image is None for frame in frames] == [False, False, True]
    assert "100 of 9270 bytes are there: what lies behind is unknown" in frames[2].error


def test_a_damaged_header_is_skipped_and_listed(tmp_path: Path) -> None:
    path = make.write_tar(tmp_path / "shard.tar", make.samples(6, suffixes=(".png",)))
    data = bytearray(path.read_bytes())
    at = data.index(b"00002.png")
    data[at] ^= 0xFF
    path.write_bytes(data)
    source, frames = probe_and_read(path)
    assert source.keys == ("00000", "00001", f"@{at}", "00003", "00004", "00005")
    assert [frame.index for frame in frames if frame.image is None] == [2]
    assert f"from byte {at} of the archive to byte" in frames[2].error
    assert make.read_index(frames[3].image) == 3


def test_a_negative_size_is_damage(tmp_path: Path) -> None:
    members = make.samples(3, suffixes=(".png",))
    bad = tarfile.TarInfo("bad.png")
    bad.pax_headers = {"size": "-5"}
    _, frames = probe_and_read(
        make.write_tar(tmp_path / "shard.tar", [*members, (bad, b""), ("last.png", make.encode(9))])
    )
    assert [frame.image is None for frame in frames] == [False] * 3 + [True, False]
    assert "there is no member" in frames[3].error
    assert make.read_index(frames[4].image) == 9


@pytest.mark.parametrize("name", ["shard.tar", "shard.tgz"])
@pytest.mark.parametrize("zeros", [1024, 10240 - 1024, 65536 - 1024])
def test_archives_one_after_another_are_read_as_one(name: str, zeros: int, tmp_path: Path) -> None:
    first, second = (
        make.write_tar(tmp_path / f"{index}.tar", [(f"{index}.png", make.encode(index))]).read_bytes()
        for index in (1, 2)
    )
    assert not first[1024:].strip(b"\0")  # a header, a block of data, and the end
    joined = first[:1024] + bytes(zeros) + second
    (tmp_path / name).write_bytes(gzip.compress(joined) if name.endswith("tgz") else joined)
    source, frames = probe_and_read(tmp_path / name)
    assert source.keys == ("1", "2")
    assert [make.read_index(frame.image) for frame in frames] == [1, 2]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_a_hole_where_a_header_belongs_ends_nothing(blocks: int, tmp_path: Path) -> None:
    members = make.samples(6, suffixes=(".bmp",))
    path = make.write_tar(tmp_path / "shard.tar", members)
    data = bytearray(path.read_bytes())
    at = data.index(b"00002.bmp")
    data[at : at + 512 * blocks] = bytes(512 * blocks)
    path.write_bytes(data)
    source, frames = probe_and_read(path)
    assert source.keys is not None
    assert [key for key in source.keys if not key.startswith("@")] == ["00000", "00001", "00003", "00004", "00005"]
    (lost,) = (frame for frame in frames if frame.image is None)
    assert "there is no member" in lost.error


def test_a_single_block_of_zeros_between_members_is_damage(tmp_path: Path) -> None:
    first, second = (
        make.write_tar(tmp_path / f"{index}.tar", [(f"{index}.png", make.encode(index))]).read_bytes()
        for index in (0, 1)
    )
    (tmp_path / "shard.tar").write_bytes(first[:1024] + bytes(512) + second)
    source, frames = probe_and_read(tmp_path / "shard.tar")
    assert source.keys == ("0", "@1024", "1")
    assert "from byte 1024 of the archive to byte 1536 there is no member (zeros)" in frames[1].error


def test_zeros_to_the_end_are_an_end_unless_they_are_very_many(tmp_path: Path) -> None:
    path = make.write_tar(tmp_path / "shard.tar", make.samples(3, suffixes=(".png",)))
    whole = path.read_bytes()
    for more, frames in ((1000, 3), (1 << 20, 3), (20 << 20, 4)):
        path.write_bytes(whole + bytes(more))
        assert open_source(path).probe().frames == frames
    assert "zeros, too many for an end: what lies behind is unknown" in probe_and_read(path)[1][3].error


def test_an_archive_without_an_end_says_that_there_may_have_been_more(tmp_path: Path) -> None:
    path = make.write_tar(tmp_path / "shard.tar", make.samples(2, suffixes=(".png",)))
    data = path.read_bytes()
    for size, reason in ((data.index(bytes(1024)) // 512 * 512, "cut off"), (data.rindex(b"a caption"), "cut off")):
        path.write_bytes(data[:size])
        _, frames = probe_and_read(path)
        assert frames[0].image is not None
        assert reason in frames[-1].error
    path.write_bytes(data[: data.index(b"a caption") + 512])
    source, frames = probe_and_read(path)
    assert source.frames == 2
    assert "cut off without its end mark" in frames[1].error


def test_of_two_pictures_of_a_sample_the_plain_one_counts(tmp_path: Path) -> None:
    members = [
        ("a.depth.png", make.encode(1)),
        ("a.png", make.encode(2)),
        ("a.jpg", make.encode(3, ".jpg")),
        ("b.cam.png", make.encode(4)),
        ("b.json", b"{}"),
        ("c.png", make.encode(5)),
        ("c.png", make.encode(6)),
        ("._c.png", b"resource fork"),
        ("README", b"no sample"),
    ]
    source, frames = probe_and_read(make.write_tar(tmp_path / "shard.tar", members))
    assert source.keys == ("a", "b", "c", "c~2")
    assert [make.read_index(frame.image) for frame in frames] == [2, 4, 5, 6]


def test_of_pictures_with_longer_extensions_the_usual_name_counts(tmp_path: Path) -> None:
    members = [
        *(("a.depth.png", make.encode(1)), ("a.RGB.png", make.encode(2)), ("a.rgb.webp", make.encode(3, ".webp"))),
        *(("b.left.jpg", make.encode(4, ".jpg")), ("b.left.png", make.encode(5))),
        *((f"clip.{index:04}.png", make.encode(index)) for index in range(5)),
        *(("d.image.png", make.encode(6)), ("d.rgb.png", make.encode(7)), ("d.mask.png", make.encode(8))),
        ("e.jpg", make.encode(9, ".jpg")),
    ]
    source, frames = probe_and_read(make.write_tar(tmp_path / "shard.tar", members))
    assert source.keys == ("a", "b", "clip", "d", "e")
    assert [frame.image is None or make.read_index(frame.image) for frame in frames] == [2, 4, True, True, 9]
    assert "5 pictures in one sample (clip.0000.png, clip.0001.png, clip.0002.png, …)" in frames[2].error
    assert "(d.image.png, d.rgb.png, d.mask.png); expected one to be told by its name, d.jpg or" in frames[3].error


def test_of_an_animation_the_first_picture_counts(tmp_path: Path) -> None:
    pictures = [Image.fromarray(make.paint(index)) for index in (7, 8)]
    gif = io.BytesIO()
    pictures[0].save(gif, "GIF", save_all=True, append_images=pictures[1:])
    members = [("a.gif", gif.getvalue()), ("b.jpg", gif.getvalue()), ("c.png", make.encode(9))]
    source, frames = probe_and_read(make.write_tar(tmp_path / "shard.tar", members))
    assert source.keys == ("a", "b", "c")
    assert [make.read_index(frame.image) for frame in frames] == [7, 7, 9]


def test_gzip_is_told_by_its_bytes(tmp_path: Path) -> None:
    packed = make.write_tar(tmp_path / "shard.tgz", make.samples(3)).rename(tmp_path / "packed.tar")
    plain = make.write_tar(tmp_path / "shard.tar", make.samples(3)).rename(tmp_path / "plain.tar.gz")
    for path in (packed, plain):
        assert [make.read_index(frame.image) for frame in probe_and_read(path)[1]] == [0, 1, 2]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_that_are_no_utf8(format: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    names = ["ö" * 300 + ".png", "b\udcff.png", "deep/" * 60 + "c.png"]
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as archive:
        for index, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(make.encode(index))
            archive.addfile(info, io.BytesIO(make.encode(index)))
    source, frames = probe_and_read(path)
    assert source.keys == ("ö" * 300, "b\\xff", "deep/" * 60 + "c")
    assert [make.read_index(frame.image) for frame in frames] == [0, 1, 2]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read took from an archive."""
    counts: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            counts.append(super().readinto(buffer))
            return counts[-1]

    monkeypatch.setattr(tar_members, "open_binary", lambda uri: io.BufferedReader(Counting(uri), 4096))
    return counts


def test_a_probe_reads_headers_and_a_read_its_part(tmp_path: Path, taken: list[int]) -> None:
    pictures = [(f"{index}.bmp", make.encode(index, ".bmp", height=240, width=320)) for index in range(40)]
    path = make.write_tar(tmp_path / "shard.tar", pictures)
    source = open_source(path)
    assert source.probe().width == 320
    assert sum(taken) < path.stat().st_size / 8
    taken.clear()
    frames = list(source.read(30, 34))
    source.close()
    assert [make.read_index(frame.image) for frame in frames] == [30, 31, 32, 33]
    assert sum(taken) < 4.2 * len(pictures[0][1])


def test_segments_in_order_unpack_a_gzip_stream_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.write_tar(tmp_path / "shard.tar.gz", make.samples(12))
    source = open_source(path)
    source.probe()
    opened = []
    monkeypatch.setattr(
        tar_members, "open_binary", lambda uri, original=tar_members.open_binary: opened.append(uri) or original(uri)
    )
    for start in range(0, 12, 3):
        assert all(frame.image is not None for frame in source.read(start, start + 3))
    source.close()
    assert len(opened) == 1


def test_what_is_unpacked_on_the_way_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_PASSED_BYTES", 1 << 12)
    path = make.write_tar(tmp_path / "shard.tar.gz", make.samples(12))
    size = len(gzip.decompress(path.read_bytes()))
    source, passed = open_source(path), []
    for start in (11, 10):  # the second from the beginning again
        passed.clear()
        (frame,) = source.read(start, start + 1, lambda: passed.append(1))
        assert make.read_index(frame.image) == start
        assert size / (1 << 13) < len(passed) <= size / (1 << 12)
    source.close()


def test_what_is_no_archive_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no archive " * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    make.write_tar(tmp_path / "captions.tar", [("a.txt", b"caption")])
    make.write_tar(tmp_path / "none.tar.gz", [])
    for name, reason in (
        ("text.tar", r"there is no member \(.*replace it"),
        ("empty.tar", "cut off without its end mark"),
        ("captions.tar", "no pictures in this archive; expected"),
        ("none.tar.gz", "no pictures in this archive; expected"),
    ):
        with pytest.raises(SourceError, match=reason):
            open_source(tmp_path / name).probe()
    (tmp_path / "shard.tar.XZ").write_bytes(b"")
    with pytest.raises(SourceError, match=r"shard\.tar\.XZ: a tar archive that gzip has not packed.*repack it"):
        open_source(tmp_path / "shard.tar.XZ")


def test_limits(tmp_path: Path) -> None:
    members = [("large.png", make.encode(1, height=300, width=400)), ("small.png", make.encode(2))]
    path = make.write_tar(tmp_path / "shard.tar", members)
    with pytest.raises(SourceError, match=r"more than 1 frames.*max_frames"):
        open_source(path, max_frames=1).probe()
    source, frames = probe_and_read(path, max_pixels=50_000)
    assert (source.height, source.width) == (48, 64)
    assert "120000 pixels; at most 50000" in frames[0].error
    assert frames[1].image is not None


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    path = make.write_tar(tmp_path / "shard.tar", make.samples(3))
    before = open_source(path).probe().fingerprint
    make.write_tar(path, make.samples(3))
    assert open_source(path).probe().fingerprint == before
    make.write_tar(path, [(name.replace("00002", "00009"), data) for name, data in make.samples(3)])
    renamed = open_source(path).probe().fingerprint
    data = bytearray(make.write_tar(path, make.samples(3)).read_bytes())
    data[data.index(b"JFIF") + 400] ^= 1
    path.write_bytes(data)
    assert len({before, renamed, open_source(path).probe().fingerprint}) == 3
