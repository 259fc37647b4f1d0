"""A job that is finished is found so without the libraries that the network needs, and only then."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import RunStoppedError, SourceError, StoreError
from depthmill.pipeline.sources.images import ImageSource
from depthmill.pipeline.sources.video import VideoSource
from depthmill.pipeline.store.files import LocalDirectory
from depthmill.pipeline.store.root import Root, read_root, write_root
from depthmill.tests import media
from depthmill.workers.label import label
from depthmill.workers.progress import print_summary
from depthmill.workers.resume import finished, unsmoothed_videos


@pytest.fixture
def config(checkpoints, loaded_once):
    return LabelConfig(checkpoint=str(checkpoints / "depth"), labels=("depth",), device="cpu", workers=0, threads=1)


@pytest.fixture(autouse=True)
def later(monkeypatch):
    """Inputs were written some time ago."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 10**10)


@pytest.fixture
def clip(tmp_path):
    return media.write_video(tmp_path / "clip.mp4", frames=3)


@pytest.fixture
def store(tmp_path, clip, config):
    store = tmp_path / "out.zarr"
    label([str(clip)], store, config)
    return store


def test_says_what_label_would_say(store, clip, config, monkeypatch):
    """And writes nothing: the store may be where nothing can be written."""
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    monkeypatch.setattr(LocalDirectory, "write", lambda self, key, data: pytest.fail(f"{key} was written"))
    found = finished([str(clip)], store, config)
    again = label([str(clip)], store, config)
    assert (found.labelled, found.committed) == (3, 0)
    same = ("store", "sources", "frames", "labelled", "committed", "failures", "other_failures", "device", "bytes")
    for name in same:
        assert getattr(found, name) == getattr(again, name)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_reads_no_input_that_is_as_it_was(store, clip, config, monkeypatch):
    read, probe = [], VideoSource.probe
    monkeypatch.setattr(VideoSource, "probe", lambda source: read.append(1) or probe(source))
    assert finished([str(clip)], store, config).labelled == 3
    assert not read
    os.utime(clip, (1e9, 1e9 + 1))  # touched, and the same
    for _ in range(2):
        assert finished([str(clip)], store, config).labelled == 3
    assert len(read) == 1


def test_many_inputs_that_are_as_they_were_take_no_worker_and_one_that_is_not_alone_is_probed(
    tmp_path, config, monkeypatch
):
    monkeypatch.setattr("depthmill.workers.resume._PROBED_HERE", 2)
    folder = tmp_path / "photos"
    pictures = [str(media.write_image(folder / f"{i}.png", i)) for i in range(4)]
    store, read, probe = tmp_path / "many.zarr", [], ImageSource.probe
    label(pictures, store, config)
    monkeypatch.setattr(ImageSource, "probe", lambda source: read.append(source._uri) or probe(source))
    found = finished(pictures, store, config)
    assert (found.sources, found.labelled, read) == (4, 4, [])
    new = media.write_image(folder / "new.png", 4)
    gone = folder / "gone.png"
    assert finished([*pictures, str(new)], store, config) is None
    assert not read
    summary = label([*pictures, str(gone), str(new)], store, config)
    assert (summary.sources, summary.labelled, summary.committed, set(read)) == (5, 5, 1, {str(new)})
    assert [failure.uri for failure in summary.failures] == [str(gone)]
    Path(pictures[3]).unlink()
    assert finished(pictures, store, config) is None


def test_a_store_that_does_not_answer_at_the_start_of_a_rerun_is_waited_for(store, clip, config, monkeypatch):
    children, refused = LocalDirectory.children, []

    def away(self, key=""):
        if key.endswith("status/c") and not refused:
            refused.append(key)
            raise StoreError("503")
        return children(self, key)

    monkeypatch.setattr(LocalDirectory, "children", away)
    assert label([str(clip)], store, config).labelled == 3
    assert refused


def test_tells_failures_again(tmp_path, config):
    folder = tmp_path / "pictures"
    folder.mkdir()
    from PIL import Image

    Image.new("RGB", (64, 48)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"broken")
    store = tmp_path / "out.zarr"
    once = label([str(folder)], store, config)
    assert once.failures
    found = finished([str(folder)], store, config)
    assert (found.failures, found.labelled) == (once.failures, 1)
    assert finished([str(folder)], store, config, retry_failed=True) is None


