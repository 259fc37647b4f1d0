from pathlib import Path

import pytest

import depthmill
from depthmill.pipeline.config import LabelConfig, SmoothConfig, load_config
from depthmill.pipeline.errors import ConfigError

CONFIGS = Path(depthmill.__file__).parent / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!t]*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_labelling_config_loads(path):
    assert load_config(LabelConfig, path, {}) == load_config(LabelConfig, path.stem, {})
    assert "# Launch:" in path.read_text()


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("batch_size: 3\nworkers: 5\n")
    config = load_config(LabelConfig, path, {"batch_size": 4, "workers": None, "labels": ("depth",)})
    assert (config.batch_size, config.workers, config.labels) == (4, 5, ("depth",))


@pytest.mark.parametrize("name", ["video", "images"])
def test_another_checkpoint_does_not_go_with_the_file_s_own_normals(name):
    assert load_config(LabelConfig, name, {"batch_size": 4}).normals_checkpoint == "GonzaloMG/marigold-e2e-ft-normals"
    assert load_config(LabelConfig, name, {"checkpoint": "a/b"}).normals_checkpoint is None
    both = {"checkpoint": "a/b", "normals_checkpoint": "c/d"}
    assert load_config(LabelConfig, name, both).checkpoints == {"depth": "a/b", "normals": "c/d"}


def test_labels_come_in_one_order_however_they_are_given():
    assert LabelConfig(labels=("normals", "depth")) == LabelConfig(labels=("depth", "normals"))


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (64, 2048)),
        ({"shard_frames": 10}, (70, 2050)),
        ({"shard_frames": 100}, (100, 2100)),
        ({"segment_frames": 256}, (256, None)),
    ],
)
def test_segments_left_out_are_long_for_a_corpus_and_of_whole_shards(options, lengths):
    config = LabelConfig(**options)
    assert config.segment_lengths == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "batchsize"),
        ("batch_size: many", "batch_size"),
        ("batch_size: 0", "batch_size"),
        ("labels: [depth, depth]", "each once"),
        ("labels: [flow]", "labels"),
        ("segment_frames: 30\nshard_frames: 16", "multiple of shard_frames"),
        ("domain: underwater", "domain"),
        ("ensemble: 10", "noise zeros.*--noise gaussian"),
        ("noise: white", "noise"),
        ("timestep_spacing: linspace", "timestep_spacing"),
        ("- 1", "key: value"),
        ("a: [", "YAML"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(LabelConfig, path, {})


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"device: caf\xe9")
    with pytest.raises(ConfigError, match=r"a\.yaml cannot be read \(it is no UTF-8\)"):
        load_config(LabelConfig, tmp_path / "a.yaml", {})


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_on_and_off_need_no_quotes(tmp_path, word):
    (tmp_path / "a.yaml").write_text(f"compile: {word}")
    assert load_config(LabelConfig, tmp_path / "a.yaml", {}).compile == word


def test_a_missing_file_says_which_names_ship(tmp_path):
    with pytest.raises(ConfigError, match="video"):
        load_config(LabelConfig, tmp_path / "none.yaml", {})


@pytest.mark.parametrize("model", [LabelConfig, SmoothConfig])
def test_the_cluster_of_the_environment_is_one_whose_address_is_given(monkeypatch, model):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert model().address == "head:6379"
    assert load_config(model, None, {"address": "auto"}).address == "auto"
    monkeypatch.delenv("RAY_ADDRESS")
    assert model().address is None


@pytest.mark.parametrize("leak", [-0.1, 1e-4, 4, float("inf"), float("nan")])
def test_a_leak_that_makes_no_sense_is_refused(leak):
    with pytest.raises(ConfigError, match="leak"):
        load_config(SmoothConfig, None, {"leak": leak})


def test_the_demo_answers_normals_by_itself():
    assert LabelConfig().checkpoints == {"depth": "demo", "normals": "demo"}
    assert LabelConfig(checkpoint="a/b", labels=("depth",)).checkpoints == {"depth": "a/b"}
