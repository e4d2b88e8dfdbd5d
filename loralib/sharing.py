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
    # Tensors that are the same at every rank, by id (and so kept alive), with their version: one that was edited in
    # place since is no longer what it was.
    untouched: dict[int, tuple[torch.Tensor, int]] = {}
    kept: dict[tuple, torch.Tensor] = {}

    def is_untouched(tensor: torch.Tensor) -> bool:
        return not tensor.is_inference() and id(tensor) in untouched and untouched[id(tensor)][1] == tensor._version

    def trust(tensor: torch.Tensor) -> None:
        untouched[id(tensor)] = tensor, -1 if tensor.is_inference() else tensor._version

    def once(module: nn.Module, compute):
        def run(*args, **kwargs):
            values = (*args, *kwargs.values())
            tensors = [value for value in values if isinstance(value, torch.Tensor)]
            simple = all(isinstance(value, (torch.Tensor, bool, int, float, str, type(None))) for value in values)
            if not tensors or not simple or not all(map(is_untouched, tensors)):
                return compute(*args, **kwargs)
            key = (
                id(module),
                len(args),
                *kwargs,
                *(id(v) if isinstance(v, torch.Tensor) else (type(v), v) for v in values),
            )
            output = kept.get(key)
            if output is None or not is_untouched(output):
                output = compute(*args, **kwargs)
                if isinstance(output, torch.Tensor):
                    kept[key] = output
                    trust(output)
            return output

        return run

    def new_batch(inputs: dict) -> None:
        kept.clear()
        untouched.clear()
        for value in inputs.values():
            if isinstance(value, torch.Tensor):
                trust(value)

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
        kept.clear()
        untouched.clear()