def test_failures_of_other_sources_are_listed_and_not_counted(tmp_path, clip, config, capsys):
    folder = tmp_path / "pictures"
    media.write_image_folder(folder, count=2)
    (folder / "broken.png").write_bytes(b"broken")
    store = tmp_path / "out.zarr"
    assert len(label([str(folder)], store, config).failures) == 1
    other = media.write_video(tmp_path / "other.mp4", frames=2)
    for found in (label([str(clip)], store, config), finished([str(clip)], store, config)):
        assert (found.failures, found.other_failures) == ((), 1)
        (line,) = (store / "failures.jsonl").read_text().splitlines()
        assert (json.loads(line)["uri"], json.loads(line)["key"]) == (str(folder), "broken.png")
    print_summary(found)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("1 frame of other sources in the store failed earlier")
    assert len(label([str(folder), str(other)], store, config).failures) == 1


def test_an_open_dtype_is_the_stores(store, clip, config):
    assert finished([str(clip)], store, config.model_copy(update={"dtype": "float32"}))
    assert finished([str(clip)], store, config.model_copy(update={"dtype": "bfloat16"})) is None


def test_whatever_may_be_left_is_for_label(store, clip, config, tmp_path):
    other = media.write_video(tmp_path / "other.mp4", frames=2)
    assert finished([str(clip), str(other)], store, config) is None
    assert finished([str(tmp_path / "missing.mp4")], store, config) is None
    assert finished([str(clip)], tmp_path / "nothing.zarr", config) is None
    assert not (tmp_path / "nothing.zarr").exists()
    assert finished([str(clip)], store, config.model_copy(update={"processing_resolution": 32})) is None
    assert finished([str(clip)], store, config.model_copy(update={"checkpoint": "nowhere"})) is None
    next(store.glob("*/status/c/0")).unlink()
    assert finished([str(clip)], store, config) is None


def test_a_run_that_did_not_end_is_for_label(store, clip, config):
    (store / "run.json").unlink()
    assert finished([str(clip)], store, config) is None


def test_a_store_that_is_away_when_all_is_labelled_is_waited_for(store, clip, config, monkeypatch):
    write, tries, slept_s = LocalDirectory.write, [], []

    def away(self, key, data):
        tries.append(key)
        if key == "failures.jsonl" or tries.count(key) < 3:
            raise StoreError("503")
        write(self, key, data)

    (store / "run.json").unlink()
    monkeypatch.setattr(LocalDirectory, "write", away)
    monkeypatch.setattr(time, "sleep", slept_s.append)
    assert label([str(clip)], store, config).labelled == 3
    assert (store / "run.json").exists()
    assert (tries, slept_s) == (["run.json"] * 3, [1, 2])
    (store / "failures.jsonl").unlink()
    assert finished([str(clip)], store, config) is None
    with pytest.raises(RunStoppedError, match=r"503[\s\S]*All frames are committed and stay"):
        label([str(clip)], store, config)
    assert sum(slept_s[2:]) == 127


def test_no_run_is_finished_whose_inputs_cannot_be_listed(tmp_path, clip, config, s3, refuse, monkeypatch):
    slept_s, given = [], [f"{s3.url}/in/", str(clip)]
    fsspec.filesystem("s3").pipe_file(f"{s3.url}/in/clip.mp4", clip.read_bytes())
    store = tmp_path / "in.zarr"
    refuse["in/"] = 1
    with pytest.raises(SourceError, match="token has expired"):
        label(given, store, config)
    assert not store.exists()
    assert label(given, store, config).sources == 2
    refuse["in/"] = 1
    assert finished(given, store, config) is None
    assert finished(given, store, config).sources == 2
    monkeypatch.setattr(time, "sleep", slept_s.append)
    refuse["in/"] = 2
    assert len(unsmoothed_videos(given, store)) == 2
    assert slept_s == [1, 2]


def test_a_source_that_the_root_does_not_name_is_named(store, clip, config):
    """As where a run was killed whose labels were all committed."""
    directory = LocalDirectory(store)
    before = read_root(directory)
    write_root(directory, Root(before.attributes, {}))
    assert finished([str(clip)], store, config)
    assert read_root(directory) == before


def test_an_input_that_changed_is_for_label(store, clip, config):
    media.write_video(clip, frames=4)
    assert finished([str(clip)], store, config) is None


def test_takes_no_heavy_library(store, clip, config):
    code = f"""
import sys
from depthmill.cli import app
app({["label", str(clip), str(store), "--checkpoint", config.checkpoint, "--labels", "depth"]!r}, standalone_mode=False)
import json
heavy = ("torch", "diffusers", "transformers", "ray", "scipy", "zarr", "cv2")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, heavy = done.stdout.rsplit("\n", 2)[:2]
    assert "3 of 3 frames" in said
    assert json.loads(heavy) == []
