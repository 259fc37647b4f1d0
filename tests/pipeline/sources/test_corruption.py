"""Every kind of damage, read in a process of its own: nothing but reasons comes out, and memory stays bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from depthmill.tests import corruption


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[corruption.Item]]:
    root = tmp_path_factory.mktemp("corpus")
    return root, corruption.write(root)


@pytest.fixture(scope="module")
def result(corpus: tuple[Path, list[corruption.Item]]) -> dict[str, Any]:
    code = "import json, sys; from pathlib import Path; from depthmill.tests import corruption\n"
    code += "print(json.dumps(corruption.read_all(Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(corpus[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_there_are_enough_and_they_are_the_same_each_time(
    corpus: tuple[Path, list[corruption.Item]], tmp_path: Path
) -> None:
    root, items = corpus
    assert sum(item.kind != "good" for item in items) >= 200
    assert corruption.write(tmp_path) == items
    for item in items:
        assert (tmp_path / item.name).read_bytes() == (root / item.name).read_bytes(), item


def test_the_good_ones_are_read_and_the_bad_ones_say_why(
    corpus: tuple[Path, list[corruption.Item]], result: dict[str, Any]
) -> None:
    for item in corpus[1]:
        outcome = result["outcomes"][item.name]
        assert outcome["errors"] or outcome["read"], item
        if item.listed is not None:
            assert bool(outcome["errors"]) == item.listed, (item, outcome)
        assert all(isinstance(reason, str) and len(reason) > 10 for reason in outcome["errors"]), (item, outcome)
        if item.exact:
            for key, index, _ in outcome["read"]:
                assert index == int(Path(key).stem.removesuffix("~2")), (item, key)


def test_what_is_read_fits_the_size_that_was_announced(result: dict[str, Any]) -> None:
    assert all(fits for outcome in result["outcomes"].values() for *_, fits in outcome["read"])


def test_what_is_whole_is_read_beside_what_is_not(
    corpus: tuple[Path, list[corruption.Item]], result: dict[str, Any]
) -> None:
    for item in corpus[1]:
        if item.kind.startswith(("member", "sparse")):
            assert len(result["outcomes"][item.name]["read"]) >= 12, item
        if item.kind == "tar, truncated":
            path = corpus[0] / item.name
            whole = max(0, (path.stat().st_size - 4096) // 4096)  # a sample here takes less than 4 KiB
            assert len(result["outcomes"][item.name]["read"]) >= whole, item


def test_memory_stays_bounded(result: dict[str, Any]) -> None:
    """Bombs of 1 GiB, and pictures of 400 megapixels, among those that have 30 MB at most."""
    assert result["peak_growth"] < 300 << 20
