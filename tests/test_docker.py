"""The cluster kit: what it says is what the package, the command line and Ray know."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml
from docker.utils.build import exclude_paths

from depthmill.cli import app
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.config_files import load_config

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "docker"
DOCKERFILE = (KIT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((KIT / "compose.yaml").read_text(encoding="utf-8"))
RAYJOB = yaml.safe_load((KIT / "rayjob.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """What `docker build` sends: the checkout without what .dockerignore leaves out."""
    folder = tmp_path_factory.mktemp("image") / "src"
    for name in exclude_paths(ROOT, (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def test_the_build_context_is_the_package_and_no_more(context):
    assert sum(path.stat().st_size for path in context.rglob("*") if path.is_file()) < 40e6
    assert {path.name for path in context.iterdir()}.isdisjoint({"tests", "benchmarks", "demo", "docker", ".git"})
    assert not list(context.rglob("__pycache__"))
    weights = {path.relative_to(context).parts[:3] for path in context.rglob("*.safetensors")}
    assert weights == {("pipeline", "model", "demo")}


def test_the_steps_of_the_image_give_a_command_line(context, tmp_path):
    """Those of the Dockerfile, but for the dependencies: the new environment borrows this one's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, context]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def say(*command):
        return subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=clean, check=True, capture_output=True, text=True
        ).stdout

    assert say(venv / "bin" / "depthmill", "--version").strip() == PROJECT["version"]
    assert (site / "depthmill" / "__main__.py").is_file(), "for python -m depthmill, on clusters"
    assert "STORE" in say(venv / "bin" / "depthmill", "label", "--help")
    assert (site / f"depthmill-{PROJECT['version']}.dist-info" / "licenses" / "LICENSE").is_file()
    where = "import depthmill; from importlib.resources import files; print(files('depthmill.configs') / 'video.yaml')"
    shipped = Path(say(python, "-c", where).strip())
    assert shipped.is_relative_to(venv)
    assert shipped.is_file()


def test_the_image_has_every_extra_that_labelling_can_need():
    assert set(re.findall(r"--extra (\w+)", DOCKERFILE)) == set(PROJECT["optional-dependencies"]) - {"train", "dev"}


def test_the_image_has_what_torch_compiles_with():
    packages = re.search(r"apt-get install ([^&]+)", DOCKERFILE)[1].split()
    assert {"g++", "python3-dev"} <= set(packages)  # gcc and the C library's headers come with g++


def test_the_image_runs_as_a_user_by_number_and_fetches_no_weights():
    instructions = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()
    (user,) = (line.split()[1] for line in instructions if line.startswith("USER"))
    assert user == "1000:1000"  # Kubernetes' runAsNonRoot refuses names
    assert f"useradd --uid {user.split(':')[0]} " in DOCKERFILE
    assert not [
        line for line in instructions if line.startswith("ADD") or re.search(r"\bhf\b|hugging\w+-cli|snap", line)
    ]


def test_versions_agree():
    version = PROJECT["version"]
    texts = [path.read_text(encoding="utf-8") for path in KIT.iterdir()]
    mentioned = {found for text in texts for found in re.findall(r"depthmill[:-](\d+\.\d+\.\d+)", text)}
    assert mentioned == {version}
    assert f'image.version="{version}"' in DOCKERFILE
    assert f'image.licenses="{PROJECT["license"]}"' in DOCKERFILE
    constraints = dict(re.findall(r"(?m)^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8")))
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == constraints["ray"]


def _commands() -> list[list[str]]:
    """Every command line of depthmill's and Ray's in the kit's manifests, on its page and in the README."""
    services = COMPOSE["services"].values()
    commands = [shlex.split(RAYJOB["spec"]["entrypoint"])]
    commands += [[*service.get("entrypoint", []), *service["command"]] for service in services]
    for page in (KIT / "README.md", ROOT / "README.md"):
        text = "\n".join(re.findall(r"(?s)```sh\n(.*?)```", page.read_text(encoding="utf-8")))
        commands += [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    label = COMPOSE["services"]["label"]["entrypoint"]
    for line in commands[:]:
        if line[:2] == ["docker", "compose"] and "label" in line:
            commands.append([*label, *line[line.index("label") + 1 :]])
        elif line[:2] == ["docker", "run"]:
            commands.append(line[line.index("depthmill:" + PROJECT["version"]) + 1 :])
    return [line for line in commands if line and line[0] in ("depthmill", "ray")]


def _parse(line: list[str]) -> dict[str, object]:
    """Parse a command line as its program does, without running it; raises what that raises if it refuses it."""
    if line[0] == "ray":
        from ray.scripts.scripts import cli as command
    else:
        command = typer.main.get_command(app)
    words = line[1:]
    context = command.context_class(command)
    while hasattr(command, "commands"):  # a group; typer's is no click.Group
        _, command, words = command.resolve_command(context, words)
    return command.make_context(command.name, list(words), parent=context).params


def test_every_command_is_one_that_depthmill_and_ray_take():
    commands = _commands()
    for line in commands[:]:
        if line[:3] == ["ray", "job", "submit"]:
            commands.append(line[line.index("--") + 1 :])
    labelling = [_parse(line) for line in commands if line[:2] == ["depthmill", "label"] and "--help" not in line]
    assert len(labelling) >= 5
    for given in labelling:
        options = {key: given[key] for key in LabelConfig.model_fields if key in given and key != "labels"}
        load_config(LabelConfig, given["config"], options)
    for line in commands:
        if line[0] == "depthmill" and line[1] != "label":
            _parse(line)
    ray = [line for line in commands if line[0] == "ray"]
    assert {tuple(line[1:3]) for line in ray} >= {
        ("start", "--head"),
        ("job", "submit"),
        ("job", "logs"),
        ("job", "stop"),
    }
    for line in ray:
        _parse(line)
    with pytest.raises(click.UsageError):
        _parse(["ray", "start", "--hed"])


def test_compose_publishes_to_the_loopback_alone():
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_compose_services_share_their_data_and_keep_gpus_to_a_profile():
    services = COMPOSE["services"]
    assert {target.rpartition(":")[2] for target in services["head"]["volumes"]} == {"/data", "/cache"}
    assert all(service["volumes"] == services["head"]["volumes"] for service in services.values())
    assert all(service["image"] == services["head"]["image"] for service in services.values())
    assert [name for name, service in services.items() if "devices" in str(service.get("deploy"))] == ["gpu-worker"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "head": None,
        "gpu-worker": ["gpu"],
        "cpu-worker": ["cpu"],
        "label": ["label"],
    }


def test_the_ray_job_asks_for_as_many_workers_as_it_may_have_gpus():
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    given = _parse(shlex.split(RAYJOB["spec"]["entrypoint"]))
    assert given["workers"] == group["maxReplicas"] * gpus
    assert group["minReplicas"] == group["replicas"] == 0
    assert cluster["enableInTreeAutoscaling"]
    assert RAYJOB["spec"]["shutdownAfterJobFinishes"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_ray_job_says_what_a_driver_without_a_gpu_cannot_see():
    (head,) = RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    given = _parse(shlex.split(RAYJOB["spec"]["entrypoint"]))
    assert (given["address"], given["device"], given["dtype"]) == ("auto", "cuda", "bfloat16")
    assert str(given["store"]).startswith("s3:")
