from __future__ import annotations

import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources import open_source
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import SourceContract, probe_and_read


def encoded(count: int) -> list[bytes]:
    return [make.encode(index, (".jpg", ".png", ".webp")[index % 3], height=40 + index) for index in range(count)]


def features(**columns: str) -> dict[str, object]:
    return {"info": {"features": {name: {"_type": kind} for name, kind in columns.items()}}}


class TestHuggingFace(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        pictures: list[dict[str, object] | None] = [
            {"bytes": data, "path": f"{index:02d}.jpg"} for index, data in enumerate(encoded(40))
        ]
        pictures[5] = None
        pictures[6] = {"bytes": None, "path": "elsewhere.jpg"}
        pictures[7] = {"bytes": b"", "path": "empty.jpg"}
        pictures[8] = {"bytes": make.encode(1)[:80], "path": "cut.png"}
        columns = {"label": list(range(40)), "scene": pictures, "sound": [{"bytes": b"pcm", "path": None}] * 40}
        return make.write_parquet(
            tmp_path / "train-0.parquet", columns, metadata=features(scene="Image", sound="Audio")
        )

    def test_keys_and_reasons(self, media: Path) -> None:
        source, frames = probe_and_read(media)
        assert source.keys is not None
        assert source.keys[4:10] == ("04.jpg", "5", "elsewhere.jpg", "empty.jpg", "cut.png", "09.jpg")
        assert [frame.index for frame in frames if frame.image is None] == [5, 6, 7, 8]
        assert frames[5].error.startswith("null")
        assert "path (elsewhere.jpg), not its bytes" in frames[6].error
        assert "0 bytes" in frames[7].error
        assert [make.read_index(frame.image) for frame in frames[9:] if frame.image is not None] == [*range(9, 40)]
        assert (source.height, source.width, source.kind, source.frames) == (79, 64, "parquet", 40)


class TestBinaryColumn(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        keys = [f"{index:09d}" for index in range(40)]
        columns = {"key": keys, "jpg": pyarrow.array(encoded(40), pyarrow.large_binary()), "url": ["same"] * 40}
        return make.write_parquet(tmp_path / "00000.parquet", columns, rows_in_group=17)

    def test_keys(self, media: Path) -> None:
        assert open_source(media).probe().keys == tuple(f"{index:09d}" for index in range(40))


class TestDamagedRowGroup(SourceContract):
    @pytest.fixture
    def media(self, tmp_path: Path) -> Path:
        path = make.write_parquet(tmp_path / "damaged.parquet", {"image": encoded(40)})
        column = parquet.read_metadata(path).row_group(1).column(0)
        data = bytearray(path.read_bytes())
        data[column.dictionary_page_offset + column.total_compressed_size // 2] ^= 0xFF
        path.write_bytes(data)
        return path

    def test_it_alone_is_lost(self, media: Path) -> None:
        source, frames = probe_and_read(media)
        assert source.keys == tuple(map(str, range(40)))
        assert [frame.index for frame in frames if frame.image is None] == [*range(10, 20)]
        assert "row group 1 cannot be read from row 10 on" in frames[15].error


@pytest.mark.parametrize(
    ("columns", "metadata", "expected"),
    [
        ({"image": 0, "mask": 1}, None, 0),
        ({"conditioning": 1, "Image": 0}, features(conditioning="Image", Image="Image"), 0),
        ({"anything": 0, "image": 1}, features(anything="Image", image="Value"), 0),
        ({"png": 0, "text": "words"}, None, 0),
        (
            {"shot": 0, "captions": "words"},
            {"info": {"features": {"shot": {"_type": "Image"}, "captions": [{"_type": "Value"}]}}},
            0,
        ),
        ({"image": "a path", "img_bytes": 0}, None, 0),
    ],
)
def test_which_column(columns: dict[str, object], metadata: object, expected: int, tmp_path: Path) -> None:
    made = {name: [make.encode(value) if isinstance(value, int) else value] for name, value in columns.items()}
    _, frames = probe_and_read(make.write_parquet(tmp_path / "a.parquet", made, metadata=metadata))
    assert make.read_index(frames[0].image) == expected


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"text": ["words"], "n": [1]}, r"no column of pictures among text \(string\), n \(int64\); expected"),
        ({"image": [b"a"], "jpg": [b"b"]}, r"2 columns of pictures \(image, jpg\)"),
        ({"blob": [b"a"]}, r"no column of pictures among blob \(binary\)"),
        ({"image": ["path.jpg"]}, r"no column of pictures among image \(string\)"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "no rows"),
    ],
)
def test_a_file_without_a_clear_column_is_refused(columns: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=reason):
        open_source(make.write_parquet(tmp_path / "a.parquet", columns)).probe()


