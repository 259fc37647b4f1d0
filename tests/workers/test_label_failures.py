"""Runs in this process in which something fails: inputs, frames, sources in the store, attempts."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.store import open_datasets, open_store
from depthmill.pipeline.store.inspect import inspect
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.worker import Worker
from depthmill.tests import media, runs
from depthmill.tests.workers.labelling import only_source, run


def test_bad_inputs_stop_nothing_and_are_all_listed(tmp_path, config):
    inputs = tmp_path / "inputs"
    good = media.write_video(inputs / "good.mp4", frames=9)
    noisy = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8) for i in range(40)]
    broken = media.break_middle(media.write_video(inputs / "broken.mp4", pictures=noisy), 0.6, 3000)
    cut = media.truncate(media.write_video(inputs / "cut.mp4", pictures=noisy), 0.6)
    text = inputs / "text.mp4"
    text.write_text("this is no video")
    (inputs / "empty").mkdir()
    photos = inputs / "photos"
    media.write_image_folder(photos, count=3)
    (photos / "000-zero.png").touch()
    (photos / "000-text.jpg").write_text("this is no picture")
    Image.new("RGB", (1, 1)).save(photos / "tiny.png")
    missing = inputs / "missing.mp4"
    summary = run([good, broken, cut, text, inputs / "empty", photos, missing], tmp_path / "out.zarr", config)

    failures = [json.loads(line) for line in (tmp_path / "out.zarr" / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == len(summary.failures)
    assert all(failure["reason"] for failure in failures)
    unopened = {failure["uri"] for failure in failures if failure["frame"] is None}
    assert unopened == {str(text), str(inputs / "empty"), str(missing)}
    by_input = {str(path): 0 for path in (good, broken, cut, photos)}
    for failure in failures:
        if failure["frame"] is not None:
            by_input[failure["uri"]] += 1
    assert by_input[str(good)] == 0
    assert by_input[str(photos)] == 2
    assert 0 < by_input[str(broken)] < 40
    assert by_input[str(cut)] >= 1
    assert summary.labelled == summary.frames - sum(by_input.values())
    again = run([good, broken, cut, text, inputs / "empty", photos, missing], tmp_path / "out.zarr", config)
    assert again.committed == 0
    assert again.failures == summary.failures


def test_nothing_that_can_be_opened_is_an_error_and_makes_no_store(tmp_path, config):
    with pytest.raises(SourceError, match="1 input given, and none"):
        run([tmp_path / "missing.mp4"], tmp_path / "out.zarr", config)
    assert not (tmp_path / "out.zarr").exists()


def test_a_frame_that_the_model_fails_at_is_found_and_the_rest_is_labelled(video, tmp_path, config, monkeypatch):
    original = Worker.label, Worker.try_task

    def fails(method):
        def call(self, task):
            if task.segment.start <= 10 < task.segment.stop and 10 not in dict(task.skip):
                raise RuntimeError("no luck")
            return method(self, task)

        return call

    monkeypatch.setattr(Worker, "label", fails(original[0]))
    monkeypatch.setattr(Worker, "try_task", fails(original[1]))
    summary = run([video], tmp_path / "out.zarr", config.model_copy(update={"attempts": 2}))
    assert summary.labelled == 18
    (failure,) = summary.failures
    assert (failure.frame, failure.reason) == (10, "RuntimeError: no luck")
    assert np.isnan(only_source(tmp_path / "out.zarr").depth.values[10]).all()
    assert not np.isnan(only_source(tmp_path / "out.zarr").depth.values[11]).any()
    monkeypatch.undo()

    again = run([video], tmp_path / "out.zarr", config)
    assert (again.committed, len(again.failures)) == (0, 1)
    mended = run([video], tmp_path / "out.zarr", config, retry_failed=True)
    assert (mended.committed, mended.labelled, mended.failures) == (1, 19, ())
    run([video], tmp_path / "whole.zarr", config)
    for name in ("depth", "normals", "status"):
        np.testing.assert_allclose(
            only_source(tmp_path / "out.zarr")[name], only_source(tmp_path / "whole.zarr")[name], atol=1e-2
        )


def test_one_changed_input_among_others_is_left_out(video, tmp_path, config):
    other = media.write_video(tmp_path / "other.mp4", frames=3)
    run([video, other], tmp_path / "out.zarr", config)
    media.write_video(video, frames=18)
    more = media.write_video(tmp_path / "more.mp4", frames=3)
    summary = run([video, other, more], tmp_path / "out.zarr", config)
    assert (summary.sources, summary.committed) == (2, 3)
    assert "changed since" in summary.failures[0].reason
    group = re.search(r"remove (.+?) and", summary.failures[0].reason)[1]
    assert open_store(tmp_path / "out.zarr").attributes(Path(group).name)["uri"] == str(video)
    shutil.rmtree(group)
    summary = run([video, other, more], tmp_path / "out.zarr", config)
    assert (summary.sources, summary.committed, summary.failures) == (3, 18, ())
    assert verify(open_store(tmp_path / "out.zarr")).damage == ()
    assert {len(source.time) for source in open_datasets(tmp_path / "out.zarr").values()} == {3, 18}


@pytest.mark.parametrize("kind", ["photos", "big.tar"])
def test_an_input_that_is_replaced_at_its_url_is_left_out_from_there_on(s3, video, tmp_path, config, monkeypatch, kind):
    height, width = (48, 64) if kind == "photos" else (480, 640)  # of the archive, more than is fetched ahead

    def put(first):
        named = [(f"{i:02}.bmp", media.encode(first + i, ".bmp", height=height, width=width)) for i in range(12)]
        if kind == "photos":  # one of them alone
            files = {f"photos/{name}": picture for name, picture in (named[9:10] if first else named)}
        else:
            files = {kind: media.write_tar(tmp_path / kind, named).read_bytes()}
        for name, data in files.items():
            fsspec.filesystem("s3").pipe_file(f"{s3.url}/{name}", data)

    put(0)
    store, uri, label, done = tmp_path / "out.zarr", f"{s3.url}/{kind}", Worker.label, []

    def replaced(self, task, *following):
        report = label(self, task, *following)
        done.append(task.uri)
        if done.count(uri) == 1 and task.uri == uri:
            put(100)
        return report

    monkeypatch.setattr(Worker, "label", replaced)
    config, started_s = config.model_copy(update={"segment_frames": 4}), time.monotonic()
    summary = run([uri, video], store, config)
    assert time.monotonic() - started_s < 60, "it is no outage, which would be waited for"
    (failure,) = summary.failures
    assert (failure.uri, failure.frame) == (uri, None)
    assert failure.reason.startswith(f"{uri} changed since it was labelled, or was to be")
    status = {name.partition("-")[0]: one.status.values.tolist() for name, one in open_datasets(store).items()}
    before = sum(status[kind.partition(".")[0]])  # what was read before stays, and nothing of the other one is in it
    assert before in (4, 8)
    assert status == {"clip": [1] * 19, kind.partition(".")[0]: [1] * before + [0] * (12 - before)}
    monkeypatch.undo()
    (failure,) = run([uri, video], store, config).failures
    assert "changed since it was labelled into" in failure.reason
    put(0)
    summary = run([uri, video], store, config)
    assert (summary.committed, summary.labelled, summary.failures) == (12 - before, 31, ())


@pytest.mark.parametrize("array", ["status", "reason"])
def test_one_source_that_is_damaged_in_the_store_is_left_out(video, tmp_path, config, array):
    path = tmp_path / "my out.zarr"
    broken = media.write_image_folder(tmp_path / "photos", count=3)[0].parent
    (broken / "001.png").write_bytes(b"no picture")
    whole = run([video, broken], path, config)
    (damaged,) = path.glob(f"photos*/{array}/c/0")
    damaged.write_bytes(b"\xffnonsense")
    store = open_store(path)
    assert inspect(store).failed == (3 if array == "status" else 1)
    more = media.write_video(tmp_path / "more.mp4", frames=3)
    assert run([video, more], path, config).labelled == 22, "another's damage is no matter of theirs"
    summary = run([video, more, broken], path, config)
    assert summary.labelled == 22 + (0 if array == "status" else 2)
    (failure,) = summary.failures
    assert (failure.uri, failure.frame) == (str(broken), None)
    remedy = re.search(rf"/{array} is damaged .*: run `(.*)`, which mends it", failure.reason)[1]
    assert shlex.split(remedy) == ["depthmill", "verify", str(path), "--repair"]
    (listed,) = (path / "failures.jsonl").read_text().splitlines()
    assert json.loads(listed)["reason"] == failure.reason
    verify(store, repair=True)
    summary = run([video, more, broken], path, config)
    assert (summary.labelled, [failure.frame for failure in summary.failures]) == (24, [1])
    assert [failure.frame for failure in whole.failures] == [1]


def test_a_wrong_path_does_not_cost_the_store_that_was_to_be_overwritten(video, tmp_path, config):
    run([video], tmp_path / "out.zarr", config)
    with pytest.raises(SourceError, match="left as it was"):
        run([tmp_path / "missing.mp4"], tmp_path / "out.zarr", config, overwrite=True)
    assert only_source(tmp_path / "out.zarr").sizes["frame"] == 19


def test_an_attempt_that_fails_once_leaves_no_trace(video, tmp_path, config, monkeypatch):
    run([video], tmp_path / "whole.zarr", config)
    original, tries = Labeler.label, []

    def fail_once(self, frames, *arguments, **options):
        tries.append(frames)
        if len(tries) == 2:
            raise RuntimeError("once")
        return original(self, frames, *arguments, **options)

    monkeypatch.setattr(Labeler, "label", fail_once)
    assert run([video], tmp_path / "out.zarr", config).labelled == 19
    assert runs.contents(tmp_path / "out.zarr") == runs.contents(tmp_path / "whole.zarr")
