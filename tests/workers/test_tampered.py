"""A zarr.json that says what cannot be: every command tells of that source, and goes on with the others."""

import io
import json
import shutil

import pytest
from rich.console import Console

from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.errors import StoreDamagedError, StoreError
from depthmill.pipeline.evaluation.predictions import from_store
from depthmill.pipeline.evaluation.samples import Sample
from depthmill.pipeline.preview import preview
from depthmill.pipeline.sources import source_id
from depthmill.pipeline.store import open_datasets, open_store
from depthmill.pipeline.store.inspect import as_text, inspect
from depthmill.pipeline.store.verify import as_text as verified_text
from depthmill.pipeline.store.verify import verify
from depthmill.pipeline.training.sets.labels import StoredLabels, StoreOptions
from depthmill.tests import media
from depthmill.tests.workers.labelling import run
from depthmill.workers.resume import finished
from depthmill.workers.smooth import smooth

GONE = object()


@pytest.fixture(scope="module")
def made(tmp_path_factory, checkpoints):
    """A folder of inputs and their labels: two videos, of which `bad` will be tampered with, and pictures."""
    root = tmp_path_factory.mktemp("made")
    for name in ("bad", "good", "new"):
        media.write_video(root / f"{name}.mp4", frames=3)
    media.write_image_folder(root / "pictures", count=2)
    config = LabelConfig(
        checkpoint=str(checkpoints / "depth"), labels=("depth",), device="cpu", dtype="float32", workers=0, threads=1
    )
    run([root / "bad.mp4", root / "good.mp4", root / "pictures"], root / "labels.zarr", config)
    return root, config


@pytest.fixture
def case(made, tmp_path):
    """The inputs, the configuration, a copy of the store, and the ids of its sources by name."""
    root, config = made
    store = shutil.copytree(root / "labels.zarr", tmp_path / "labels.zarr")
    ids = {name.partition(".")[0]: source_id(root / name) for name in ("bad.mp4", "good.mp4", "pictures")}
    return root, config, store, ids


def tamper(path, keys, value):
    """Change one value of a JSON file; the whole document, as JSON."""
    document = json.loads(path.read_text())
    *above, last = keys
    holder = document
    for key in above:
        holder = holder[key]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    path.write_text(json.dumps(document))
    return document


INDEX = ("consolidated_metadata", "metadata")
LISTED = pytest.mark.parametrize("listed", [False, True], ids=["not in the root", "the root says the same"])


def tamper_with_source(store, name, keys, value, listed):
    document = tamper(store / name / "zarr.json", keys, value)
    tamper(store / "zarr.json", (*INDEX, name), document if listed else GONE)
    return f"{store / name}/zarr.json is damaged ("


@LISTED
@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("attributes", "size"), None, "attributes.size: Input should be a valid list (got None)"),
        (("attributes", "size", 0), "x", "attributes.size.0: "),
        (("attributes", "size"), [2**20, 2**20], "attributes.size: expected at most "),
        (("attributes", "frames"), GONE, "attributes.frames: Field required"),
        (("attributes", "frames"), 10**12, "attributes.frames: "),
        (("attributes", "frames"), 10**9, "attributes.frames: "),
        (("attributes", "frames"), True, "attributes.frames: "),
        (("attributes", "kind"), 5, "attributes.kind: "),
        (("attributes", "kind"), GONE, "attributes.kind: "),
        (("attributes", "uri"), None, "attributes.uri: "),
        (("attributes", "fps"), "x", "attributes.fps: "),
        (("attributes", "time_checksum"), [], "attributes.time_checksum: "),
        (("attributes",), [], "it is no JSON of a group"),
        (("node_type",), 0, "node_type: "),
    ],
)
def test_a_source_that_says_what_cannot_be_is_told_of(case, keys, value, said, listed):
    _root, _config, store, ids = case
    bad, good, pictures = ids.values()
    why = tamper_with_source(store, bad, keys, value, listed)
    found = inspect(open_store(store))
    assert [source.id for source in found.sources] == [good, pictures]
    assert found.damaged[bad].startswith(why + said)
    assert found.damaged[bad] in as_text(found)
    checked = verify(open_store(store), repair=True)
    assert [(one.file, one.repaired) for one in checked.damage] == [(f"{bad}/zarr.json", False)]
    assert (checked.sources, checked.segments) == (2, 2)
    assert f"{bad}/zarr.json (all frames of {bad}) is damaged ({said}" in verified_text(checked, True)
    assert "again to do what was un-committed" not in verified_text(checked, True)
    with pytest.raises(StoreDamagedError, match="is damaged"):
        open_store(store, index=False).progress(bad)


