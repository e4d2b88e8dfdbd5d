"""What one micro-batch of a training runs at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .model import set_matryoshka_gate, set_rank
from .ordering import order_components


@dataclass(frozen=True)
class Setting:
    """What one micro-batch runs at: a rank (as ``set_rank`` takes it), or the fixed gate of ``gate_ranks``.

    ``order``: the components are to be ordered first.
    """

    rank: int | torch.Tensor | None = None
    frozen: bool = False
    gate_ranks: tuple[int, ...] | None = None
    reduce: str = "sum"
    order: bool = False

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Order the components if it is time, the momenta of ``optimizer`` along with them, and set the model."""
        if self.order:
            order_components(model, optimizer)
        if self.gate_ranks is not None:
            set_matryoshka_gate(model, self.gate_ranks, self.reduce)
        else:
            set_rank(model, self.rank, self.frozen)
