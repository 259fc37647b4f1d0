"""Layers for CPUs that multiply bfloat16, whose weights are laid out once: torch's own lay them out at every call.

There products are so fast that what is done to memory counts: laying out weights is half of a small picture's
convolution, and adding the shortcut half as long as the convolution before it, which here does it, too. The operators
are oneDNN's, those that `torch.compile` puts in such layers' place; torch has them under private names.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

# Of the pictures that the layout is chosen for; others have to be right, and were as fast.
_SIDE = 64


class _Packed(nn.Module):
    """A layer that is copied, or pickled, with plain weights: torch can do neither with those that are laid out."""

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        self.bias = layer.bias
        self._weight = self._laid_out(layer.weight.data)

    def _laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": self._weight.to_dense()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._weight = self._laid_out(self._weight)


class PackedConvolution(_Packed):
    """What a convolution answers, and its sum with another picture."""

    def __init__(self, convolution: nn.Conv2d):
        self._how = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        super().__init__(convolution)

    def _laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        shape = [1, weight.shape[1] * self._how[3], _SIDE, _SIDE]
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self._how, shape)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # which cannot look into the weights
    def forward(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """(B, inputs, h, w) to (B, outputs, h', w'), plus `added`, of that shape."""
        layer = (self._weight, self.bias, *self._how)
        if added is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *layer, "none", [], "")  # type: ignore[no-any-return]
        return torch.ops.mkldnn._convolution_pointwise.binary(x, added, *layer, "add", None, None, [], None)  # type: ignore[no-any-return]


class PackedLinear(_Packed):
    """What a linear layer answers."""

    def _laid_out(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, inputs) to (…, outputs)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


def packed(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """What a layer answers, its weights laid out if it is in bfloat16: on a CPU that `can_pack`, where it stays."""
    if layer.weight.dtype != torch.bfloat16:
        return layer
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return PackedConvolution(layer)
    return PackedLinear(layer) if type(layer) is nn.Linear else layer


@cache
def can_pack() -> bool:
    """Whether this CPU multiplies bfloat16, and torch's oneDNN has the operators."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        picture = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
        PackedConvolution(nn.Conv2d(1, 1, 1, dtype=torch.bfloat16))(picture, picture)
        PackedLinear(nn.Linear(2, 2, dtype=torch.bfloat16))(picture)
    except (AttributeError, RuntimeError, TypeError):  # other names, other arguments, none of it
        return False
    return True