@pytest.mark.parametrize(
    ("columns", "keys"),
    [
        ({"key": ["a", "b", "a"]}, ("a", "b", "a~2")),
        ({"key": ["a", None, "1"]}, ("a", "1", "1~2")),
        ({"key": ["a", "b", "a"], "url": ["x", "y", "z"]}, ("x", "y", "z")),
        ({"key": ["a", "b", "a"], "url": ["x", "x", "z"]}, ("a", "b", "a~2")),
        ({"Key": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"key": pyarrow.array(["a", "b", "c"]).dictionary_encode()}, ("a", "b", "c")),
        ({"key": [None] * 3}, ("0", "1", "2")),
    ],
)
def test_keys_are_kept_where_they_can_be(columns: dict[str, object], keys: tuple[str, ...], tmp_path: Path) -> None:
    path = make.write_parquet(tmp_path / "a.parquet", {"image": encoded(3), **columns})
    assert open_source(path).probe().keys == keys


def test_pictures_encoded_in_a_dictionary(tmp_path: Path) -> None:
    pictures = pyarrow.array([make.encode(index) for index in (1, 2, 1)]).dictionary_encode()
    _, frames = probe_and_read(make.write_parquet(tmp_path / "a.parquet", {"image": pictures}))
    assert [make.read_index(frame.image) for frame in frames] == [1, 2, 1]


def test_what_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    whole = make.write_parquet(path, {"image": encoded(3)}).read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2], whole[:-9] + bytes(9), whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"cannot be read as Parquet .*expected a whole file"):
            open_source(path).probe()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.write_parquet(tmp_path / "a.parquet", {"image": encoded(1)})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'depthmill\[parquet\]'"):
        open_source(path).probe()


def test_limits(tmp_path: Path) -> None:
    pictures = [make.encode(1, height=300, width=400), make.encode(2), bytes(2_000_000)]
    path = make.write_parquet(tmp_path / "a.parquet", {"image": pictures})
    with pytest.raises(SourceError, match=r"more than 2 frames.*max_frames"):
        open_source(path, max_frames=2).probe()
    source, frames = probe_and_read(path, max_pixels=50_000)
    assert (source.height, source.width) == (48, 64)
    assert "120000 pixels; at most 50000" in frames[0].error
    assert "2000000 bytes; at most 1248576 are read" in frames[2].error


def test_segments_in_order_pass_over_a_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make.write_parquet(tmp_path / "a.parquet", {"image": encoded(80)}, rows_in_group=40)
    source = open_source(path)
    source.probe()
    opened = []
    original = parquet.ParquetFile.iter_batches

    def counted(self, *arguments, **words):
        opened.append(words["row_groups"])
        return original(self, *arguments, **words)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    for start in range(0, 80, 10):
        assert all(frame.image is not None for frame in source.read(start, start + 10))
    source.close()
    assert opened == [[0], [1]]


def test_rows_that_are_passed_over_are_told_of(tmp_path: Path) -> None:
    source = open_source(make.write_parquet(tmp_path / "a.parquet", {"image": encoded(80)}, rows_in_group=80))
    passed: list[int] = []
    (frame,) = source.read(79, 80, lambda: passed.append(1))
    assert make.read_index(frame.image) == 79
    assert len(passed) == 5
    source.close()


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    def fingerprint(picture: int, key: str) -> str:
        path = tmp_path / "a.parquet"
        columns = {"image": [make.encode(index, ".bmp") for index in (0, 1, picture)], "key": ["a", "b", key]}
        probed = open_source(make.write_parquet(path, columns)).probe()
        sizes.add(path.stat().st_size)
        return probed.fingerprint

    sizes: set[int] = set()
    before = fingerprint(2, "c")
    assert fingerprint(2, "c") == before
    assert len({before, fingerprint(4, "c"), fingerprint(2, "d")}) == 3
    assert len(sizes) == 1, "it is not by the file's size alone"
