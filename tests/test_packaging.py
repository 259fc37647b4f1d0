"""The wheel: everything, and under `depthmill/` alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_holds_every_source_file_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".*", "tests", "benchmarks", "build", "dist", "*.egg-info", "runs", "*.pyc")
    shutil.copytree(ROOT, tree, ignore=ignore)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "would be ignored" not in built.stdout + built.stderr, "setuptools warns of data that it may leave out"
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    top = {name.split("/")[0] for name in names}
    assert top == {"depthmill", next(name for name in top if name.endswith(".dist-info"))}
    shipped = ["cli.py", "__init__.py", "__main__.py", "py.typed", "pipeline", "workers", "configs"]
    tracked = subprocess.run(["git", "ls-files", "-z", *shipped], cwd=ROOT, check=True, capture_output=True, text=True)
    modules = {name for name in names if name.startswith("depthmill/")}
    assert modules == {f"depthmill/{name}" for name in tracked.stdout.split("\0") if name}
    licences = {name.partition(".dist-info/licenses/")[2] for name in names}
    assert {"LICENSE", "pipeline/training/photographs.LICENSE.txt"} <= licences
