"""The inputs of a model's call, cut into the examples that they hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from .layout import Call

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Batch:
    """The inputs of a call, as leaves of a tree, with the dimension in which each leaf holds the examples, or None."""

    leaves: list[Any]
    spec: Any
    dims: tuple[int | None, ...]

    def example(self, i: int) -> Batch:
        cut = [
            leaf if dim is None else leaf.narrow(dim, i, 1) for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        return replace(self, leaves=cut)

    def mixed_up(self, seed: int) -> Batch:
        """The same shapes with other examples: each token (or row) is drawn from those of the batch.

        No value is new, so that none is out of range, and what belongs to one token in several inputs stays together.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn: dict[torch.Size, torch.Tensor] = {}
        leaves = []
        for leaf, dim in zip(self.leaves, self.dims, strict=True):
            if dim is not None:
                rows = leaf.shape[:2]
                if rows not in drawn:
                    drawn[rows] = torch.randint(rows.numel(), (rows.numel(),), generator=generator, device="cpu")
                leaf = leaf.flatten(0, len(rows) - 1)[drawn[rows].to(leaf.device)].view(leaf.shape)
            leaves.append(leaf)
        return replace(self, leaves=leaves)

    def inputs(self) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) for a pass; objects that a pass may change (caches) are copies."""
        leaves = [x if isinstance(x, (torch.Tensor, *PLAIN)) else copy.deepcopy(x) for x in self.leaves]
        return tree_unflatten(leaves, self.spec)


def batches(call: Call, n: int) -> list[Batch]:
    """The ways to cut a call's inputs into n examples: in the first dimension, in the second, or one of them first."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    found: dict[tuple, Batch] = {}
    of_transformers = hasattr(call.model, "main_input_name")  # whose models take the batch first
    for order in ((0,), (0, 1)) if of_transformers else ((0,), (0, 1), (1, 0), (1,)):
        dims = tuple(
            next((d for d in order if isinstance(x, torch.Tensor) and x.shape[d : d + 1] == (n,)), None) for x in leaves
        )
        if any(dim is not None for dim in dims):
            found.setdefault(dims, Batch(leaves, spec, dims))
    return list(found.values())
