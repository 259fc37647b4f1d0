from unittest.mock import Mock

import numpy as np
import pytest
import torch

from depthmill.pipeline.model.transfer import mark, pack_depth, pack_normals, stage, to_device
from depthmill.pipeline.store import layout


def awkward(count):
    """Values that lie between two steps, beyond the range, on its ends; and NaN."""
    generator = np.random.default_rng(0)
    steps = np.arange(count, dtype=np.float32) * np.float32(layout.DEPTH_STEP / 2)
    values = np.concatenate([steps, generator.uniform(-0.2, 1.2, count).astype(np.float32), np.float32([0, 1, np.nan])])
    return generator.permutation(values)


def test_depth_is_packed_as_a_store_packs_it():
    depth = awkward(20_000)[None]
    packed = pack_depth(torch.from_numpy(depth)).numpy()
    assert packed.dtype == np.uint16
    assert np.array_equal(packed, layout.pack_depth(depth))
    assert layout.DEPTH_INVALID in packed


@pytest.mark.parametrize("dtype", ["int8", "int16", "float16"])
def test_normals_are_packed_as_a_store_packs_them(dtype):
    normals = np.random.default_rng(0).normal(size=(200, 200, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0, 0], normals[0, 1] = 0, np.nan
    packed = pack_normals(torch.from_numpy(normals), dtype).numpy()
    assert packed.dtype == dtype
    assert np.array_equal(packed, layout.pack_normals(normals, dtype))
    assert not packed[0, 1].any()


def test_a_normal_of_which_the_network_answers_nan_is_invalid():
    normals = torch.ones(2, 3, 1, 2)
    normals[0, 1, 0, 0], normals[1, 2, 0, 1] = torch.nan, torch.inf
    [one, other] = stage({"normals": normals}, None, [(1, 2)] * 2, [(1, 2)] * 2, "int8")
    assert one.labels["normals"].tolist() == [[[[0, 0, 0], [73, 73, 73]]]]
    assert other.labels["normals"].tolist() == [[[[73, 73, 73], [0, 0, 0]]]]


@pytest.mark.gpu
def test_packed_on_cuda_as_on_the_cpu():
    depth = awkward(20_000)
    assert np.array_equal(pack_depth(torch.from_numpy(depth).cuda()).cpu().numpy(), layout.pack_depth(depth))


def test_who_waits_for_cuda_keeps_no_core_busy(monkeypatch):
    event = Mock()
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    mark(torch.device("cuda"))
    event.assert_called_once_with(enable_timing=True, blocking=True)


def test_a_frame_that_cannot_be_written_to():
    frame = np.zeros((2, 3, 3), np.uint8)
    frame.flags.writeable = False
    assert to_device(frame, torch.device("cpu")).shape == (2, 3, 3)


def test_a_frame_that_is_read_backwards():
    bgr = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(to_device(bgr[..., ::-1], torch.device("cpu")).numpy(), bgr[..., ::-1])
