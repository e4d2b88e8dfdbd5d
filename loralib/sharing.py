"""Run one batch at several ranks and compute once what the ranks share."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .layers import LoRALayer
from .model import lora_layers


@contextlib.contextmanager
def share_between_ranks(model: nn.Module) -> Iterator[Callable[[dict], None]]:
    """Within the body, what does not depend on the rank runs once per batch, however many ranks the batch is run at.

    That is every module without an adapter inside whose inputs no adapter has touched (embeddings, the first adapted
    block's other projections), and W0 x of an adapted layer with such an input. The body gets a function to call with each
    batch's inputs before running it; inputs are recognised by identity, so run every rank on these same tensors. For
    inference only (eval mode, no gradient). What is kept is freed at the next batch: the embeddings' output and a few
    tensors of its size, whatever r_max is.

        with torch.no_grad(), share_between_ranks(model) as new_batch:
            new_batch(inputs)
            for b in range(1, 9):
                with use_rank(model, b):
                    model(**inputs)
    """
    untouched: dict[int, torch.Tensor] = {}  # tensors that are the same at every rank, by id (and so kept alive)
    kept: dict[tuple, torch.Tensor] = {}

    def once(module: nn.Module, compute):
        def run(*args, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            if not tensors or any(id(tensor) not in untouched for tensor in tensors):
                return compute(*args, **kwargs)
            key = (id(module), *map(id, args), *((name, id(value)) for name, value in kwargs.items()))
            if key not in kept:
                output = compute(*args, **kwargs)
                if not isinstance(output, torch.Tensor):
                    return output
                kept[key] = untouched[id(output)] = output
            return kept[key]

        return run

    def new_batch(inputs: dict) -> None:
        kept.clear()
        untouched.clear()
        untouched.update((id(value), value) for value in inputs.values() if isinstance(value, torch.Tensor))

    replaced = []

    def replace(module: nn.Module, name: str) -> None:
        replaced.append((module, name, module.__dict__.get(name)))
        setattr(module, name, once(module, getattr(module, name)))

    adapted = {layer for _, layer in lora_layers(model)}

    def visit(module: nn.Module) -> None:
        """Replace the forward of the largest modules that hold no adapter, and the base of the adapted layers."""
        if isinstance(module, LoRALayer) and module in adapted:
            replace(module, "base")
        elif adapted.isdisjoint(module.modules()):
            replace(module, "forward")
        else:
            for child in module.children():
                visit(child)

    try:
        visit(model)
        yield new_batch
    finally:
        for module, name, before in replaced:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)
