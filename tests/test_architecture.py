"""Who may import whom (ARCHITECTURE.md), and that the package says what it holds."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "pipeline").rglob("*.py"), *(ROOT / "workers").rglob("*.py")]


def imports(path):
    """Every module that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        if room != "workers":
            assert name.split(".")[0] != "ray", f"{path}: only workers/ knows Ray"
        if room == "pipeline":
            assert not name.startswith(("depthmill.workers", "depthmill.cli")), f"{path}: pipeline/ imports no {name}"
        if room == "workers":
            assert not name.startswith("depthmill.cli"), f"{path}: workers/ imports no {name}"


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"depthmill"} | {
        ".".join(("depthmill", *path.parent.relative_to(ROOT).parts))
        for top in ("configs", "pipeline", "workers")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed) == found


@pytest.mark.parametrize("module", ["depthmill", "depthmill.cli"])
def test_nothing_heavy_is_loaded_for_the_help(module):
    heavy = ["torch", "diffusers", "ray", "zarr", "xarray", "av", "numpy", "pydantic"]
    code = f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_workers_that_smooth_or_probe_load_no_network():
    modules = "depthmill.workers.smooth_actors, depthmill.workers.probe_actors"
    code = f"import {modules}, sys; print([name for name in ('torch', 'diffusers') if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
