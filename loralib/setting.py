"""What one micro-batch of a training runs at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .model import set_matryoshka_gate, set_rank
from .ordering import order_components
from .pacing import set_paces


@dataclass(frozen=True)
class Setting:
    """What one micro-batch runs at: a rank (as ``set_rank`` takes it), or the fixed gate of ``gate_ranks``.

    ``order``: the components are to be ordered first. ``paces``: at which they learn from now on, see
    ``pace_components``; None: as they do.
    """

    rank: int | torch.Tensor | None = None
    frozen: bool = False
    gate_ranks: tuple[int, ...] | None = None
    reduce: str = "sum"
    order: bool = False
    paces: tuple[float, ...] | None = None

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Order the components if it is time, the momenta of ``optimizer`` along with them, have them learn at their
        paces, and set the model.

        Raises ValueError for paces without an optimizer.
        """
        if self.paces is not None and optimizer is None:
            raise ValueError(
                "Components learn at paces of their own, which is a matter of the optimizer's step: give the optimizer "
                "too, or RankSchedule(paced=False)."
            )
        if self.order:
            order_components(model, optimizer)
        if self.paces is not None and optimizer is not None:
            set_paces(optimizer, model, self.paces)
        if self.gate_ranks is not None:
            set_matryoshka_gate(model, self.gate_ranks, self.reduce)
        else:
            set_rank(model, self.rank, self.frozen)
