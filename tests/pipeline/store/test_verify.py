import dataclasses
import json
import os
import re
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import zarr

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreDamagedError, StoreError
from depthmill.pipeline.store import verify as verifying
from depthmill.pipeline.store.checked import stored_rows
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import IMAGES, files, write


@pytest.fixture
def done(store):
    """All committed but the video's last segment; frames 1 and 3 of the pictures, and 8 to 12 of the video, failed."""
    write(store, Segment("video", 0, 8))
    for segment, failed in ((Segment("video", 8, 16), range(8, 12)), (Segment("images", 0, 5), (1, 3))):
        write(store, segment, failed)
    return store


def test_a_sound_store_is_found_sound(done):
    before = files(done.uri)
    report = verify(done, repair=True)
    assert report.damage == ()
    assert (report.sources, report.segments) == (2, 3)
    # Shards of depth and normals: 2 + 1 (the failed one has none) + 2; reasons where there are some; size, checksum,
    # status.
    assert report.files == 2 * (2 + 1 + 2) + 2 + 1 + 3 + 3
    assert report.bytes == sum(
        len(data) for key, data in before.items() if "/c/" in key and key.split("/")[1] not in ("time", "key")
    )
    assert files(done.uri) == before


def test_nothing_is_read_through_zarr(done, monkeypatch):
    """It takes a millisecond and more for each array, and for each chunk: of many small sources, most of the time."""
    monkeypatch.delattr(zarr.Array, "__getitem__")
    assert verify(done).damage == ()


def test_nothing_is_un_committed_for_lack_of_memory(done, monkeypatch):
    before = files(done.uri)
    monkeypatch.setattr(verifying, "decoded", Mock(side_effect=MemoryError()))
    with pytest.raises(MemoryError, match="no memory is left"):
        verify(done, repair=True)
    assert files(done.uri) == before


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


CASES = [
    ("video/depth/c/1/0/0", None, "is missing", (4, 8)),
    ("video/normals/c/0/0/0/0", lambda data: data[:-7], "bytes; .* were written", (0, 4)),
    ("video/depth/c/3/0/0", flip, "its checksum differs", (12, 16)),
    ("video/depth/c/2/0/0", lambda data: b"something", "was not there when its segment was committed", (8, 12)),
    ("video/reason/c/1", flip, "its checksum differs", (8, 16)),
    ("images/size/c/0/0", None, "is missing", (0, 5)),
    ("video/checksum/c/0/0", None, "is missing", (0, 8)),
    ("video/checksum/c/0/0", lambda data: data[:10], "cannot be decoded", (0, 8)),
    ("video/status/c/1", lambda data: b"\0\0", "cannot be decoded", (8, 16)),
]


@pytest.mark.parametrize(
    ("key", "change", "reason", "frames"), CASES, ids=lambda value: getattr(value, "__name__", str(value))[:24]
)
def test_damage_is_named_and_repair_uncommits_its_segment(done, tmp_path, key, change, reason, frames):
    before = files(done.uri)
    path = Path(done.uri) / key
    data = change(path.read_bytes() if path.exists() else b"") if change else None
    path.unlink(missing_ok=True)
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (damage,) = verify(done).damage
    assert (damage.file, (damage.start, damage.stop), damage.repaired) == (key, frames, False)
    assert re.search(reason, damage.reason)
    (damage,) = verify(done, repair=True).damage
    assert damage.repaired
    assert verify(done).damage == ()
    (segment,) = set(done.pending(damage.source_id)) - {Segment("video", 16, 18)}
    assert segment.start <= damage.start < damage.stop <= segment.stop
    failed = {"video": range(8, 12), "images": (1, 3)}[segment.source_id]
    write(done, segment, failed)
    assert files(done.uri) == before, "the rerun leaves the bytes of a store that was never damaged"


def test_few_files_of_a_segment_are_in_memory_at_once(done, monkeypatch):
    together, read_all = [], LocalDirectory.read_all

    def noted(self, keys):
        found = read_all(self, keys)
        together.append([len(data) for key, data in found.items() if "/c/" in key])
        return found

    monkeypatch.setattr(LocalDirectory, "read_all", noted)
    monkeypatch.setattr(verifying, "_AT_ONCE_BYTES", 5000)
    report = verify(done)
    assert report.damage == ()
    assert (sum(map(len, together)), sum(map(sum, together))) == (report.files, report.bytes)
    assert all(sum(sizes) <= 5000 or len(sizes) == 1 for sizes in together)
    assert max(map(len, together)) > 1


@pytest.mark.parametrize(("now", "why"), [(1, "does not agree"), (0, "neither labelled"), (129, "neither labelled")])
def test_a_status_that_changed_its_mind_is_found(done, now, why):
    array = done.array("video", "status")
    status = array[:]
    status[13 if now == 129 else 9] = now
    array[8:16] = status[8:16]
    (damage,) = verify(done).damage
    assert damage.file == "video/status/c/1"
    assert why in damage.reason


