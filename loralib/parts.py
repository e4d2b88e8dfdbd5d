"""What a rank of the model means in one of its layers, and back.

A layer takes as many components as the rank, or all that it has. Where importance spread the ranks over the layers
(``importance.py``), ``layer.components_at`` says how many the ranks 1..r_max take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .layers import LoRALayer


def part(layer: LoRALayer, rank: int) -> int:
    """How many of the layer's components a rank of the model takes."""
    if layer.components_at is None or not rank:
        return min(rank, layer.r)
    return layer.components_at[rank - 1]


def component_size(layer: LoRALayer) -> int:
    """How many numbers one component holds."""
    return (layer.lora_A.numel() + layer.lora_B.numel()) // layer.r


def own_ranks(layer: LoRALayer, ranks: torch.Tensor) -> torch.Tensor:
    """Ranks of the model (batch,), or weights of them (batch, r_max), as the layer's own."""
    weighted = ranks.is_floating_point()
    if layer.components_at is None:
        return ranks if weighted else ranks.clamp(max=layer.r)
    counts = torch.tensor([0, *layer.components_at], device=ranks.device)
    if not weighted:
        return counts[ranks]
    return ranks.new_zeros(len(ranks), layer.r + 1).index_add(1, counts[1:], ranks)[:, 1:]


def rank_of(layers: list[LoRALayer]) -> Any:
    """The rank that the layers of a model run at: an int, a LongTensor (batch,), or None after a gate."""
    widest = max(layers, key=lambda layer: layer.r)
    if widest.components_at is None or widest.get_rank() is None:
        return widest.get_rank()
    # The rank of which every layer has its part: (layers, .., ranks).
    parts = torch.tensor([[part(layer, b) for b in range(widest.r + 1)] for layer in layers], device="cpu")
    now = torch.stack([torch.as_tensor(layer.get_rank()).cpu() for layer in layers])
    rank = (parts.view(len(layers), *[1] * (now.ndim - 1), -1) == now[..., None]).all(0).long().argmax(-1)
    return rank if rank.ndim else int(rank)
