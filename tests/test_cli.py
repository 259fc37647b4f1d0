"""The command line's own part: options, exit statuses, messages. What the commands do is tested where they live."""

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import depthmill.workers
from depthmill.cli import _label_config, app
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.tests import media, runs
from depthmill.tests.pipeline.store.samples import files


def depthmill_cli(*arguments):
    """The command line as a process of its own."""
    command = [sys.executable, "-m", "depthmill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def label(cli, checkpoints, loaded_once):
    """`depthmill label` inside this process, with random weights."""
    return lambda inputs, store, *options: cli(
        *runs.command(inputs, store, checkpoints, "--workers", "0", *options)[3:]
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media.write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=5)


def test_version_and_help(cli):
    assert depthmill_cli("--version").stdout.strip() == depthmill.__version__
    shown = depthmill_cli("--help").stdout
    for command in ("label", "smooth", "preview", "verify", "inspect", "train", "evaluate", "bench"):
        assert command in shown
        assert cli(command, "--help").returncode == 0


def test_every_option_of_the_config_has_a_flag(cli):
    from depthmill.pipeline.config import LabelConfig

    shown = cli("label", "--help").stdout
    for name in LabelConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


def test_help_shows_choices_and_defaults(cli, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    shown = {name: cli(name, "--help").stdout for name in ("label", "smooth", "evaluate", "bench", "train")}
    for words in ("depth,normals", "134217728", "demo", "trailing"):
        assert f"[default: ({words})]" in shown["label"]
    for words in ("auto, float32, bfloat16, float16", "indoor, outdoor, object"):
        assert f"One of {words}." in shown["label"]
    assert "auto, cpu, cuda, xpu or mps; with --workers 0 also cuda:1." in shown["label"]
    for words in ("32", "60.0"):
        assert f"[default: ({words})]" in shown["smooth"]
    assert "[default: (auto)]" in shown["bench"]
    for option in ("--dtype", "--device"):  # the first has a default of its own
        (line,) = (line for line in shown["evaluate"].splitlines() if option in line)
        assert ("[default: (auto)]" in line) == (option == "--device")
    assert "(auto)" not in shown["train"]


def test_the_terminal_alone_breaks_the_lines_of_the_help():
    for command in app.registered_commands:  # of all paragraphs but the first, breaks are kept
        assert not [part for part in inspect.getdoc(command.callback).split("\n\n")[1:] if "\n" in part]


def test_labelling_with_the_embedded_model_unasked_is_said(cli, clip, tmp_path):
    def said(*options):
        done = cli("label", tmp_path / "missing.mp4", tmp_path / "out.zarr", "--workers", "0", *options)
        assert done.returncode == 2
        return "embedded demo model is used, a toy" in done.stderr

    config = tmp_path / "a.yaml"
    config.write_text("checkpoint: demo\n")
    assert said()
    assert said("--labels", "normals")
    assert not said("--checkpoint", "demo")
    assert not said("--config", config)
    assert not said("--labels", "normals", "--normals-checkpoint", "demo")


@pytest.mark.parametrize(("no_color", "colour"), [("", "yellow"), ("1", None)])
def test_no_color_is_heeded(monkeypatch, no_color, colour):
    used = []
    monkeypatch.setattr("typer.secho", lambda text, fg, err: used.append(fg))
    monkeypatch.setenv("NO_COLOR", no_color)
    _label_config(None, {})
    assert used == [colour]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-such-option"], "no-such-option"),
        (["--batch-size", "0"], "batch_size"),
        (["--labels", "depth,flow"], "labels"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--checkpoint", "nowhere", "--labels", "depth"], "nowhere"),
        (["--domain", "outdoor"], "GeoWizard"),
        (["--device", "quantum"], "quantum"),
        (["--address", "127.0.0.1:1", "--workers", "1"], "127.0.0.1:1"),
        (["--steps", "1001"], "steps is 1001"),
        (["--frame-limit-s", "inf"], "frame_limit_s"),
        (["--checkpoint", "", "--labels", "depth"], "'' is no directory"),
    ],
)
def test_what_cannot_start_exits_with_2_and_says_why(cli, clip, tmp_path, arguments, message):
    done = cli("label", clip, tmp_path / "out.zarr", "--workers", "0", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.zarr").exists()


def test_the_cluster_of_the_environment_is_used_by_workers_alone(label, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    done = label([clip], tmp_path / "out.zarr", "--workers", "1")
    assert done.returncode == 2
    assert "no Ray cluster at 127.0.0.1:1" in done.stderr
    assert not (tmp_path / "out.zarr").exists()
    done = label([clip], tmp_path / "out.zarr", "--smooth")
    assert done.returncode == 0, done.stderr


def test_normals_alone_cannot_be_smoothed_and_are_not_labelled_first(label, clip, tmp_path):
    done = label([clip], tmp_path / "out.zarr", "--labels", "normals", "--smooth")
    assert done.returncode == 2
    assert "--labels depth,normals" in done.stderr
    assert not (tmp_path / "out.zarr").exists()


def test_only_a_run_s_own_videos_are_smoothed_with_it(cli, label, clip, tmp_path):
    store, more = tmp_path / "out.zarr", media.write_video(tmp_path / "more.mp4", frames=5)
    assert label([clip], store).returncode == 0
    assert cli("smooth", store, "--workers", "0", "--filter", "--leak", "0.3").returncode == 0
    before = {name: data for name, data in files(store).items() if name.startswith("clip-")}
    done = label([more], store, "--smooth")
    assert done.returncode == 0, done.stderr
    assert "1 source smoothed" in done.stdout
    assert "smoothed in" not in label([clip], store, "--smooth").stdout, "with other options, which were meant"
    assert {name: data for name, data in files(store).items() if name.startswith("clip-")} == before
    shutil.rmtree(next(store.glob("more-*")) / "status" / "c")
    assert label([clip], store, "--smooth").returncode == 0, "another's pending segments do not count"


def test_a_run_that_cannot_start_keeps_the_store_that_it_was_to_replace(
    label, clip, tmp_path, checkpoints, monkeypatch
):
    def fail(cpus):
        raise RuntimeError("no room for it")

    monkeypatch.setattr("depthmill.workers.cluster._start", fail)
    store = tmp_path / "out.zarr"
    assert label([clip], store).returncode == 0
    before = files(store)
    cut = shutil.copytree(checkpoints, tmp_path / "cut")
    weights = cut / "depth" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for options, reason in (
        (("--steps", "1001"), "steps is 1001"),
        (("--checkpoint", cut / "depth"), "unet/diffusion_pytorch_model.safetensors cannot be read"),
        (("--workers", "1"), "Ray did not start on this machine (RuntimeError: no room for it)"),
    ):
        done = label([clip], store, *options, "--overwrite")
        assert done.returncode == 2, done.stderr
        assert reason in done.stderr
        assert files(store) == before


def test_an_empty_store_is_not_the_current_folder(cli, label, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for done in (label([clip], ""), cli("inspect", "")):
        assert done.returncode == 2
        assert "empty, as a variable is" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_before_the_work(cli, label, clip, tmp_path):
    store, train = tmp_path / "out.zarr", tmp_path / "train.yaml"
    label([clip], store)
    train.write_text("{start: demo, sets: [{kind: scenes, scenes: 100}]}")
    for arguments in (
        ("train", train, "--out", clip),
        ("bench", "--input", clip, "--folder", clip),
        ("preview", store, "--out", clip),
    ):
        done = cli(*arguments)
        assert done.returncode == 2, arguments
        assert f"{clip} cannot be written (it is a file)" in done.stderr, arguments


def test_exit_statuses_of_runs(label, clip, tmp_path):
    store = tmp_path / "out.zarr"
    assert label([clip], store).returncode == 0
    some = label([clip, tmp_path / "missing.mp4"], store)
    assert some.returncode == 1
    assert "missing.mp4" in some.stdout
    assert "5 of 5 frames of 1 source labelled in" in some.stdout
    assert "1 failure, listed in" in some.stdout
    assert label([tmp_path / "missing.mp4"], store).returncode == 2


def test_names_that_are_no_utf_8_or_hold_line_separators(cli, label, clip, tmp_path):
    broken = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.mp4", "two\u2028lines.mp4".encode())]
    for path in broken:
        path.write_bytes(b"no video")
    good = shutil.copy(clip, tmp_path / os.fsdecode(b"gar\xe7on.mp4"))
    store = tmp_path / "out.zarr"
    done = label([*broken, good], store)
    assert done.returncode == 1, done.stderr
    assert "caf\\xe9.mp4" in done.stdout
    listed = [json.loads(line) for line in (store / "failures.jsonl").read_bytes().splitlines()]
    assert {os.fsencode(failure["uri"]) for failure in listed} == set(map(os.fsencode, broken))
    assert (store / "run.json").exists()
    assert "gar\\udce7on.mp4" in cli("inspect", store).stdout
    shown = json.loads(cli("inspect", store, "--json").stdout)
    assert sum(shown["unopened"].values()) == 2
    assert cli("smooth", store, "--workers", 0).returncode == 0, "the source is found again by its name"


def test_an_error_that_was_not_foreseen_is_no_failed_frame(cli, tmp_path, monkeypatch):
    def broken(uri):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("depthmill.pipeline.store.open_store", broken)
    done = cli("inspect", tmp_path)
    assert done.returncode == 70
    assert "RuntimeError: unforeseen" in done.stderr


@pytest.mark.parametrize(("given", "kept"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_the_network_s_threads_wait_asleep_unless_told_otherwise(monkeypatch, given, kept):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    importlib.reload(depthmill.workers)
    assert os.environ["OMP_WAIT_POLICY"] == kept


def test_a_set_of_clips_without_video(cli, tmp_path):
    for name in ("rendered", "bonn"):
        done = cli("evaluate", name, tmp_path)
        assert done.returncode == 2
        assert "add --video" in done.stderr


def test_the_store_argument_that_was_forgotten(cli, label, clip):
    alone = cli("label", clip)
    assert alone.returncode == 2
    assert "expected INPUT... STORE" in alone.stderr
    done = label([clip], clip)
    assert done.returncode == 2
    assert clip.stat().st_size > 0


def test_flags_win_over_the_file(label, clip, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("labels: [depth, normals]\nbatch_size: 7\nattempts: 5\n")
    store = tmp_path / "out.zarr"
    done = label([clip], store, "--config", str(config), "--labels", "depth")
    assert done.returncode == 0, done.stderr
    used = json.loads((store / "run.json").read_text())["config"]
    assert (used["labels"], used["batch_size"], used["attempts"]) == (["depth"], 2, 5)


def test_preview_names_what_it_drew_in_a_folder_of_its_own(cli, label, clip, tmp_path):
    store = tmp_path / "out.zarr"
    label([clip], store)
    done = cli("preview", store)
    assert done.returncode == 0, done.stderr
    drawn = [Path(line) for line in done.stdout.splitlines()]
    assert sorted(path.suffix for path in drawn) == [".mp4", ".png"]
    assert {path.parent for path in drawn} == {tmp_path / "out-preview"}  # not beside the store: inputs may lie there
    (store / drawn[0].name.split(".")[0] / "depth" / "c" / "0" / "0" / "0").write_bytes(b"")
    assert cli("preview", store).returncode == 1


def test_previews_are_no_inputs(cli, label, clip, tmp_path):
    folder, store = tmp_path / "va", tmp_path / "va" / "out.zarr"
    media.write_image_folder(folder / "photos", count=2)
    shutil.copy(clip, folder)
    inputs = [folder, f"{folder}/**/*.mp4", f"{folder}/*/*.png"]
    before = list(expand_inputs([str(one) for one in inputs]))
    assert label([folder], store).returncode == 0
    sources = json.loads(cli("inspect", store, "--json").stdout)["sources"]
    for options in ([], ["--out", folder / "photos"], ["--source", sources[1]["id"], "--out", folder / "photos/more"]):
        assert cli("preview", store, *options).returncode == 0
    assert list(expand_inputs([str(one) for one in inputs])) == before
    done = label([folder], store)  # which refuses a folder that changed
    assert done.returncode == 0, done.stdout
    assert json.loads(cli("inspect", store, "--json").stdout)["sources"] == sources


def readmes_code(part):
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if part in block)
    return code


def test_the_readme_reads_a_picture_as_a_run_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.linear_gradient("L").resize((32, 16)).save("photo.jpg", exif=exif)
    code = readmes_code("photo.jpg")
    exec(code[: code.index("depth, normals =")], names := {})
    with closing(open_source("photo.jpg")) as source:
        (frame,) = source.read(0, 1)
    assert (names["frames"] == frame.image).all()


def test_the_readmes_data_set_reads_a_store(label, clip, tmp_path):
    from torch.utils.data import DataLoader

    assert label([clip], tmp_path / "out.zarr").returncode == 0
    exec(readmes_code("class Labels"), names := {})
    depth, normals = next(iter(DataLoader(names["Labels"](tmp_path / "out.zarr"), batch_size=5)))
    assert normals.shape == (*depth.shape, 3)
    assert depth.shape[0] == 5


def test_verify_and_inspect(cli, label, clip, tmp_path):
    store = tmp_path / "out.zarr"
    label([clip], store)
    shown = json.loads(cli("inspect", store, "--json").stdout)
    assert shown["labelled"] == shown["frames"] > 0
    assert shown["identity"]["checkpoints"]["depth"]["sha256"] in cli("inspect", store).stdout
    sound = cli("verify", store)
    assert (sound.returncode, "sources: 1, " in sound.stdout, "damaged: 0" in sound.stdout) == (0, True, True)
    shard = next(store.glob("*/depth/c/0/0/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = cli("verify", store, "--repair")
    assert done.returncode == 1
    assert "depth/c/0/0/0 (frames 0 to" in done.stdout
    assert "; repaired" in done.stdout
    assert cli("verify", store).returncode == 0
    assert json.loads(cli("inspect", store, "--json").stdout)["pending"] > 0
    assert label([clip], store).returncode == 0
    assert json.loads(cli("inspect", store, "--json").stdout)["pending"] == 0
    assert cli("verify", tmp_path / "nothing").returncode == 2


def test_bench_prints_what_to_change(cli, checkpoints, clip, monkeypatch):
    monkeypatch.setattr("depthmill.pipeline.bench.flops._MATRIX", {"cpu": 256})
    names = ["--checkpoint", checkpoints / "depth", "--normals-checkpoint", checkpoints / "normals"]
    done = cli(
        "bench", *names, "--input", clip, "--frames", "3", "--rounds", "1", "--batch-size", "2", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert "-bound; what helps:" in done.stdout
    done = cli("bench", "--checkpoint", "nowhere", "--batch-size", "auto")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