@pytest.mark.parametrize("file", ["images/key/c/0", "video/time/c/0"])
def test_times_and_keys_that_changed_are_found(done, file):
    """They are too few to be compressed: any bit may change, and they decode."""
    path = Path(done.uri) / file
    path.write_bytes(flip(path.read_bytes()))
    (damage,) = verify(done, repair=True).damage
    assert (damage.file, damage.repaired) == (file, False)
    assert "its checksum differs" in damage.reason


def test_one_row_of_a_table_may_have_an_empty_key(store):
    keys = ("", "a", "b", "c", "d")
    store.add(*(dataclasses.replace(IMAGES, id=kind, kind=kind, keys=keys) for kind in ("parquet", "webdataset")))
    assert [damage.file for damage in verify(store).damage] == ["webdataset/key/c/0"]


@pytest.mark.parametrize("listed", [False, True], ids=["not in the root", "the root says the same"])
@pytest.mark.parametrize(
    ("name", "value", "others"), [("frames", 17, [18]), ("frames", 10**8, [18]), ("size", [24, 33], [24, 32])]
)
def test_nothing_is_mended_by_a_source_whose_arrays_all_say_something_else(done, name, value, others, listed):
    group, root = (json.loads((Path(done.uri) / key).read_text()) for key in ("video/zarr.json", "zarr.json"))
    group["attributes"][name] = value
    members = root["consolidated_metadata"]["metadata"]
    members |= {"video": group}
    if not listed:
        del members["video"]
    (Path(done.uri) / "video/zarr.json").write_text(json.dumps(group))
    (Path(done.uri) / "zarr.json").write_text(json.dumps(root))
    before = files(done.uri)
    (damage,) = verify(stores.open_store(done.uri), repair=True).damage
    assert (damage.file, damage.repaired) == ("video/zarr.json", False)
    assert damage.reason == f"has attributes.{name} {value}; its arrays are of {others}; nothing else was checked"
    assert files(done.uri) == before
    assert list(stores.open_datasets(done.uri)) == ["images"]


def test_metadata_is_written_anew_and_lost_times_and_keys_are_told(done):
    before = files(done.uri)
    (Path(done.uri) / "video/depth/zarr.json").unlink()
    (Path(done.uri) / "images/zarr.json").write_text("{")
    assert [damage.file for damage in verify(done, repair=True).damage] == ["images/zarr.json", "video/depth/zarr.json"]
    assert files(done.uri) == before
    for name in ("images/key/c/0", "video/time/c/0"):
        (Path(done.uri) / name).unlink()
    found = [(damage.file, damage.reason, damage.repaired) for damage in verify(done, repair=True).damage]
    assert found == [("images/key/c/0", "is missing", False), ("video/time/c/0", "is missing", False)]


def change(path, **changes):
    document = json.loads(path.read_text())
    for key, value in changes.items():
        at = document
        *parents, last = key.split("__")
        for parent in parents:
            at = at[parent]
        at[last] = value
    path.write_text(json.dumps(document))


def blosc(**changes):
    options = {"cname": "zstd", "clevel": 5, "shuffle": "noshuffle", "typesize": 1, "blocksize": 0}
    return [{"name": "bytes"}, {"name": "blosc", "configuration": options | changes}]


@pytest.mark.parametrize(
    ("key", "changes", "reason"),
    [
        ("video/depth/zarr.json", {"attributes__scale_factor": 1.0}, "attributes.scale_factor 1.0; expected 0.000195"),
        ("video/depth/zarr.json", {"attributes__add_offset": 1}, "attributes.add_offset 1; expected null"),
        ("video/depth/zarr.json", {"shape": [7, 24, 32]}, r"shape\[0\] 7; expected 18"),
        ("images/size/zarr.json", {"dimension_names": None}, "dimension_names null; expected"),
        (
            "video/status/zarr.json",
            {"codecs": blosc(shuffle="noshuffie")},
            r"\.shuffle .noshuffie.; expected .noshuffle",
        ),
        ("video/status/zarr.json", {"codecs": blosc(clevel="5")}, r"\.clevel .5.; expected 5"),
        (
            "zarr.json",
            {"consolidated_metadata__metadata__video/depth__attributes__scale_factor": 1.0},
            "says of video/depth that it has attributes.scale_factor 1.0; expected",
        ),
    ],
)
def test_metadata_that_says_something_else_is_found_and_mended(done, key, changes, reason):
    before = files(done.uri)
    change(Path(done.uri) / key, **changes)
    (damage,) = verify(done).damage
    assert (damage.file, damage.repaired) == (key, False)
    assert re.search(reason, damage.reason)
    assert verify(done, repair=True).damage[0].repaired
    assert files(done.uri) == before


