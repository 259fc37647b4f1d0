from pathlib import Path

import pytest
from pydantic import BaseModel, Field

import depthmill
from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.config_files import load_config, load_yaml, validated
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


def test_checkpoints_may_be_in_a_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = LabelConfig(checkpoint="~/a", normals_checkpoint="~/b")
    assert config.checkpoints == {"depth": "/home/somebody/a", "normals": "/home/somebody/b"}
    assert LabelConfig(checkpoint="~nosuchuser/a").checkpoint == "~nosuchuser/a"


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
        ({"device": "cpu"}, (64, None)),
        ({"noise": "gaussian", "steps": 4}, (64, 512)),
        ({"noise": "gaussian", "steps": 4, "ensemble": 10}, (64, None)),
    ],
)
def test_segments_left_out_are_long_for_a_corpus_and_of_whole_shards(options, lengths):
    config = LabelConfig(**options)
    assert config.segment_lengths == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", r"\n  batchsize: no such key; did you mean batch_size\?$"),
        ("flavour: 3", r"\n  flavour: no such key\n  expected some of: checkpoint, .*, seed$"),
        ("retry_failed: true", r"\n  retry_failed: no key, only an option of depthmill label: --retry-failed$"),
        ("batch_size: many", r":\n  batch_size: expected auto, or a number of frames, 1 or more \(got 'many'\)$"),
        ("batch_size: 0", "batch_size"),
        ("batch_size: true", "batch_size.*got True"),
        ("attempts: true", "attempts.*integer.*got True"),
        ("threads: true", "threads.*integer.*got True"),
        ("processing_resolution: 76800", "processing_resolution.*less than or equal to 16384.*got 76800"),
        ("device: tpu", "device: expected auto, cpu, cuda, xpu or mps"),
        ("seed: 1\nsteps: 2\nseed: 3", r"the key seed is there twice[\s\S]*line 3"),
        ("checkpoint: 2026-13-01", "no YAML that can be used: month must be in"),
        ("[]", "type list; expected"),
        ("false", "type bool; expected"),
        ("0", "type int; expected"),
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


@pytest.mark.parametrize("text", ["", "# nothing", "---"])
def test_an_empty_file_is_the_defaults(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert load_config(LabelConfig, tmp_path / "a.yaml", {}) == LabelConfig()


def test_a_part_that_cannot_be_used_does_not_make_its_whole_too_short():
    class Parts(BaseModel):
        sizes: tuple[int, ...] = Field(min_length=1)

    with pytest.raises(ConfigError, match=r":\n  sizes\.0: .*\(got 'x'\)$"):
        validated(Parts, {"sizes": ["x"]}, where="the test")
    with pytest.raises(ConfigError, match=r"sizes: .*at least 1"):
        validated(Parts, {"sizes": []}, where="the test")


@pytest.mark.parametrize(
    ("path", "model", "message"),
    [
        ("vidoe", LabelConfig, r"names that ship: demo, images, video\. Did you mean video\?$"),
        ("vidoe", SmoothConfig, r"give the path of a YAML file$"),
        ("video", SmoothConfig, r"for another command\); give the path of a YAML file$"),
        ("train-demo", LabelConfig, r"for another command\); .*: demo, images, video"),
        ("video", None, r"for another command\); .*: train-demo, train-marigold-depth, "),
    ],
)
def test_the_names_that_ship_are_those_that_a_command_can_use(path, model, message):
    with pytest.raises(ConfigError, match=message):
        load_yaml(path, model)


def test_a_file_may_have_the_name_of_one_that_ships_for_another_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("video").write_text("flow: medium")
    assert load_config(SmoothConfig, "video", {}).flow == "medium"


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
