"""What a checkpoint's weights hash to is kept, and believed for as long as they are as they were."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from depthmill.pipeline.model.checkpoint import open_checkpoint

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def depth(checkpoints, tmp_path):
    """A depth checkpoint to change."""
    return shutil.copytree(checkpoints / "depth", tmp_path / "depth")


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Names of the weights that are hashed, some time after they were written."""
    names, digest, now_ns = [], hashlib.file_digest, time.time_ns

    def note(stream, kind):
        names.extend([Path(stream.name).parent.name] if stream.name.endswith(".safetensors") else [])
        return digest(stream, kind)

    monkeypatch.setattr(hashlib, "file_digest", note)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 10**10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def test_weights_are_hashed_once(depth, hashed):
    before = open_checkpoint(str(depth), "depth").sha256
    assert sorted(hashed) == ["text_encoder", "unet", "vae"]
    hashed.clear()
    assert open_checkpoint(str(depth), "depth").sha256 == before
    assert hashed == []
    (depth / "unet" / "config.json").write_text((depth / "unet" / "config.json").read_text() + "\n")
    assert open_checkpoint(str(depth), "depth").sha256 != before
    assert hashed == []


@pytest.mark.parametrize("way", ["in place", "another file"])
def test_weights_of_the_same_size_and_time_are_hashed_again(depth, hashed, way):
    path = depth / WEIGHTS
    before, state, data = open_checkpoint(str(depth), "depth").sha256, path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    hashed.clear()
    time.sleep(0.05)  # a tick of the disk's clock, and more
    written = path if way == "in place" else path.with_suffix(".new")
    written.write_bytes(data)
    os.utime(written, ns=(state.st_atime_ns, state.st_mtime_ns))
    written.replace(path)
    assert open_checkpoint(str(depth), "depth").sha256 != before
    assert hashed == ["unet"]


def test_weights_that_were_written_just_now_are_hashed_again(depth, hashed, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: (depth / WEIGHTS).stat().st_ctime_ns + 10**9)
    for _ in range(2):
        hashed.clear()
        open_checkpoint(str(depth), "depth")
        assert "unet" in hashed


@pytest.mark.parametrize("content", ["", "[]", "3", '{"unet": 1}'])
def test_a_damaged_or_missing_cache_costs_time_alone(depth, hashed, tmp_path, monkeypatch, content):
    before = open_checkpoint(str(depth), "depth").sha256
    (kept,) = (tmp_path / "cache" / "depthmill" / "sha256").iterdir()
    states = json.loads(kept.read_text())
    for damaged in (content, json.dumps(dict.fromkeys(states, 1))):
        kept.write_text(damaged)
        assert open_checkpoint(str(depth), "depth").sha256 == before
    assert json.loads(kept.read_text()) == states
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # where nothing can be written
    assert open_checkpoint(str(depth), "depth").sha256 == before
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert open_checkpoint(str(depth), "depth").sha256 == before
