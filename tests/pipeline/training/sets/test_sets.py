from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import BaseModel, ValidationError

from depthmill.pipeline.errors import SampleError, TrainingError
from depthmill.pipeline.training.sets import SetConfig
from depthmill.pipeline.training.sets.samples import existing, read_16_bit, read_rgb, sample


class Run(BaseModel):
    sets: tuple[SetConfig, ...]


def test_entries_of_a_configuration() -> None:
    entries = [
        {"kind": "hypersim", "path": "data/hypersim", "ratio": 9},
        {"kind": "vkitti2", "path": "data/vkitti2", "conditions": ["clone"]},
        {"kind": "scenes", "scenes": 200},
        {"kind": "store", "path": "labels.zarr", "height": 480, "width": 640},
    ]
    run = Run.model_validate({"sets": entries})
    assert [config.kind for config in run.sets] == ["hypersim", "vkitti2", "scenes", "store"]
    assert [config.ratio for config in run.sets] == [9, 1, 1, 1]
    assert Run.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize("kind", ["hypersim", "vkitti2", "scenes", "store"])
def test_a_path_may_be_in_a_home_folder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    more = {"scenes": {"scenes": 100}, "store": {"height": 24, "width": 32}}.get(kind, {})
    paths = {"~/data": "/home/somebody/data", "data/~": "data/~", "~nosuchuser/a": "~nosuchuser/a"}
    for given, meant in paths.items():
        run = Run.model_validate({"sets": [{"kind": kind, "path": given, **more}]})
        assert str(run.sets[0].path) == meant
    store = {"kind": "store", "path": "s3://bucket/~", "height": 24, "width": 32}
    assert Run.model_validate({"sets": [store]}).model_dump()["sets"][0]["path"] == "s3://bucket/~"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"kind": "nyu", "path": "x"}, "'hypersim', 'vkitti2', 'scenes', 'store'"),
        ({"path": "x"}, "Unable to extract tag"),
        ({"kind": "hypersim"}, r"hypersim.path\n.*required"),
        ({"kind": "hypersim", "path": "x", "conditions": ["fog"]}, "Extra inputs"),
        ({"kind": "hypersim", "path": "x", "ratio": 0}, "greater than 0"),
        ({"kind": "hypersim", "path": "x", "ratio": float("inf")}, "finite"),
        ({"kind": "vkitti2", "path": "x", "conditions": ["snow"]}, "'clone'"),
        ({"kind": "scenes", "scenes": 100, "first": 150}, "multiple of 100"),
        ({"kind": "store", "path": "x"}, "height"),
    ],
)
def test_entries_that_cannot_be_used(entry: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Run.model_validate({"sets": [entry]})


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_nan_is_an_error_only_where_truth_is_claimed(shape: tuple[int, ...]) -> None:
    rgb, target, mask = np.zeros((4, 6, 3), np.uint8), np.full(shape, 0.5, np.float32), np.ones((4, 6), bool)
    target[1, 2] = np.nan
    with pytest.raises(SampleError, match=r"here: the truth of 1 pixels is NaN or infinite"):
        sample("here", rgb, target, mask)
    mask[1, 2] = False
    batch = sample("here", rgb, target, mask)
    assert batch.mask.sum() == 23
    assert (batch.target[0, :, 1, 2] == 0).all()
    with pytest.raises(SampleError, match="not one pixel"):
        sample("here", rgb, target, np.zeros_like(mask))


@pytest.mark.parametrize("read", [read_rgb, read_16_bit])
def test_what_is_no_fault_of_a_picture_is_not_said_of_it(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scene"
    folder.mkdir()
    for name, what in (("damaged.png", b"no picture"), ("empty.png", b"")):
        (folder / name).write_bytes(what)
    (folder / "folder.png").mkdir()
    for name in ("damaged.png", "empty.png", "folder.png", "gone.png"):
        with pytest.raises(SampleError, match=name):
            read(folder / name)
    folder.rename(tmp_path / "elsewhere")  # as a mount that is away
    with pytest.raises(FileNotFoundError):
        read(folder / "damaged.png")
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        read(folder / "damaged.png")
    (folder / "one.png").write_bytes(b"")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read(folder / "one.png")


def test_a_folder_that_cannot_be_listed_is_none_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(TrainingError, match=r"a cannot be listed \(Input/output error\): .*again"):
        existing(tmp_path, [("a/1.png",), ("b/1.png",)], "get it")


def test_resizing_keeps_picture_and_truth_in_step() -> None:
    depth = (1 + 3 * np.arange(32) + 2 * np.arange(24)[:, None]).astype(np.float32)
    rgb = np.repeat(depth.astype(np.uint8)[..., None], 3, axis=2)
    for size in ((12, 16), (6, 8), (48, 64), (24, 20), (8, 10), (10, 32)):
        batch = sample("here", rgb, depth, depth > 0, size)
        assert batch.rgb.shape[2:] == batch.mask.shape[1:] == size
        off = (batch.rgb[0, 0] * 255 - batch.target[0, 0])[1:-1, 1:-1]
        # Half a pixel each way, or none where 3 x 3 make one; and the rounding of colours.
        assert off.abs().max() <= (1 if size == (8, 10) else 3)
    assert batch.target[0, 0, :, 0].tolist() == [15 + 2 * row for row in range(10)], "the middle rows, of 24 the 7th on"
