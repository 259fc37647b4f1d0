"""Ray with several machines on this one, of which nothing lasts: whatever goes, the run ends and the store is whole."""

import os
import random
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from depthmill.tests import media, runs
from depthmill.tests.workers import faults

OPTIONS = ("--workers", "3", "--attempts", "2", "--frame-limit-s", "0.4")
VIDEO, PICTURES = 40, 10


@pytest.fixture(scope="module", params=[pytest.param(True, marks=pytest.mark.slow), False], ids=["hang", "no-hang"])
def inputs(request, tmp_path_factory):
    """A video and a folder of pictures: one is broken, one crashes its reader and, maybe, one never comes back."""
    root = tmp_path_factory.mktemp("inputs")
    media.write_image_folder(root / "photos", count=PICTURES, sizes=[(40, 60)])
    (root / "photos" / "002.png").write_bytes(b"broken")
    (root / "photos" / "004.png").rename(root / "photos" / "004-crash.png")
    if request.param:
        (root / "photos" / "007.png").rename(root / "photos" / "007-hang.png")
    (root / "nothing.mp4").write_bytes(b"no video")
    return [media.write_video(root / "clip.mp4", frames=VIDEO), root / "photos", root / "nothing.mp4"]


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    faults.install(tmp_path / "faults", monkeypatch)
    # With its tokens on, Ray lets no second driver into a cluster that this process started.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """Filled by the first test that needs it: the run needs the faults installed."""
    return {}


def expected_contents(undisturbed, inputs, checkpoints, tmp_path):
    """The store of a run that nobody disturbed, on an ordinary local Ray."""
    if not undisturbed:
        done = runs.run(inputs, tmp_path / "quiet.zarr", checkpoints, *OPTIONS)
        assert done.returncode == 1, done.stderr
        bad = [name for name in ("002", "crash", "hang") if any((inputs[1]).glob(f"*{name}*"))]
        assert f"{VIDEO + PICTURES - len(bad)} of {VIDEO + PICTURES} frames" in done.stdout, done.stdout
        undisturbed.update(runs.contents(tmp_path / "quiet.zarr"))
    return undisturbed


class Machines:
    """A cluster whose head runs nothing, and machines of one CPU each."""

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=1), self.cluster.add_node(num_cpus=1)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cluster.shutdown()

    def swap_one(self, chance):
        """A new machine comes, and an old one goes."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))
        self.cluster.remove_node(self.nodes.pop(chance.randrange(len(self.nodes) - 1)), allow_graceful=False)

    def kill_a_worker(self, chance):
        ours = [one for one in psutil.Process().children(recursive=True) if runs.is_worker(one)]
        if ours:
            runs.kill([chance.choice(ours)])


def disturb(inputs, store, checkpoints, chance, events, log):
    """One round: a run, disturbed, started again where it was killed; returns its exit status."""
    with Machines() as machines:
        options = ("--address", machines.cluster.address, *OPTIONS)
        process = runs.start(inputs, store, checkpoints, *options, log=log)
        for event in events:
            until = time.monotonic() + chance.uniform(2, 8)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is not None:
                break
            if event == "node":
                machines.swap_one(chance)
            elif event == "worker":
                machines.kill_a_worker(chance)
            else:
                process.kill()
                process.wait(30)
                process = runs.start(inputs, store, checkpoints, *options, log=log)
        return process.wait(240)


def check(undisturbed, inputs, checkpoints, tmp_path, events, seed):
    expected = expected_contents(undisturbed, inputs, checkpoints, tmp_path)
    chance = random.Random(seed)
    with (tmp_path / "log").open("w+") as log:
        status = disturb(inputs, tmp_path / "labels.zarr", checkpoints, chance, events, log)
        log.seek(0)
        assert status == 1, log.read()
    found = runs.contents(tmp_path / "labels.zarr")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_machine_a_worker_and_the_driver_go(faulty, undisturbed, inputs, checkpoints, tmp_path):
    check(undisturbed, inputs, checkpoints, tmp_path, ["worker", "node", "driver"], seed=os.getpid())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(10))
def test_chaos(faulty, undisturbed, inputs, checkpoints, tmp_path, seed):
    chance = random.Random(seed)
    events = [chance.choice(["worker", "node", "driver"]) for _ in range(chance.randint(3, 7))]
    check(undisturbed, inputs, checkpoints, tmp_path, events, seed)
