"""The wheel: everything, and under `depthmill/` alone."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ["configs/*.yaml", "pipeline/model/demo/**/*"]


def test_the_wheel_holds_every_source_file_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(
        ".*", "tests", "benchmarks", "demo.zarr", "build", "dist", "*.egg-info", "runs", "*.pyc"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tree],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert top == {"depthmill", next(name for name in top if name.endswith(".dist-info"))}
    expected = {ROOT / "cli.py", ROOT / "__init__.py", ROOT / "py.typed"}
    expected |= {path for room in ("pipeline", "workers", "configs") for path in (ROOT / room).rglob("*.py")}
    expected |= {path for pattern in SHIPPED for path in ROOT.glob(pattern) if path.is_file()}
    missing = {path for path in expected if f"depthmill/{path.relative_to(ROOT).as_posix()}" not in names}
    assert not missing
    assert any("pipeline/model/demo/depth/unet" in name for name in names)
    assert not any("/tests/" in name for name in names)
