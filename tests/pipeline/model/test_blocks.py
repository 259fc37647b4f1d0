"""Blocks against diffusers' and torch's own, where `test_specialize.py` does not come to them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from depthmill.pipeline.model.blocks import ChannelsLastNorm, _attend, empty, filled, use_channels_last_norms


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_channels_last_norm_is_group_norm(dtype, tolerance, mean):
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    norm.weight.data, norm.bias.data = random(16, seed=1), random(16, seed=2)
    x = random(2, 16, 6, 10) * torch.linspace(0.1, 3, 16)[:, None, None] + mean
    x = x.to(dtype, memory_format=torch.channels_last)
    found = ChannelsLastNorm(norm)(x)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), norm(x.float()), rtol=tolerance, atol=tolerance)


def test_channels_last_norm_has_group_norms_gradients_and_names():
    norm = nn.GroupNorm(4, 16)
    norm.weight.data, norm.bias.data = random(16, seed=1), random(16, seed=2)
    x, towards = random(2, 16, 6, 10), random(2, 16, 6, 10, seed=3)
    other = nn.Sequential(nn.GroupNorm(4, 16))
    other[0].load_state_dict(norm.state_dict())
    use_channels_last_norms(other)
    assert isinstance(other[0], ChannelsLastNorm)
    assert other.state_dict().keys() == nn.Sequential(norm).state_dict().keys()
    gradients = []
    for one in (norm, other):
        picture = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad((one(picture) * towards).sum(), [picture, *one.parameters()]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_layer_that_is_given_no_bias_has_none():
    layer = empty(nn.Conv2d, 2, 3, 1)
    layer.bias.fill_(torch.nan)  # as uninitialised memory may be
    assert not filled(layer, random(3, 2, 1, 1), None).bias.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_wide_heads_are_no_less_precise_on_a_gpu(dtype):
    query, key, value = (3 * random(2, 1, 300, 512, seed=seed).cuda().to(dtype) for seed in range(3))
    exact = F.scaled_dot_product_attention(*(one.double() for one in (query, key, value)))
    ours, fused = (
        (attend(query, key, value).double() - exact).norm().item()
        for attend in (_attend, F.scaled_dot_product_attention)
    )
    assert 0 < ours <= 1.1 * fused