@LISTED
@pytest.mark.parametrize(("keys", "value"), [(("attributes", "size"), None), (("node_type",), 0)])
def test_a_source_that_says_what_cannot_be_costs_no_other(case, tmp_path, caplog, keys, value, listed):
    root, config, store, ids = case
    bad, good, pictures = ids.values()
    why = tamper_with_source(store, bad, keys, value, listed)
    assert open_datasets(store).keys() == {good, pictures}
    drawn = preview(store, tmp_path / "drawn", frames=1, video=False)
    assert len(drawn.files) == 2
    assert drawn.left_out.keys() == {bad}
    assert len(StoredLabels(StoreOptions(path=store, height=48, width=64), "depth")) == 5
    scored = Sample("pictures/000", "pictures/000.png", "", None)
    assert from_store(store, [scored], "depth").read(scored).shape == (48, 64)
    assert caplog.text.count(why) == 4

    inputs = [str(root / "good.mp4"), str(root / "pictures")]
    assert (done := finished(inputs, store, config)).failures == ()
    assert (done.labelled, done.other_failures, caplog.text.count(why)) == (5, 1, 5)
    done = run([*inputs, root / "bad.mp4", root / "new.mp4"], store, config)
    assert (done.labelled, done.committed, done.other_failures) == (8, 3, 0)
    assert [failure.uri for failure in done.failures] == [str(root / "bad.mp4")]
    assert done.failures[0].reason.startswith(why)
    smoothed = smooth(store, SmoothConfig(workers=0), console=Console(file=io.StringIO()))
    assert set(smoothed.smoothed) == {good, source_id(root / "new.mp4")}
    assert smoothed.left_out[bad].startswith(why)


@pytest.mark.parametrize(
    "text", ["5", "{}", '{"attributes": null}', '{"attributes": {"uri": 1, "kind": "", "size": 0}}', "{"]
)
def test_a_line_of_the_index_that_says_what_cannot_be_costs_nothing_and_is_mended(case, text):
    _root, _config, store, ids = case
    before = (store / "zarr.json").read_text()
    line = next(line for line in before.splitlines() if line.startswith(f'"{ids["bad"]}":'))
    (store / "zarr.json").write_text(before.replace(line, f'"{ids["bad"]}": {text},'))
    assert len(inspect(open_store(store)).sources) == len(open_datasets(store)) == 3
    assert [(one.file, one.repaired) for one in verify(open_store(store), repair=True).damage] == [("zarr.json", True)]
    assert (store / "zarr.json").read_text() == before


def test_what_the_root_says_of_a_source_mends_it(case):
    _root, _config, store, ids = case
    path = store / ids["bad"] / "zarr.json"
    before = path.read_bytes()
    tamper(path, ("attributes", "size"), None)
    assert len(inspect(open_store(store)).sources) == 3
    assert [one.repaired for one in verify(open_store(store), repair=True).damage] == [True]
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("attributes",), [], "it is no JSON of a group"),
        (("consolidated_metadata",), 5, "is no index"),
        (INDEX, 5, "is no index"),
        (("attributes", "depthmill", "version"), GONE, "version: Field required"),
        (("attributes", "depthmill", "layout"), None, "layout: "),
        (("attributes", "depthmill", "layout", "segment_frames"), "x", "layout.segment_frames: "),
        (("attributes", "depthmill", "layout", "segment_frames"), 63, "layout: segment_frames is 63"),
        (("attributes", "depthmill", "layout", "labels"), GONE, "layout: 'labels'"),
        (("attributes", "depthmill", "layout", "more"), 1, "layout: .*more"),
        (("attributes", "depthmill", "identity", "checkpoints", "depth"), 0, "identity.checkpoints.depth: "),
    ],
)
def test_a_root_that_says_what_cannot_be_is_one_clear_error(case, keys, value, said):
    root, config, store, _ids = case
    path = store / "zarr.json"
    lines = path.read_text().partition("\n")[2]
    document = tamper(path, keys, value)
    texts = [path.read_text()]
    if keys[0] == "attributes":  # as depthmill writes it
        start = json.dumps({**document, "consolidated_metadata": {"metadata": {}}}).removesuffix("}}}")
        texts.append(f"{start}\n{lines}")
    for text in texts:
        path.write_text(text)
        for command in (
            lambda: open_store(store),
            lambda: open_store(store, index=False),
            lambda: run([root / "good.mp4"], store, config),
        ):
            with pytest.raises(StoreError, match=rf"{store}/zarr.json is damaged \(.*{said}.*put it back as it was"):
                command()
    assert finished([str(root / "good.mp4")], store, config) is None
