"""What a folded network is made of: diffusers' blocks, leaner, since their constants are known.

On a GPU, `ChannelsLastNorm` takes the place of torch's GroupNorm, which wants pictures channels first: compiled or not,
it was more than half of Stable Diffusion 2's time there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from depthmill.pipeline.model.packed import PackedConvolution

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)

# Wider heads than this torch's fused attention has no fast kernel for on a GPU; a VAE's are 512 wide.
_FUSED_WIDTH = 256
# Tokens up to which their scores may all be kept at once instead, 1.5 GB a picture.
_MOST_TOKENS = 1 << 14
# Products of half precision that are not rounded to it, since torch 2.8.
_CAN_WIDEN = hasattr(torch.ops.aten.bmm, "dtype")


class Residual(nn.Module):
    """`ResnetBlock2D` whose time step is in its biases: no copies for the activations, the sum and a division by 1."""

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = block.norm1, block.conv1, block.norm2, block.conv2
        self.shortcut = block.conv_shortcut or nn.Identity()
        self.scale = block.output_scale_factor

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, C', h, w)."""
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = F.silu(self.norm2(y), inplace=True)
        if isinstance(self.conv2, PackedConvolution):
            y = self.conv2(y, self.shortcut(x))  # two passes over memory less
        else:
            y = self.conv2(y)
            y += self.shortcut(x)
        return y if self.scale == 1 else y / self.scale  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """`Attention` of tokens to themselves, with one matrix for queries, keys and values."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads = attention.heads
        parts = (attention.to_q, attention.to_k, attention.to_v)
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self.qkv = linear(torch.cat([part.weight for part in parts]), bias)
        self.out = attention.to_out[0]

    def forward(self, tokens: torch.Tensor, **unused: None) -> torch.Tensor:
        """(B, N, width) to the same shape."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1)
        )  # each (B, heads, N, d)
        attended = _attend(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class PromptAttention(nn.Module):
    """`Attention` to a prompt that never changes.

    A token x of head h weighs prompt token n by softmax_n(s·(W_q x)ₕ·k_hn), and answers Σ_h W_oh Σ_n weight·v_hn + b.
    Both k and v are constants, and so are the matrices A, whose rows are s·k_hnᵀ·W_qh, and B, whose columns are
    W_oh·v_hn: the answer is B·softmax(A x) + b. With two tokens the softmax is a sigmoid of the scores' difference, and
    A and B have one row and one column a head.

    Args:
        attention: Whose.
        prompt: (1, tokens, width) float32.
    """

    def __init__(self, attention: Attention, prompt: torch.Tensor):
        super().__init__()
        self.heads, self.tokens = attention.heads, prompt.shape[1]
        prompt = prompt[0].double()

        def per_head(matrix: torch.Tensor) -> torch.Tensor:  # (heads·d, …) -> (heads, d, …)
            return matrix.double().reshape(self.heads, -1, *matrix.shape[1:])

        def project(layer: nn.Linear) -> torch.Tensor:  # (heads, d, tokens)
            bias = 0 if layer.bias is None else layer.bias.double()
            return per_head((prompt @ layer.weight.double().T + bias).T)

        keys, values = project(attention.to_k), project(attention.to_v)
        query, query_bias = per_head(attention.to_q.weight), attention.to_q.bias
        out = attention.to_out[0]
        out_heads = out.weight.double().unflatten(1, (self.heads, -1))  # (width, heads, d)
        constant = 0 if out.bias is None else out.bias.double()
        if self.tokens == 2:
            constant = constant + torch.einsum("whd,hd->w", out_heads, values[..., 1])
            keys, values = (pair[..., :1] - pair[..., 1:] for pair in (keys, values))
        keys = keys * keys.shape[1] ** -0.5
        score_bias = None
        if query_bias is not None:
            score_bias = torch.einsum("hd,hdn->hn", per_head(query_bias), keys).flatten()
        self.scores = linear(torch.einsum("hdw,hdn->hnw", query, keys).flatten(0, 1), score_bias)
        self.answer = linear(
            torch.einsum("whd,hdn->whn", out_heads, values).flatten(1),
            constant + torch.zeros(len(out.weight), dtype=torch.float64),
        )

    def forward(self, tokens: torch.Tensor, **unused: None) -> torch.Tensor:
        """(B, N, width) to the same shape."""
        scores = self.scores(tokens)
        if self.tokens == 2:
            return self.answer(scores.sigmoid_())  # type: ignore[no-any-return]
        return self.answer(scores.unflatten(-1, (self.heads, -1)).softmax(dim=-1).flatten(-2))  # type: ignore[no-any-return]


class PictureAttention(nn.Module):
    """`Attention` of a picture's pixels to themselves, as VAEs have it: normalised before, and added to the picture."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.norm, self.attention = attention.group_norm, SelfAttention(attention)
        self.scale = attention.rescale_output_factor

    def forward(self, x: torch.Tensor, temb: None = None) -> torch.Tensor:
        """(B, C, h, w) to the same shape."""
        tokens = self.norm(x).flatten(2).mT  # (B, N, C)
        y = self.attention(tokens).mT.reshape(x.shape) + x
        return y if self.scale == 1 else y / self.scale  # type: ignore[no-any-return]


class Upsampling(nn.Module):
    """`Upsample2D`: nearest-neighbour enlargement and a 3x3 convolution; nothing else that a compiler stumbles over."""

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        self.conv = upsample.conv

    def forward(self, x: torch.Tensor, output_size: Sequence[int] | None = None) -> torch.Tensor:
        """(B, C, h, w) to (B, C', *output_size), by default twice the size."""
        height, width = x.shape[2:]
        return self.conv(F.interpolate(x, output_size or (2 * height, 2 * width)))  # type: ignore[no-any-return]


class Shrinking(nn.Module):
    """A convolution of stride 2 that is right where it leaves one column: of two, the first.

    By itself, in bfloat16 on CPUs with AMX, it answers the first rows of a tall picture and whatever was in memory
    (oneDNN 3.12): in Stable Diffusion at 768 pixels, of pictures 12 times as high as wide.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        if x.shape[-1] > 4:
            return self.convolution(x)  # type: ignore[no-any-return]
        return self.convolution(F.pad(x, (0, 2)))[..., :-1]  # type: ignore[no-any-return]


def use_shrinking(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace, within `network`, the convolutions of stride 2, in bfloat16 on CPUs."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        replace(network, nn.Conv2d, lambda old: Shrinking(old) if old.stride == (2, 2) else old)


class ChannelsLastNorm(nn.Module):
    """`GroupNorm` of pictures whose channels lie last, read twice and written once; sums are float32 whatever they are.

    The variance is the mean square less the mean's square: good for half precision, where pictures have fewer digits
    than that loses. Rows are summed before columns, so that a compiler has thousands of sums to run at once.
    """

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the same shape."""
        B, C, H, W = x.shape
        rows = x.permute(0, 2, 3, 1)  # (B, H, W, C), as it lies
        each = H * W * (C // self.groups)

        def mean(by_row: torch.Tensor) -> torch.Tensor:  # (B, H, C) to (B, groups, 1)
            return by_row.sum(1).view(B, self.groups, -1).sum(2, keepdim=True) / each

        average = mean(rows.sum(2, dtype=torch.float32))
        square = mean(torch.linalg.vector_norm(rows, dim=2, dtype=torch.float32).square())
        variance = (square - average.square()).clamp(min=0)
        scale = self.weight.float().view(self.groups, -1) * (variance + self.eps).rsqrt()
        shift = self.bias.float().view(self.groups, -1) - average * scale
        # By way of rows, for the gradient's sums.
        scale, shift = (one.reshape(B, 1, 1, C).expand(B, H, 1, C) for one in (scale, shift))
        return torch.addcmul(shift, rows, scale).to(x.dtype).permute(0, 3, 1, 2)


def use_channels_last_norms(network: nn.Module, norm: Callable[[nn.GroupNorm], nn.Module] = ChannelsLastNorm) -> None:
    """Replace `GroupNorm` within `network`, where it is of (B, C, H, W): not within diffusers' own attention."""
    replace(network, nn.GroupNorm, lambda old: norm(old) if old.affine else old, outside=Attention)


def replace(
    network: nn.Module,
    kind: type[nn.Module] | tuple[type[nn.Module], ...],
    new: Callable[[Any], nn.Module],
    *,
    outside: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> None:
    """Put `new(child)` in place of every child of `kind` within `network`, but for the children of those `outside`."""
    for parent in list(network.modules()):
        if isinstance(parent, outside):
            continue
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, new(child))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention, each (B, heads, N, d).

    Where nothing fused is fast, a GPU's wide heads are plain products; scores are float32, as they are within it.
    """
    tokens, width = query.shape[-2:]
    if not _CAN_WIDEN or not query.is_cuda or width <= _FUSED_WIDTH or tokens > _MOST_TOKENS:
        return F.scaled_dot_product_attention(query, key, value)
    batch = query.shape[:2]
    query, key, value = (one.flatten(0, 1) for one in (query, key, value))
    scores = torch.bmm(query, key.mT, out_dtype=torch.float32) * width**-0.5
    # Divided by their sum at the end: the largest weight is 1, which rounding leaves alone.
    weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
    attended = torch.bmm(weights.to(value.dtype), value, out_dtype=torch.float32) / weights.sum(dim=-1, keepdim=True)
    return attended.to(value.dtype).unflatten(0, batch)  # type: ignore[no-any-return]


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these."""
    return filled(empty(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None), weight, bias)


def empty(kind: Callable[..., Layer], *sizes: Any, **options: Any) -> Layer:
    """A new layer, float32, without the random numbers that fill it: they take time, and from torch's generator."""
    return kind(*sizes, **options, dtype=torch.float32, device="meta").to_empty(device="cpu")


def filled(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """The same layer with these; no bias is zero."""
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)
    return layer
