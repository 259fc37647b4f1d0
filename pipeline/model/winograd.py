"""Convolutions with fewer products, for CPUs: minimal filtering, Winograd's.

Of a picture's overlapping tiles, transformed d -> Bᵀ d B, and a kernel's taps, transformed g -> G g Gᵀ, products make,
one by one and transformed m -> Aᵀ m A, the 4x4 outputs of a tile (Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", CVPR 2016, section 4). Over channels the products are matrix products, and the transformations sums
of what is in the cache: what is gained grows with the channels.

- 3x3: F(4x4, 3x3) of their section 4.3, tiles of 6x6, 36 products for 4x4 outputs where there were 144.
- 3x3 of a picture that was enlarged to twice its size, each pixel made four: of a tile's 6 values 4 are left, a, b, b,
  c, c, e. In one dimension, with taps u, v, w and p0 = u·(a - c), p1 = (u + v + w)/2·(b + c), p2 = (u - v - w)/2·
  (c - b), p3 = (w - v - u)/2·(c - b), p4 = w·(e - b), the outputs are p0 + p1 + p2, p1 + p3, p1 - p2, p1 - p3 + p4: 25
  products for 4x4 outputs, where `specialize.py`'s transposed convolution has 64. (The points of that theory are 0, 1,
  ±i, ∞; what belongs to -1 vanishes.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from depthmill.pipeline.model.blocks import replace

_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
_G += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
# Of the transposed convolution's taps w, v + w, u + v, u.
_G_DOUBLING = [[0, 0, 0, 1], [1 / 2, 0, 1 / 2, 0], [0, -1 / 2, 0, 1 / 2], [1 / 2, 0, -1 / 2, 0], [1, 0, 0, 0]]
# Fewest channels that pay, as the harmonic mean of a convolution's inputs and outputs.
_CHANNELS = 128
# Tiles times channels that are done at once: few enough for their transforms to stay in a cache.
_AT_ONCE = 2**16


class Winograd(nn.Module):
    """What a 3x3 convolution of stride 1 that pads by 1 answers, or a doubling of `specialize.py`, in float32.

    Its sums differ from the plain ones by 1e-5 of the largest. The weights take 4 times the memory, a doubling's 1.6.
    """

    def __init__(self, convolution: nn.Conv2d | nn.ConvTranspose2d):
        super().__init__()
        self.doubles = isinstance(convolution, nn.ConvTranspose2d)
        weight = convolution.weight.double()
        weight = weight if self.doubles else weight.transpose(0, 1)  # (inputs, outputs, taps, taps)
        kernel = torch.tensor(_G_DOUBLING if self.doubles else _G, dtype=torch.float64)
        weight = torch.einsum("ky,lx,ioyx->klio", kernel, kernel, weight).flatten(0, 1).float()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (36 or 25, inputs, outputs)
        self.bias = convolution.bias

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it is made of buffers that are used again
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w) or, doubled, (B, outputs, 2h, 2w), channels-last."""
        pictures = x.permute(0, 2, 3, 1)
        _, height, width, inputs = pictures.shape
        points, step = (5, 2) if self.doubles else (6, 4)
        to_products, to_outputs = (_doubling_input, _doubling_output) if self.doubles else (_plain_input, _plain_output)
        outputs = self.weight.shape[2]
        down, across = -(-height // step), -(-width // step)  # tiles
        answer = x.new_empty(len(x), 4 * down, 4 * across, outputs)

        at_once = min(down, max(1, _AT_ONCE // (across * max(inputs, outputs))))
        padded = x.new_zeros(step * at_once + 2, step * across + 2, inputs)
        rows = x.new_empty(points, at_once, step * across + 2, inputs)
        tiles = x.new_empty(points, points, at_once, across, inputs)
        products = x.new_empty(points, points, at_once, across, outputs)
        back = x.new_empty(4, points, at_once, across, outputs)
        for picture, into in zip(pictures, answer.view(-1, down, 4, across, 4, outputs), strict=True):
            for first in range(0, down, at_once):
                _copy_padded(picture, step * first - 1, padded[:, 1 : 1 + width])
                to_products([padded[i::step][:at_once] for i in range(step + 2)], rows)
                to_products([rows[:, :, i::step][:, :, :across] for i in range(step + 2)], tiles.transpose(0, 1))
                torch.bmm(tiles.view(points**2, -1, inputs), self.weight, out=products.view(points**2, -1, outputs))
                if self.bias is not None:
                    products[1, 1] += self.bias  # of which each output has one
                to_outputs(products, back)
                strip = into[first : first + at_once]
                to_outputs(back.transpose(0, 1)[:, :, : len(strip)], strip.permute(3, 1, 0, 2, 4))
        answer = answer[:, : 4 // step * height, : 4 // step * width]
        return answer.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # a copy if it was cut


def _copy_padded(picture: torch.Tensor, top: int, into: torch.Tensor) -> None:
    """Rows of a picture from `top` on, which may be above it or end below it: those are zero."""
    above, below = max(0, -top), min(len(picture) - top, len(into))
    into[:above] = 0
    into[above:below] = picture[top + above : top + below]
    into[below:] = 0


def _plain_input(d: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """Bᵀ d along the first axis, 6 to 6."""
    torch.sub(d[4], d[2], alpha=5, out=into[0]).add_(d[0], alpha=4)
    torch.sub(d[4], d[2], alpha=4, out=into[1])
    _sum_and_difference(into[1], torch.sub(d[3], d[1], alpha=4, out=into[2]))
    torch.sub(d[4], d[2], out=into[3])
    _sum_and_difference(into[3], torch.sub(d[3], d[1], out=into[4]), 2)
    torch.sub(d[5], d[3], alpha=5, out=into[5]).add_(d[1], alpha=4)


def _plain_output(m: torch.Tensor, into: torch.Tensor) -> None:
    """Aᵀ m along the first axis, 6 to 4; `m` is used up."""
    _sum_and_difference(m[1], m[2])
    _sum_and_difference(m[3], m[4])
    torch.add(m[0], m[1], out=into[0]).add_(m[3])
    torch.add(m[2], m[4], alpha=2, out=into[1])
    torch.add(m[1], m[3], alpha=4, out=into[2])
    torch.add(m[2], m[4], alpha=8, out=into[3]).add_(m[5])


def _sum_and_difference(one: torch.Tensor, other: torch.Tensor, factor: int = 1) -> None:
    """`one` + factor·`other` and `one` - factor·`other`, in their places."""
    one.add_(other, alpha=factor)
    torch.sub(one, other, alpha=2 * factor, out=other)


def _doubling_input(d: Sequence[torch.Tensor], into: torch.Tensor) -> None:
    """The sums of a, b, c, e along the first axis, 4 to 5."""
    torch.sub(d[0], d[2], out=into[0])
    torch.add(d[1], d[2], out=into[1])
    torch.sub(d[2], d[1], out=into[2])
    into[3] = into[2]
    torch.sub(d[3], d[1], out=into[4])


def _doubling_output(p: torch.Tensor, into: torch.Tensor) -> None:
    """The sums of the products along the first axis, 5 to 4."""
    torch.add(p[0], p[1], out=into[0]).add_(p[2])
    torch.add(p[1], p[3], out=into[1])
    torch.sub(p[1], p[2], out=into[2])
    torch.sub(p[1], p[3], out=into[3]).add_(p[4])


def use_winograd(network: nn.Module) -> None:
    """Replace, within `network`, the convolutions for which it pays; `Specialized` says where."""
    replace(network, (nn.Conv2d, nn.ConvTranspose2d), lambda old: Winograd(old) if _pays(old) else old)


def _pays(convolution: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    inputs, outputs = convolution.in_channels, convolution.out_channels
    plain = convolution.kernel_size == (3, 3) and convolution.stride == (1, 1) and convolution.padding == (1, 1)
    known = plain or isinstance(convolution, nn.ConvTranspose2d)
    return known and 2 * inputs * outputs >= _CHANNELS * (inputs + outputs)
