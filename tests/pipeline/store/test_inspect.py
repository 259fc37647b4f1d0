import json
from dataclasses import asdict, replace

import pytest
import zarr

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.inspect import as_text, inspect
from depthmill.pipeline.store.records import write_failures
from depthmill.pipeline.types import Failure, Segment
from depthmill.tests.pipeline.store.samples import IDENTITY, VIDEO, files, labels, write


def test_counts_sizes_and_reasons_are_those_of_the_files(store):
    write(store, Segment("video", 8, 16))
    writer = store.writer(Segment("images", 0, 5))
    for index in range(5):
        if index == 2:
            writer.put(index, *labels(index))
        else:
            writer.fail(index, "truncated" if index else "no picture")
    writer.commit()
    write_failures(store.directory, [*store.failures(), Failure("/in/none.mp4", None, None, "no such file")])
    run = {"frames_per_s": 12.5, "seconds": 4, "device": "cpu", "committed": 1}
    store.directory.write("run.json", json.dumps(run).encode())
    found = inspect(stores.open_store(store.uri))
    images, video = found.sources
    assert (video.labelled, video.failed, video.pending, video.frames) == (8, 0, 10, 18)
    assert (images.labelled, images.failed, images.pending, images.frames) == (1, 4, 0, 5)
    assert (found.labelled, found.failed, found.pending, found.frames) == (9, 4, 10, 23)
    assert found.kinds == {"images": 1, "video": 1}
    assert found.failures == {"truncated": 3, "no picture": 1}
    assert found.unopened == {"no such file": 1}
    assert found.identity == IDENTITY
    there = files(store.uri)
    assert found.bytes == sum(map(len, there.values()))
    assert video.bytes == sum(len(data) for key, data in there.items() if key.startswith("video/"))
    assert found.bytes_per_frame == (video.bytes + images.bytes) / 13
    assert json.loads(json.dumps(asdict(found)))["sources"][1]["uri"] == VIDEO.uri
    text = as_text(found)
    assert "23: 9 labelled, 4 failed, 10 pending" in text
    assert "1 frame in 4.0 s, 12.5 frames/s (cpu)" in text
    assert "3 x truncated" in text
    assert "and 1 more: --json" in as_text(found, most=1)


def test_the_end_of_a_line_in_a_name_is_no_end_of_a_line(store):
    found = inspect(store)
    named = replace(found, sources=tuple(replace(source, uri="/in/two\nlines.mp4") for source in found.sources))
    assert len(as_text(named).splitlines()) == len(as_text(found).splitlines())
    assert "(/in/two\\x0alines.mp4)" in as_text(named)


def test_sources_are_not_listed_one_by_one(store, monkeypatch):
    write(store, Segment("video", 8, 16))
    listed = []
    monkeypatch.setattr(LocalDirectory, "children", lambda self, key="": listed.append(key) or ["images/", "video/"])
    assert inspect(store).labelled == 8
    assert listed == [""]


def test_without_failures_nothing_is_read_through_zarr(store, monkeypatch):
    write(store, Segment("video", 8, 16))
    read = []
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, rows: read.append(self.path))
    assert (inspect(store).labelled, read) == (8, [])


def test_reasons_are_read_where_frames_failed_alone(store, monkeypatch):
    """A damaged source may say that it has millions of frames."""
    for start in (0, 8):
        write(store, Segment("video", start, start + 8), failed=[start])
    path = store.directory.path / "video/zarr.json"
    group = json.loads(path.read_text())
    group["attributes"]["frames"] = 10**4
    path.write_text(json.dumps(group))
    (store.directory.path / "zarr.json").write_text(
        json.dumps({**json.loads((store.directory.path / "zarr.json").read_text()), "consolidated_metadata": None})
    )
    read, keys = LocalDirectory.read, []
    monkeypatch.setattr(LocalDirectory, "read", lambda self, key, *part: keys.append(key) or read(self, key, *part))
    assert inspect(stores.open_store(store.uri)).failures == {"broken": 2}
    assert len([key for key in keys if key.startswith("video/reason/c/")]) == 2


def test_a_store_in_which_nothing_has_been_done(tmp_path):
    found = inspect(stores.create(tmp_path / "s", stores.Layout(), {}))
    assert (found.frames, found.bytes_per_frame, found.sources, found.run) == (0, 0, (), {})
    assert "frames       0" in as_text(found)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("run.json", content) for content in (b'{"config": ', b"[]", b"null")),
        *(("failures.jsonl", content) for content in (b'{"uri": ', b"[]", b'{"reason": ""}', b"\xff")),
    ],
)
def test_a_damaged_record_of_the_last_run_is_an_error_with_its_remedy(store, name, content):
    store.directory.write(name, content)
    with pytest.raises(StoreError, match=rf"{name} is damaged .* remove it"):
        inspect(store)


def test_lines_of_text_in_a_reason_do_not_break_the_list_of_failures(store):
    write_failures(store.directory, [Failure("/in/\udce9\u2028.mp4", None, None, "odd\u2028name\x85")])
    assert inspect(store).unopened == {"odd\u2028name\x85": 1}
    listed = '{"uri":"/in/two","source_id":null,"frame":null,"reason":"of an\u2028earlier version"}\n'
    store.directory.write("failures.jsonl", listed.encode())
    assert inspect(store).unopened == {"of an\u2028earlier version": 1}
