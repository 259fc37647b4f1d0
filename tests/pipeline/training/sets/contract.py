"""What every training set promises. A new kind subclasses SetContract and says how to make one."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import pytest
import torch

from depthmill.pipeline.training.batch import Batch, TrainingSet, concatenate
from depthmill.pipeline.training.sets import open_set
from depthmill.pipeline.training.sets.normals import Intrinsics, rays


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch))


class SetContract:
    """Subclasses give `config`, a fixture: the options of a set of a few pictures, all usable."""

    def focal(self, index: int) -> float:
        """Of a picture's camera, as a multiple of the width; where it is not known, rays along the viewing axis."""
        return 1e6

    @pytest.fixture(params=["depth", "normals"])
    def pictures(self, config, request: pytest.FixtureRequest) -> TrainingSet:
        return open_set(config, request.param)

    def test_samples_are_sound(self, pictures: TrainingSet) -> None:
        assert len(pictures) > 1
        batch = concatenate([pictures.read(i) for i in range(min(len(pictures), 8))])
        B, _, H, W = batch.rgb.shape
        assert batch.rgb.dtype == batch.target.dtype == torch.float32
        assert batch.mask.dtype == torch.bool
        assert batch.rgb.shape == (B, 3, H, W)
        assert batch.mask.shape == (B, H, W)
        assert batch.target.shape == (B, 1 if pictures.modality == "depth" else 3, H, W)
        assert all(getattr(batch, field.name).is_contiguous() for field in fields(Batch))
        assert batch.rgb.min() >= 0
        assert 0.1 < batch.rgb.max() <= 1
        assert torch.isfinite(batch.target).all()
        assert batch.mask.flatten(1).any(1).all()
        trusted = batch.target.movedim(1, -1)[batch.mask]
        if pictures.modality == "depth":
            assert (trusted > 0).all()
            return
        torch.testing.assert_close(trusted.norm(dim=-1), torch.ones(len(trusted)))
        for i in range(B):
            focal = self.focal(i) * W
            view = torch.from_numpy(rays(H, W, Intrinsics(focal, focal, (W - 1) / 2, (H - 1) / 2)).astype(np.float32))
            towards = (batch.target[i].movedim(0, -1) * view).sum(-1)[batch.mask[i]]
            assert towards.max() < 0.02  # up to rounding where normals are stored in 8 bits

    def test_the_same_whenever_and_wherever_it_is_read(self, pictures: TrainingSet) -> None:
        count = min(len(pictures), 8)
        first = [pictures.read(i) for i in range(count)]
        assert not same(first[0], first[1])
        document = pickle.dumps(pictures)
        assert len(document) < 50_000, "paths are to be pickled, not pictures"
        elsewhere = pickle.loads(document)
        assert (len(elsewhere), elsewhere.modality) == (len(pictures), pictures.modality)
        assert all(same(first[i], elsewhere.read(i)) for i in reversed(range(count)))
        with ThreadPoolExecutor(4) as threads:
            order = [*range(count), *reversed(range(count))] * 2
            assert all(same(first[i], read) for i, read in zip(order, threads.map(pictures.read, order), strict=True))
