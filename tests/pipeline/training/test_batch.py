from __future__ import annotations

import pytest
import torch

from depthmill.pipeline.training.batch import Batch, flip


@pytest.mark.parametrize("channels", [1, 3])
def test_flip_mirrors_everything_and_turns_the_normals_x_but_not_depth(channels: int) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.rand(3, 3, 4, 6), torch.randn(3, channels, 4, 6), torch.rand(3, 4, 6) > 0.3)
    rows = torch.tensor([True, False, True])
    flipped = flip(batch, rows)
    sign = torch.tensor([-1.0, 1, 1])[:, None, None] if channels == 3 else 1
    for b in range(3):
        if rows[b]:
            assert torch.equal(flipped.rgb[b], batch.rgb[b].flip(2))
            assert torch.equal(flipped.target[b], batch.target[b].flip(2) * sign)
            assert torch.equal(flipped.mask[b], batch.mask[b].flip(1))
        else:
            assert torch.equal(flipped.target[b], batch.target[b])
            assert torch.equal(flipped.rgb[b], batch.rgb[b])
            assert torch.equal(flipped.mask[b], batch.mask[b])
    again = flip(flipped, rows)
    assert torch.equal(again.target, batch.target)
