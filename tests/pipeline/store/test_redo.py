from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreDamagedError, StoreError
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.types import Failure, Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, IMAGES, LAYOUT, VIDEO, files, labels, write

VIDEO_SEGMENT, IMAGES_SEGMENT = Segment("video", 0, 8), Segment("images", 0, 5)


@pytest.fixture
def other(tmp_path):
    store = stores.create(tmp_path / "other", LAYOUT, IDENTITY)
    store.add(VIDEO, IMAGES)
    return store


def test_frames_done_again_leave_the_labels_of_a_store_in_which_they_never_failed(store, other):
    write(store, VIDEO_SEGMENT, failed={1, 5, 6})
    write(store, IMAGES_SEGMENT, failed=range(5), size=(20, 30))
    first = Path(store.uri) / "video/depth/c/0/0/0"
    before = first.stat().st_mtime_ns
    for segment, frames in store.failed_segments("video"):
        write(store, segment, redo=frames[1:])
    assert first.stat().st_mtime_ns == before, "a shard of which nothing is done again is left alone"
    assert store.failures()[5:] == [Failure("/in/video.mp4", "video", 1, "broken")]
    write(store, VIDEO_SEGMENT, redo=[1])
    write(store, IMAGES_SEGMENT, redo=[4, 0], size=(20, 30))
    write(other, VIDEO_SEGMENT)
    write(other, IMAGES_SEGMENT, failed={1, 2, 3}, size=(20, 30))
    for source_id in store.sources():
        for name in store.arrays(source_id).keys() - {"checksum"}:
            np.testing.assert_array_equal(store.read(source_id, name), other.read(source_id, name))
    assert verify(store).damage == ()


def test_chunks_that_are_kept_stay_where_a_reader_has_found_them(store):
    segment = Segment("video", 8, 16)
    write(store, segment, failed={8, 10})
    shards = [Path(store.uri) / f"video/{name}" for name in ("depth/c/2/0/0", "normals/c/2/0/0/0")]
    for redo in ([10], [8]):
        before = [shard.read_bytes()[: -16 * LAYOUT.shard_frames - 4] for shard in shards]
        write(store, segment, redo=redo)
        for shard, chunks in zip(shards, before, strict=True):
            assert shard.read_bytes().startswith(chunks)


def test_what_fails_again_has_its_new_reason(store, other):
    write(store, IMAGES_SEGMENT, failed={1, 3})
    status = Path(store.uri) / "images/status/c/0"
    before = status.read_bytes()
    write(store, IMAGES_SEGMENT, redo=[1, 3])
    status.write_bytes(before)  # as if killed there
    writer = store.writer(IMAGES_SEGMENT, [1, 3])
    writer.fail(3, "still broken")
    writer.put(1, *labels(1))
    writer.commit()
    assert [(failure.frame, failure.reason) for failure in store.failures()] == [(3, "still broken")]
    np.testing.assert_array_equal(store.array("images", "size")[:, 0], [24, 24, 24, 0, 24])


def test_being_killed_half_way_is_seen_and_mended(store, other):
    write(store, VIDEO_SEGMENT, failed={1, 5})
    writer = store.writer(VIDEO_SEGMENT, [1, 5])
    writer.put(1, *labels(1))
    writer._finish_writing()  # and no more: the first shard is new, its checksum is not
    assert store.failed_segments("video") == [(VIDEO_SEGMENT, (1, 5))]
    assert [damage.file for damage in verify(store).damage] == ["video/depth/c/0/0/0", "video/normals/c/0/0/0/0"]
    ((segment, frames),) = store.failed_segments("video")
    write(store, segment, redo=frames)
    write(other, VIDEO_SEGMENT, failed={1, 5})
    write(other, VIDEO_SEGMENT, redo=[1, 5])
    assert files(store.uri) == files(other.uri)


def test_being_killed_before_the_status_is_mended(store, other):
    write(store, VIDEO_SEGMENT, failed={1, 5})
    status = Path(store.uri) / "video/status/c/0"
    before = status.read_bytes()
    write(store, VIDEO_SEGMENT, redo=[1, 5])
    status.write_bytes(before)
    write(store, VIDEO_SEGMENT, redo=[1, 5])
    write(other, VIDEO_SEGMENT, failed={1, 5})
    write(other, VIDEO_SEGMENT, redo=[1, 5])
    assert files(store.uri) == files(other.uri)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("video/depth/c/0/0/0", None),
        ("video/depth/c/0/0/0", lambda data: data[:-1]),
        ("video/normals/c/0/0/0/0", lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:]),
        ("images/size/c/0/0", None),
        ("images/size/c/0/0", lambda data: data[:9]),
    ],
    ids=["missing", "cut off", "other bytes", "sizes missing", "sizes cut off"],
)
def test_damage_of_what_is_kept_is_told_and_stays_to_be_found(store, file, change):
    """It must not get a checksum that is right."""
    segment = {"video": VIDEO_SEGMENT, "images": IMAGES_SEGMENT}[file.split("/")[0]]
    write(store, segment, failed={1})
    path = Path(store.uri) / file
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match="--repair"):
            write(store, segment, redo=[1])
    assert file in [damage.file for damage in verify(store).damage]


def test_labels_that_are_lost_with_their_checksums_are_damage(store):
    write(store, VIDEO_SEGMENT, failed={1})
    for file in ("checksum/c/0/0", "depth/c/0/0/0", "normals/c/0/0/0/0"):
        (Path(store.uri) / "video" / file).unlink()
    with pytest.raises(StoreDamagedError, match=r"checksum is damaged .the checksums of .* are missing"):
        write(store, VIDEO_SEGMENT, redo=[1])


def test_a_size_larger_than_that_of_its_source_is_damage(store):
    write(store, IMAGES_SEGMENT, failed={1})
    store.array("images", "size")[0] = 25, 32
    with pytest.raises(StoreDamagedError, match="pictures with labels have no size"):
        write(store, IMAGES_SEGMENT, redo=[1])


def test_only_frames_of_a_committed_segment_can_be_done_again(store):
    with pytest.raises(StoreError, match=r"frames \[1\] cannot be redone: expected some of video\[0:8\], committed"):
        store.writer(VIDEO_SEGMENT, [1])
    write(store, VIDEO_SEGMENT, failed={1})
    for redo in ([], [9], [1, 8]):
        with pytest.raises(StoreError, match="cannot be redone"):
            store.writer(VIDEO_SEGMENT, redo)
    writer = store.writer(VIDEO_SEGMENT, [1])
    with pytest.raises(StoreError, match="given twice"):
        writer.put(2, *labels(2))
    with pytest.raises(StoreError, match=r"frames \[1\] were never given"):
        writer.commit()


def test_commit_says_how_many_bytes_it_wrote(store):
    before = files(store.uri)
    written = write(store, VIDEO_SEGMENT, failed={1})
    assert written == sum(len(data) for key, data in files(store.uri).items() if key not in before)
    assert 0 < write(store, VIDEO_SEGMENT, redo=[1]) < written
