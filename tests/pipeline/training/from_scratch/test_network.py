"""The trained network: its norms on a CPU, against torch's; the size of its attention."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from depthmill.pipeline.model.blocks import use_channels_last_norms
from depthmill.pipeline.model.scratch import Architecture
from depthmill.pipeline.training.from_scratch.network import TurnedNorm, build

LAST = torch.channels_last


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_turned_norm_is_group_norm_and_so_are_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    plain = nn.Sequential(nn.GroupNorm(4, 16, eps=1e-6))
    plain[0].weight.data, plain[0].bias.data = random(16, seed=1), random(16, seed=2)
    turned = nn.Sequential(nn.GroupNorm(4, 16, eps=1e-6))
    use_channels_last_norms(turned, TurnedNorm)
    turned.load_state_dict(plain.state_dict())
    assert isinstance(turned[0], TurnedNorm)
    picture, towards = (random(2, 16, 6, 10, seed=seed).to(dtype, memory_format=LAST) for seed in (3, 4))
    results = []
    for norm in (turned, plain):
        x = picture.clone().requires_grad_()
        y = norm(x)
        results.append((y, *torch.autograd.grad((y * towards).sum(), [x, *norm.parameters()])))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert all(one.is_contiguous(memory_format=LAST) for one in results[0][:2])


def test_attention_is_held_to_twice_its_first_size_and_else_left_alone() -> None:
    net = build(Architecture(), 0, torch.device("cpu"))
    attention = next(m for m in net.parts.unet.modules() if isinstance(m, Attention))
    first = {name: weight.clone() for name, weight in net.parts.unet.state_dict().items()}
    size = float(attention.to_q.weight.detach().norm())
    net.hold_attention()
    assert all(torch.equal(first[name], weight) for name, weight in net.parts.unet.state_dict().items())
    with torch.no_grad():
        attention.to_q.weight *= 7
        attention.to_v.weight *= 7
    net.hold_attention()
    assert float(attention.to_q.weight.detach().norm()) == pytest.approx(2 * size, rel=0.1)
    assert float(attention.to_v.weight.detach().norm()) == pytest.approx(7 * size, rel=0.1)