def test_a_group_whose_line_in_the_root_is_lost_is_found_and_mended(done):
    """Zarr opens nothing by an index that has arrays of a group, and not the group."""
    before = files(done.uri)
    root = json.loads(before["zarr.json"])
    del root["consolidated_metadata"]["metadata"]["video"]
    (Path(done.uri) / "zarr.json").write_text(json.dumps(root))
    store = stores.open_store(done.uri)
    found = [(damage.file, damage.reason, damage.repaired) for damage in verify(store, repair=True).damage]
    assert found == [("zarr.json", "says of video that it is missing", True)]
    assert files(done.uri) == before


def test_a_source_of_which_its_group_and_the_root_disagree_is_left_alone(done):
    change(Path(done.uri) / "video/zarr.json", attributes__size=[24, 16])
    before = files(done.uri)
    (damage,) = verify(done, repair=True).damage
    assert damage.file == "video/zarr.json"
    assert "attributes.size[1] 16; expected 32, as in the root" in damage.reason
    assert not damage.repaired
    assert files(done.uri) == before


def test_what_users_add_to_metadata_and_an_index_of_zarrs_own_are_sound(done):
    change(Path(done.uri) / "video/depth/zarr.json", attributes__camera="left")
    change(Path(done.uri) / "video/zarr.json", attributes__note="mine")
    change(Path(done.uri) / "video/status/zarr.json", codecs=blosc(clevel=9))  # of a store that tried harder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other Zarrs may not know what it writes
        zarr.consolidate_metadata(done.uri)
    assert verify(stores.open_store(done.uri)).damage == ()


@pytest.mark.parametrize("index", [True, False])
def test_a_source_that_lost_its_checksums_and_their_line_in_the_root_is_labelled_again(done, index):
    before = files(done.uri)
    root = json.loads(before["zarr.json"])
    del root["consolidated_metadata"]["metadata"]["video/checksum"]
    (Path(done.uri) / "zarr.json").write_text(json.dumps(root))
    shutil.rmtree(Path(done.uri) / "video/checksum")
    store = stores.open_store(done.uri, index=index)
    with pytest.raises(StoreDamagedError, match="video/depth/c/0/0/0"):
        next(stored_rows(store, "video", "depth", 0, 18))
    with pytest.raises(StoreDamagedError, match=r"the checksums of .* are missing"):
        write(store, Segment("video", 0, 8), redo=[0])
    found = [(damage.file, damage.reason, damage.repaired) for damage in verify(store, repair=True).damage]
    assert found == [
        ("video/checksum/zarr.json", "is missing", True),
        ("zarr.json", "says of video/checksum that it is missing", True),
        ("video/checksum/c/0/0", "is missing", True),
        ("video/checksum/c/1/0", "is missing", True),
    ]
    assert verify(store).damage == ()
    write(store, Segment("video", 0, 8))
    write(store, Segment("video", 8, 16), range(8, 12))
    assert files(done.uri) == before


@pytest.mark.parametrize("name", ["_root", "_check"])
def test_what_is_removed_by_hand_meanwhile_is_neither_damaged_nor_made_again(done, monkeypatch, name):
    called = getattr(verifying, name)

    def removed(*given):
        if given[-1] in (done, Segment("video", 0, 8)):
            shutil.rmtree(Path(done.uri) / "video")
        return called(*given)

    monkeypatch.setattr(verifying, name, removed)
    assert verify(done, repair=True).damage == ()
    assert [entry.name for entry in Path(done.uri).iterdir() if entry.is_dir()] == ["images"]


def test_a_store_that_goes_away_meanwhile_is_not_taken_for_sound(done, monkeypatch):
    called = verifying._documents

    def unmounted(*given):
        shutil.rmtree(done.uri)
        Path(done.uri).mkdir()
        return called(*given)

    monkeypatch.setattr(verifying, "_documents", unmounted)
    with pytest.raises(StoreError, match="is gone, or there is nothing in it"):
        verify(done, workers=1)


def test_a_signal_ends_it_and_nothing_more_is_repaired(done, monkeypatch):
    looked_at, check = [], verifying._check

    def interrupted(store, arrays, segment):
        looked_at.append(segment)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return check(store, arrays, segment)

    monkeypatch.setattr(verifying, "_check", interrupted)
    for path in (Path(done.uri) / "video/depth/c").rglob("0"):
        if path.is_file():
            path.write_bytes(b"damaged")
    before = files(done.uri)
    with pytest.raises(KeyboardInterrupt):
        verify(done, repair=True, workers=1)
    assert len(looked_at) == 1
    assert files(done.uri) == before


def test_checksums_can_be_checked_without_us(done):
    key = "video/depth/c/1/0/0"
    data = (Path(done.uri) / key).read_bytes()
    assert np.asarray(done.array("video", "checksum")[0, 1]) == len(data) << 32 | zlib.crc32(data)
