from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from depthmill.pipeline.errors import SampleError
from depthmill.pipeline.training import pool, scenes
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.sets.rendered import SceneOptions
from depthmill.tests.pipeline.training.sets.contract import SetContract

H, W = 24, 32


@pytest.fixture
def config(scene_pool: Path) -> SceneOptions:
    return SceneOptions(path=scene_pool, scenes=pool.SHARD, height=H, width=W)


class TestRendered(SetContract):
    def focal(self, index: int) -> float:
        return scenes.sample(index).focal


@pytest.mark.parametrize("seed", [4, 7])
def test_truth_is_the_renderers(config: SceneOptions, seed: int) -> None:
    rendered = scenes.view([seed], H, W)
    depth, normals = open_set(config, "depth").read(seed), open_set(config, "normals").read(seed)
    assert torch.equal(depth.mask, rendered.mask)
    assert torch.equal(depth.rgb, normals.rgb)
    assert (depth.rgb - rendered.rgb).abs().max() < 0.51 / 255
    mask = rendered.mask
    torch.testing.assert_close(depth.target[:, 0][mask], rendered.depth[mask], rtol=1e-3, atol=0)
    assert (normals.target - rendered.normals).abs().max() < 0.01


def test_no_more_scenes_are_rendered_than_asked_for(
    scene_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ProcessPoolExecutor", lambda count, **_: ThreadPoolExecutor(count))
    few = SceneOptions(path=tmp_path, scenes=2, height=H, width=W)
    new = open_set(few, "depth")
    (file,) = tmp_path.rglob("*.npy")
    assert np.load(file).shape == (2, H, W)
    of_a_full_shard = open_set(few.model_copy(update={"path": scene_pool}), "depth")
    assert len(list(scene_pool.rglob("*.npy"))) == 1
    assert len(new) == len(of_a_full_shard) == 2
    assert all(torch.equal(new.read(i).target, of_a_full_shard.read(i).target) for i in range(2))


def test_a_scene_of_sky_alone_and_one_with_nan(tmp_path: Path) -> None:
    folder = tmp_path / f"v{scenes.VERSION}-24x32"
    folder.mkdir()
    pixels = np.tile(pool.render([4], H, W), (pool.SHARD, 1, 1))
    pixels["depth"][3] = np.inf
    pixels["depth"][5, 2, 2] = np.nan
    np.save(folder / "0000100.npy", pixels)
    pictures = open_set(SceneOptions(path=tmp_path, scenes=pool.SHARD, first=100, height=H, width=W), "depth")
    assert pictures.read(4).mask.any()
    with pytest.raises(SampleError, match=r"scene 103 .*near enough"):
        pictures.read(3)
    with pytest.raises(SampleError, match=r"scene 105 .*NaN"):
        pictures.read(5)
