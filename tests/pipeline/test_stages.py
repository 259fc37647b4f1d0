import gc
import weakref
from copy import deepcopy

import numpy as np
import pytest
import torch

import depthmill
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import VoidError
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.plan import Task
from depthmill.pipeline.stages import fail_task, label_frames, read_segment, try_segment
from depthmill.pipeline.store import Layout
from depthmill.pipeline.store.layout import DEPTH_INVALID
from depthmill.pipeline.types import FAILED, LABELLED, Frame, Segment, Source
from depthmill.tests.pipeline.store.samples import files

SIZES = [(40, 60), (60, 40), (39, 60), (30, 30), (41, 60), (60, 41), (40, 51), (40, 60), (33, 33), (39, 60), (40, 52)]


class Pictures:
    """A source in memory; reading a frame of `deadly` ends the process, so to speak."""

    def __init__(self, broken=(), deadly=(), kind="images"):
        draw = np.random.default_rng(0)
        self.images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
        self.broken, self.deadly, self.kind = dict(broken), deadly, kind

    def probe(self):
        keys = tuple(f"{i}.png" for i in range(len(SIZES)))
        return Source("pictures", "/pictures", self.kind, len(SIZES), 60, 60, None, "f", keys=keys)

    def read(self, start, stop, on_passed=None):
        for index in range(start, stop):
            assert index not in self.deadly, "the process is gone"
            image = None if index in self.broken else self.images[index]
            yield Frame(index, image, self.broken.get(index, ""))

    def close(self):
        pass


@pytest.fixture(scope="module")
def loaded(checkpoints):
    # float32: weights that are laid out for a CPU's bfloat16 cannot be copied.
    return Labeler.from_pretrained(
        checkpoints / "depth", checkpoints / "normals", device="cpu", batch_size=3, dtype="float32"
    )


@pytest.fixture
def labeler(loaded):
    return deepcopy(loaded)  # some tests spoil its weights


@pytest.fixture
def store(tmp_path):
    store = stores.create(tmp_path / "labels.zarr", Layout(shard_frames=4, segment_frames=12), {})
    store.add(Pictures().probe())
    return store


def run(source, store, labeler, only=None, **skip):
    segment, rounded = store.segments("pictures")[0], labeler.rounds(source.probe())
    frames = read_segment(source, segment, only=only, **skip)
    return label_frames(frames, segment, labeler, store, rounded=rounded, only=only).commit()


def company(labeler, monkeypatch):
    """Which frames the labeler is given together, from now on."""
    submit, batches = labeler.submit, []

    def watched(frames, keys, **options):
        batches.append([int(key.removeprefix("pictures/")) for key in keys])
        return submit(frames, keys, **options)

    monkeypatch.setattr(labeler, "submit", watched)
    return batches


def row(store, index):
    """The depth of one row, as stored, without the canvas around it."""
    height, width = SIZES[index]
    return depthmill.open(store.uri)["pictures"]["depth"][index, :height, :width].values


def test_frames_meet_by_shape_and_rows_stay_in_order(labeler, store, monkeypatch):
    alone = [labeler(image[None]).depth[0] for image in Pictures().images]
    batches = company(labeler, monkeypatch)
    report = run(Pictures(), store, labeler)
    assert batches == [[0, 2, 4], [1, 5], [3, 8], [6], [7, 9], [10]]
    assert (report.labelled, report.failed, report.slots) == (11, 0, 18)
    assert report.label_s > 0
    assert report.bytes > 0
    for index, depth in enumerate(alone):
        assert np.abs(row(store, index) - depth).max() <= 2e-4


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_corpus_is_seen_at_rounded_aspect_ratios(labeler, store, monkeypatch, kind):
    expected = [labeler.label([image], rounded=True)[0].depth[0] for image in Pictures().images]
    batches = company(labeler, monkeypatch)
    try_segment(Pictures(kind=kind), store.segments("pictures")[0], labeler)
    assert batches == [[0, 2, 4], [1, 5], [3, 8], [6, 10], [7, 9]]
    run(Pictures(kind=kind), store, labeler)
    for index, depth in enumerate(expected):
        assert np.abs(row(store, index) - depth).max() <= 2e-4


def test_frames_to_be_skipped_are_as_if_they_could_not_be_read(labeler, tmp_path, monkeypatch):
    reasons = {2: "it kills the decoder", 3: "so does it"}
    written, met = [], []
    for name, source, skip in (("a", Pictures(broken=reasons), {}), ("b", Pictures(deadly=reasons), reasons)):
        store = stores.create(tmp_path / name, Layout(shard_frames=4, segment_frames=12), {})
        store.add(source.probe())
        with monkeypatch.context() as patch:
            met.append(company(labeler, patch))
            report = run(source, store, labeler, skip=skip)
        assert (report.labelled, report.failed) == (9, 2)
        assert report.reasons == {"it kills the decoder": 1, "so does it": 1}
        written.append(files(store.uri))
    assert met[0] == met[1] == [[0, 4, 7], [1, 5], [6], [8], [9], [10]]
    assert written[0] == written[1]


