"""Run one batch at several ranks: compute once what the ranks share, and let small batches go through together."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .layers import LoRALayer
from .model import lora_layers

# A small batch leaves a machine idle between its products: ranks are stacked into one pass while it stays within this many
# tokens. Measured on a CPU (results/benchmark, "All ranks"): at 192 tokens all together take 0.64 to 0.78 of the time of one
# after the other, at 2,048 0.99 to 1.15 times as long.
STACKED_TOKENS = 2048


def passes(inputs: dict, ranks: list[int], stack: bool = True) -> list[tuple[list[int], object, dict]]:
    """How to run one batch at ``ranks``: for each forward pass its ranks, what to set, and its inputs.

    Args:
        inputs: the model's inputs; the first tensor's numbers are the tokens (``input_ids`` of a text model).
        stack: let several ranks share a pass, up to ``STACKED_TOKENS``; the layers must take one rank per example then. The
            rows of the output are those of the pass's first rank, then those of its second, ..

    A pass holds no more tokens than that or than the batch itself, however many ranks there are.
    """
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)
    size = len(first)
    together = max(1, STACKED_TOKENS // max(1, first.numel())) if stack else 1  # an image's numel is past any budget
    count = math.ceil(len(ranks) / together)
    groups = [ranks[i * len(ranks) // count : (i + 1) * len(ranks) // count] for i in range(count)]
    repeated = {1: inputs}
    for times in {len(group) for group in groups} - {1}:
        repeated[times] = {
            key: value.repeat(times, *[1] * (value.ndim - 1))
            if isinstance(value, torch.Tensor) and value.ndim
            else value
            for key, value in inputs.items()
        }
    return [
        (group, group[0] if len(group) == 1 else torch.tensor(group).repeat_interleave(size), repeated[len(group)])
        for group in groups
    ]


@contextlib.contextmanager
def share_between_ranks(model: nn.Module) -> Iterator[Callable[..., None]]:
    """Within the body, what does not depend on the rank runs once per batch, however many ranks the batch is run at.

    That is every module without an adapter inside whose inputs no adapter has touched (embeddings, the first adapted
    block's other projections), and W0 x of an adapted layer with such an input. The body gets a function to call with each
    batch's inputs (one dict or several) before running it; they are recognised by identity, so run these same tensors. For
    inference only (eval mode, no gradient). What is kept is freed at the next batch: the embeddings' output and a few
    tensors of its size, whatever r_max is.

        with torch.no_grad(), share_between_ranks(model) as new_batch:
            plan = passes(inputs, [1, 2, 3, 4])
            new_batch(*(own for _, _, own in plan))
            for ranks, rank, own in plan:
                with use_rank(model, rank):
                    model(**own)
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

    def new_batch(*batches: dict) -> None:
        kept.clear()
        untouched.clear()
        for value in (value for inputs in batches for value in inputs.values()):
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
