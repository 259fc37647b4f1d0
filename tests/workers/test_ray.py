"""Real runs on real Ray workers, and real kills."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from depthmill.cli import app
from depthmill.tests import media, runs

FRAMES = 72  # 36 segments of two frames


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, checkpoints):
    """Inputs, and the files of a store that was made of them in this process, in one go."""
    root = tmp_path_factory.mktemp("undisturbed")
    inputs = [media.write_video(root / "clip.mp4", frames=FRAMES - 6), root / "photos"]
    media.write_image_folder(root / "photos", count=6, sizes=[(40, 60), (60, 40)])
    (root / "photos" / "002.png").write_bytes(b"broken")
    done = CliRunner().invoke(app, runs.command(inputs, root / "labels.zarr", checkpoints, "--workers", "0")[3:])
    assert done.exit_code == 1, done.output  # one picture is broken
    return inputs, runs.contents(root / "labels.zarr")


@pytest.mark.slow  # the run that goes on after a stop, below, is one
def test_two_workers_write_the_bytes_of_none(undisturbed, tmp_path, checkpoints):
    inputs, expected = undisturbed
    done = runs.run(inputs, tmp_path / "labels.zarr", checkpoints, "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert runs.contents(tmp_path / "labels.zarr") == expected
    assert f"{FRAMES - 1} of {FRAMES} frames" in done.stdout
    assert "failures.jsonl" in done.stdout


@pytest.mark.slow
def test_two_workers_sample_the_bytes_of_none(undisturbed, tmp_path, checkpoints):
    inputs, _ = undisturbed
    sampled = ("--steps", "2", "--noise", "gaussian", "--ensemble", "3")
    for workers in ("0", "2"):
        done = runs.run(inputs, tmp_path / workers, checkpoints, "--workers", workers, *sampled)
        assert done.returncode == 1, done.stderr
    assert runs.contents(tmp_path / "2") == runs.contents(tmp_path / "0")
    assert any("/uncertainty/c/" in path for path in runs.contents(tmp_path / "2"))


@pytest.mark.slow  # test_chaos.py kills as much, and machines besides
def test_killed_at_random_moments_and_run_again(undisturbed, tmp_path, checkpoints):
    """SIGKILL to a worker, the driver, and everything; each after a random number of commits and a random while."""
    inputs, expected = undisturbed
    store, moments = tmp_path / "labels.zarr", random.Random(time.time_ns())
    with (tmp_path / "log").open("w+") as log:
        for victim in ("worker", "driver", "everything"):
            before = runs.commits(store)
            process = runs.start(inputs, store, checkpoints, "--workers", "2", log=log)
            runs.wait_for_commits(store, before + moments.randint(1, 4), process)
            time.sleep(moments.uniform(0, 0.1))
            family = runs.family(process)
            workers = [one for one in family if runs.is_worker(one)]
            if victim == "worker":
                assert workers
                runs.kill([moments.choice(workers)])
                # The run goes on: a replacement finishes what the dead worker had begun. Let it commit a little more.
                runs.wait_for_commits(store, runs.commits(store) + 3, process)
                family = runs.family(process)
            runs.kill(family[:1] if victim == "driver" else family)
            process.wait(30)
            runs.kill([one for one in family if one.is_running()])
            log.seek(0)
            assert 0 < runs.commits(store) < len(expected), log.read()
        kept = runs.commits(store)
        done = runs.run(inputs, store, checkpoints, "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert runs.contents(store) == expected
    (committed,) = re.findall(r"(\d+) done in this run", done.stdout)
    assert int(committed) == FRAMES - 2 * kept, "what was committed is not done again"


@pytest.mark.slow  # the test above kills workers too
def test_a_killed_worker_is_replaced_within_the_run(undisturbed, tmp_path, checkpoints):
    inputs, expected = undisturbed
    store = tmp_path / "labels.zarr"
    with (tmp_path / "log").open("w+") as log:
        process = runs.start(inputs, store, checkpoints, "--workers", "1", log=log)
        runs.wait_for_commits(store, 2, process)
        runs.kill([one for one in runs.family(process) if runs.is_worker(one)])
        assert process.wait(120) == 1
    assert runs.contents(store) == expected


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["ctrl-c", "sigterm"]
)
def test_a_stop_keeps_what_is_committed_and_says_how_to_go_on(undisturbed, tmp_path, checkpoints, number):
    inputs, expected = undisturbed
    store = tmp_path / "labels.zarr"
    with (tmp_path / "log").open("w+") as log:
        process = runs.start(inputs, store, checkpoints, "--workers", "1", log=log)
        runs.wait_for_commits(store, 3, process)
        process.send_signal(number)
        assert process.wait(60) == 130
        log.seek(0)
        said = log.read()
    assert "frames are committed" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert runs.commits(store) >= 3
    done = runs.run(inputs, store, checkpoints, "--workers", "2")
    assert done.returncode == 1, done.stderr
    assert runs.contents(store) == expected
    assert f"{FRAMES - 1} of {FRAMES} frames" in done.stdout
    assert "failures.jsonl" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_run_ends_with_the_cluster_that_it_started(undisturbed, tmp_path, checkpoints, name):
    inputs, expected = undisturbed
    store = tmp_path / "labels.zarr"
    with (tmp_path / "log").open("w+") as log:
        process = runs.start(inputs, store, checkpoints, log=log)
        runs.wait_for_commits(store, 2, process)
        family = {one: runs.name(one) for one in runs.family(process)}
        runs.kill([one for one in family if family[one] == name])
        try:
            assert process.wait(60) == 130  # Ray would end it by itself, with another status
            # Ray's agents wait for the GCS for a minute themselves, then end.
            _, left = psutil.wait_procs([one for one in family if not family[one].endswith("Agent")], timeout=20)
        finally:
            runs.kill([one for one in family if one.is_running()])
        assert not left
        log.seek(0)
        said = log.read()
    assert f"Ray's {name} on this machine has ended" in said
    assert "Traceback" not in said
    assert runs.commits(store) >= 2
    done = runs.run(inputs, store, checkpoints, "--workers", "1")
    assert done.returncode == 1, done.stderr
    assert runs.contents(store) == expected


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_ends_the_run_with_its_reason(undisturbed, tmp_path, checkpoints):
    bad = shutil.copytree(checkpoints, tmp_path / "bad")
    path = bad / "depth" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]  # which is not known before a worker loads it
    save_file(weights, path)
    done = runs.run(undisturbed[0], tmp_path / "labels.zarr", bad, "--workers", "1")
    assert done.returncode == 2
    assert "unet/ does not fit" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_existing_cluster_is_used_and_left_running(undisturbed, tmp_path, checkpoints, monkeypatch):
    # With its tokens on, Ray lets no second driver into a cluster that `ray.init` started.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    inputs, expected = undisturbed
    script = (
        "import ray, sys; ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False); "
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.readline(); "
        "print(ray.cluster_resources()['CPU'], flush=True)"
    )
    cluster = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        address = cluster.stdout.readline().strip()
        done = runs.run(inputs, tmp_path / "labels.zarr", checkpoints, "--address", address, "--workers", "1")
        assert done.returncode == 1, done.stderr
        assert runs.contents(tmp_path / "labels.zarr") == expected
        assert cluster.communicate("\n", timeout=60)[0].strip() == "2.0"
    finally:
        runs.kill(runs.family(cluster))
        cluster.wait(30)