def test_frames_of_a_committed_segment_are_done_again_alone(labeler, store, monkeypatch):
    run(Pictures(broken={1: "gone", 6: "gone"}), store, labeler)
    before = [row(store, index) for index in (0, 2, 10)]
    expected = labeler(Pictures().images[1][None]).depth[0]
    batches = company(labeler, monkeypatch)
    report = run(Pictures(broken={6: "still gone"}, deadly=(0, 2, 5, 7)), store, labeler, only=[1, 6])
    assert (report.labelled, report.failed, batches) == (1, 1, [[1]])
    assert store.status("pictures").tolist() == [LABELLED] * 6 + [FAILED] + [LABELLED] * 4
    assert [failure.reason for failure in store.failures()] == ["still gone"]
    assert np.abs(row(store, 1) - expected).max() <= 2e-4
    assert all(np.array_equal(row(store, index), old) for index, old in zip((0, 2, 10), before, strict=True))


def test_frames_that_were_to_be_done_again_are_counted_alone(labeler, store):
    run(Pictures(broken={1: "gone", 6: "gone"}), store, labeler)
    before = files(store.uri)
    task = Task("/pictures", "f", store.segments("pictures")[0], only=(1, 6), skip=((6, "kills"),))
    report = fail_task(task, "no luck", store)
    assert (report.failed, report.reasons) == (2, {"no luck": 1, "kills": 1})
    assert files(store.uri) == before
    report = fail_task(Task("/pictures", "f", task.segment, skip=((6, "kills"),)), "no luck", store)
    assert (report.failed, report.reasons) == (11, {"no luck": 10, "kills": 1})
    assert [failure.reason for failure in store.failures()] == ["no luck"] * 6 + ["kills"] + ["no luck"] * 4


def test_trying_writes_nothing_and_fails_as_labelling_does(labeler, store, monkeypatch):
    segment, before = store.segments("pictures")[0], files(store.uri)
    batches = company(labeler, monkeypatch)
    try_segment(Pictures(broken={3: "no picture"}), segment, labeler)
    assert batches == [[0, 2, 4], [1, 5], [6], [7, 9], [8], [10]]
    with pytest.raises(AssertionError, match="the process is gone"):
        try_segment(Pictures(deadly=[9]), segment, labeler)
    assert files(store.uri) == before


def test_pictures_are_let_go_with_the_commit(labeler, store):
    seen = []

    def frames():
        for frame in Pictures().read(0, len(SIZES)):
            seen.append(weakref.ref(frame))
            yield frame

    gc.disable()  # whose turn may come only many segments later
    try:
        done = label_frames(frames(), store.segments("pictures")[0], labeler, store, rounded=False)
        assert any(frame() for frame in seen), "the last batch is still under way"
        done.commit()
        assert not any(frame() for frame in seen)
    finally:
        gc.enable()


@pytest.fixture(params=[0, 1], ids=["depth", "normals"])
def void(request, labeler):
    """A labeler whose answers are NaN."""
    torch.nn.init.constant_(labeler._network.folded.last[request.param][-1].bias, torch.nan)
    return labeler


def test_answers_that_are_all_no_numbers_are_not_committed(void, store):
    segment = store.segments("pictures")[0]
    with pytest.raises(VoidError, match=r"no number for any picture.*device.*--dtype"):
        run(Pictures(), store, void)
    assert store.pending("pictures") == [segment]
    with pytest.raises(VoidError, match="no number for any picture"):
        try_segment(Pictures(), segment, void)


def test_nor_is_that_of_a_segment_of_one(void, store):
    alone = Source("alone", "alone.png", "images", 1, 24, 32, None, "f", keys=("alone.png",))
    store.add(alone)
    (segment,) = store.segments("alone")
    frame = Frame(0, np.zeros((24, 32, 3), np.uint8))
    with pytest.raises(VoidError, match="no number for any picture"):
        label_frames([frame], segment, void, store, rounded=False).commit()
    assert store.pending("alone") == [segment]
    with pytest.raises(VoidError, match="no number for any picture"):
        try_segment(Pictures(), Segment("pictures", 3, 4), void)


def test_an_answer_that_is_no_number_is_a_failure_and_no_label(labeler, store, monkeypatch):
    submit = labeler.submit

    def some(images, keys, **options):
        answer = submit(images, keys, **options)
        for key, labels in zip(keys, answer._staged, strict=True):
            if key in ("pictures/3", "pictures/8"):
                labels.labels["depth"].fill_(DEPTH_INVALID)
        return answer

    monkeypatch.setattr(labeler, "submit", some)
    assert try_segment(Pictures(), store.segments("pictures")[0], labeler) == 9
    report = run(Pictures(), store, labeler)
    assert (report.labelled, report.failed) == (9, 2)
    assert [failure.frame for failure in store.failures() if "no number" in failure.reason] == [3, 8]


def test_a_picture_whose_answer_is_no_number_fails_where_it_is_the_only_one(void, store):
    source = Pictures(broken=dict.fromkeys(range(1, 11), "gone"))
    assert try_segment(source, store.segments("pictures")[0], void) == 0
    report = run(source, store, void)
    assert (report.labelled, report.failed) == (0, 11)
    assert "no number" in store.failures()[0].reason


def test_frames_whose_answers_are_no_numbers_again_stay_failed(labeler, store):
    run(Pictures(broken={1: "gone", 6: "gone"}), store, labeler)
    torch.nn.init.constant_(labeler._network.folded.last[0][-1].bias, torch.nan)
    assert run(Pictures(), store, labeler, only=[1, 6]).failed == 2
