"""What moves the weights: Muon those of the UNet that are matrices, AdamW all the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.training.from_scratch.network import Network

_ENDS = ("conv_in.", "conv_out.")  # of the UNet; the first and the last layer are AdamW's, as is usual with Muon


class Optimizer:
    """Two of torch's optimizers, which share a learning rate, as one.

    Muon (Jordan et al., 2024) moves a matrix by its momentum's nearest orthogonal matrix: as far in the many directions
    whose gradients are small as in the few that are mostly one batch's noise. A convolution's weight is the matrix
    (channels out, kernel x channels in). Steps are as large as AdamW's usually are (Liu et al., "Muon is Scalable for
    LLM Training", 2025, eq. 4), so that one learning rate suits both.
    """

    def __init__(self, net: Network, parameters: Sequence[nn.Parameter]):
        """Of the weights `parameters` of `net`, some or all.

        Raises:
            TrainingError: If torch has no Muon.
        """
        if not hasattr(torch.optim, "Muon"):
            raise TrainingError(f"torch is {torch.__version__}; a run with stages needs Muon, which torch >= 2.9 has")
        inner = {w for name, w in net.parts.unet.named_parameters() if w.ndim > 1 and not name.startswith(_ENDS)}
        weights = [weight for weight in parameters if weight in inner]
        others = [weight for weight in parameters if weight not in inner]
        # Views: what moves one moves the other.
        self._matrices = [(weight, nn.Parameter(_matrix(weight.detach()))) for weight in weights]
        self._parts: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(others, fused=True)}
        if self._matrices:
            matrices = [matrix for _, matrix in self._matrices]
            self._parts["muon"] = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both; `lr` is theirs to be set. Others than before once a state was loaded."""
        return [group for part in self._parts.values() for group in part.param_groups]

    def step(self) -> None:
        """Move all weights by their gradients."""
        for weight, matrix in self._matrices:
            matrix.grad = None if weight.grad is None else _matrix(weight.grad)
        for part in self._parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the moments of `state_dict`.

        Raises:
            TrainingError: If they are another optimizer's.
        """
        if state.keys() != self._parts.keys():
            raise TrainingError(
                f"the run's saved state is of {', '.join(state)}, expected {', '.join(self._parts)}: an earlier "
                "version began it, with another optimizer; train into another folder, or start over with overwrite"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])


def _matrix(weight: Tensor) -> Tensor:
    """A view of a weight (or its gradient), channels last if it is a convolution's, as a matrix."""
    return (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).view(len(weight), -1)
