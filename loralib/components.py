"""The factors of a layer by component: component i is row i of lora_A and column i of lora_B, or, in a convolution and
a layer of several projections, several of them."""

from __future__ import annotations

import torch
from torch import nn


class Components(nn.Module):
    """The part of a layer that cuts its factors: what it needs of the layer stands first."""

    r: int
    rows: int
    projections: int
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def split_A(self, A: torch.Tensor) -> torch.Tensor:
        """View lora_A, whole or cut, with a dimension for the component: (projections, r, rows, in)."""
        return A.view(self.projections, len(A) // (self.projections * self.rows), self.rows, A.shape[1])

    def split_B(self, B: torch.Tensor) -> torch.Tensor:
        """View lora_B, whole or cut, with a dimension for the component: (out, r, rows)."""
        return B.view(len(B), B.shape[1] // self.rows, self.rows)

    def first_components(self, b: int, frozen: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors cut to rank b; with ``frozen``, all but component b cut off from the gradient."""
        if b == self.r and not frozen:
            return self.lora_A, self.lora_B
        A, B = self.cut(self.lora_A, self.lora_B, b)
        if frozen:
            A, B = self.split_A(A), self.split_B(B)
            A = torch.cat([A[:, : b - 1].detach(), A[:, b - 1 :]], dim=1).flatten(0, 2)
            B = torch.cat([B[:, : b - 1].detach(), B[:, b - 1 :]], dim=1).flatten(1, 2)
        return A, B

    def cut(self, A: torch.Tensor, B: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of rank r, cut to rank b."""
        return self.split_A(A)[:, :b].flatten(0, 2), self.split_B(B)[:, :b].flatten(1, 2)
