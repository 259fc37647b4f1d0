"""Convolutions with fewer products against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from depthmill.pipeline.model import winograd
from depthmill.pipeline.model.specialize import Specialized, _doubling
from depthmill.pipeline.model.winograd import Winograd, use_winograd
from depthmill.tests.pipeline.model.test_specialize import CPU, errors, head, pictures

pytestmark = pytest.mark.usefixtures("seeded")


def channels_last(*shape):
    return torch.randn(*shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("at_once", [1, 300, 2**16])
@pytest.mark.parametrize(
    "shape", [(1, 8, 1, 1), (2, 8, 16, 20), (1, 8, 5, 7), (3, 16, 33, 21), (1, 12, 4, 90)], ids=str
)
def test_equals_a_convolution(monkeypatch, shape, at_once):
    """Whole tiles and parts of them, all at once and in strips, more outputs and fewer."""
    monkeypatch.setattr(winograd, "_AT_ONCE", at_once)
    x = channels_last(*shape)
    for outputs, bias in [(8, True), (20, False)]:
        plain = nn.Conv2d(shape[1], outputs, 3, padding=1, bias=bias)
        expected = plain(x)
        answer = Winograd(plain)(x)
        assert answer.is_contiguous(memory_format=torch.channels_last)
        assert (answer - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("at_once", [1, 300, 2**16])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 8, 16, 20), (1, 8, 5, 7), (1, 12, 2, 90)], ids=str)
def test_equals_a_convolution_of_an_enlarged_picture(monkeypatch, shape, at_once):
    monkeypatch.setattr(winograd, "_AT_ONCE", at_once)
    x = channels_last(*shape)
    plain = nn.Conv2d(shape[1], 20, 3, padding=1)
    expected = plain(F.interpolate(x, scale_factor=2, mode="nearest"))
    answer = Winograd(_doubling(plain))(x)
    assert answer.shape == expected.shape
    assert (answer - expected).abs().max() < 1e-5 * expected.abs().max()


def test_it_has_fewer_products():
    def products(layer):
        with FlopCounterMode(display=False) as counter:
            layer(channels_last(1, 16, 16, 32))
        return counter.get_total_flops()

    plain = nn.Conv2d(16, 24, 3, padding=1)
    assert products(Winograd(plain)) == products(plain) / 4
    assert products(Winograd(_doubling(plain))) == products(_doubling(plain)) * 25 / 64


def test_narrow_and_other_convolutions_stay():
    layers = [
        nn.Conv2d(128, 128, 3, padding=1),
        nn.Conv2d(64, 512, 3, padding=1),
        nn.Conv2d(512, 512, 3, padding=1, stride=2),
        nn.Conv2d(512, 512, 3),
        nn.Conv2d(512, 512, 1),
        _doubling(nn.Conv2d(256, 256, 3, padding=1)),
        nn.Linear(512, 512),
    ]
    network = nn.Sequential(*layers)
    use_winograd(network)
    assert [type(layer) is Winograd for layer in network] == [True, False, False, False, False, True, False]


WIDE = {"block_out_channels": (128, 128), "norm_num_groups": 32}


def wide_layers(dtype):
    network = Specialized([head(vae_options=WIDE)], CPU, dtype)
    return [sum(isinstance(one, Winograd) for one in part.modules()) for part in network.folded.children()]


def test_the_vae_alone_in_float32_alone():
    denoisers, _, encoders, decoders = wide_layers(torch.float32)
    assert (denoisers, encoders > 0, decoders > 0) == (0, True, True)
    assert wide_layers(torch.bfloat16) == [0, 0, 0, 0]


def test_labels_are_those_of_the_plain_network():
    one = head(vae_options=WIDE)
    assert max(errors([one], pictures(2, 20, 28))) < 1e-4


@pytest.mark.slow
def test_compiled_around():
    network = Specialized([head(vae_options=WIDE)], CPU, torch.float32).folded
    batch = pictures(1, 8, 12)
    assert torch.equal(torch.compile(network, backend="eager", dynamic=False)(batch)[0], network(batch)[0])
