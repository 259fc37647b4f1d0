"""Layers whose weights are laid out once against torch's own."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from depthmill.pipeline.model.blocks import replace
from depthmill.pipeline.model.packed import PackedConvolution, PackedLinear, can_pack, packed
from depthmill.pipeline.model.specialize import Specialized
from depthmill.tests.pipeline.model.test_specialize import CPU, head, pictures

pytestmark = [
    pytest.mark.skipif(not can_pack(), reason="this CPU does not multiply bfloat16"),
    pytest.mark.usefixtures("seeded"),
]


def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def error(answer, layer, x, added=0):
    """Largest difference to the layer in float32, of the largest value."""
    assert answer.dtype == torch.bfloat16
    exact = layer.float()(x.float()) + added
    return ((answer - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 40, 9, 12), (1, 130, 64, 64), (1, 16, 100, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "bias": False}, {"kernel_size": 1, "stride": 2}],
    ids=["3x3", "1x1", "stride 2"],
)
def test_equals_a_convolution_and_its_sum(shape, options):
    plain = nn.Conv2d(shape[1], 24, dtype=torch.bfloat16, **options)
    layer = PackedConvolution(plain)
    x = random(*shape).to(memory_format=torch.channels_last)
    alone = layer(x)
    added = random(*alone.shape).to(memory_format=torch.channels_last)
    before = x.clone(), added.clone()
    both = layer(x, added)
    assert torch.equal(x, before[0])
    assert torch.equal(added, before[1]), "which may be another block's skip"
    assert error(alone, plain, x) < 2**-8
    assert error(both, plain, x, added) < 2**-8


@pytest.mark.parametrize("bias", [True, False])
def test_equals_a_linear_layer(bias):
    plain = nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    x = random(2, 7, 40)
    assert error(PackedLinear(plain)(x), plain, x) < 2**-8


def test_what_is_packed():
    layers = [nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.ConvTranspose2d(8, 8, 4), nn.GroupNorm(2, 8), nn.SiLU()]
    wide = nn.Sequential(*layers)
    replace(wide, (nn.Conv2d, nn.Linear), packed)
    assert list(wide) == layers
    narrow = nn.Sequential(*(layer.bfloat16() for layer in layers))
    replace(narrow, (nn.Conv2d, nn.Linear), packed)
    kinds = [PackedConvolution, PackedLinear, nn.ConvTranspose2d, nn.GroupNorm, nn.SiLU]
    assert [type(layer) for layer in narrow] == kinds


def test_the_network_in_bfloat16_has_none_left_but_the_last():
    network = Specialized([head()], CPU, torch.bfloat16)
    assert sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in network.modules()) == 1
    assert network.folded.last[0][-1].weight.dtype == torch.float32
    plain = Specialized([head()], CPU, torch.float32)
    assert not any(isinstance(layer, PackedConvolution | PackedLinear) for layer in plain.modules())
    batch = pictures()
    torch.testing.assert_close(network(batch)["depth"], plain(batch)["depth"], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "copied", [deepcopy, lambda network: pickle.loads(pickle.dumps(network))], ids=["copy", "pickle"]
)
def test_a_copy_answers_the_same(copied):
    network = Specialized([head()], CPU, torch.bfloat16)
    batch = pictures()
    assert torch.equal(copied(network)(batch)["depth"], network(batch)["depth"])


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")  # diffusers' own
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiled_around():
    network = Specialized([head()], CPU, torch.bfloat16).folded
    batch = pictures()
    assert torch.equal(torch.compile(network, backend="eager", dynamic=False)(batch)[0], network(batch)[0])
