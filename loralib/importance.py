"""Components in the order of their importance over all layers, so that a rank's parameters go where they matter."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .inside_peft import warn_of_what_peft_drops
from .losses import Loss, finite_loss, on_device
from .model import lora_layers, max_rank, scaling_of, set_rank
from .parts import component_size
from .sharding import at_rest
from .walking import modes_of, put_modes


def component_importance(
    model: nn.Module, examples: Iterable[dict], loss: Loss | None = None
) -> dict[str, torch.Tensor]:
    """How much the loss depends on each component of each layer, at r_max: {layer's name: float tensor (r,)}.

    The Fisher information of a factor m_j = 1 of component j, a usual importance in pruning (Theis et al.,
    arXiv 1801.05787): the mean over examples i of

        (d loss_i / d m_j)^2

    Args:
        examples: batches of one example each, as the model is called, ``labels`` among them; a few hundred of the
            training data do. They are moved to the model's device.
        loss: of the model and an example; default the ``loss`` that the model returns.

    The model runs in evaluation mode, and keeps mode, ranks and gradients. Raises ValueError if there is no example, or
    a loss is no finite scalar; RuntimeError if a layer is merged.
    """
    layers = lora_layers(model)
    found = {name: torch.zeros(layer.r, device=layer.lora_A.device) for name, layer in layers}
    states, modes, count = [layer.state for _, layer in layers], modes_of(model), 0
    device = layers[0][1].lora_A.device
    model.eval()
    try:
        for example in examples:
            example = on_device(example, device)
            set_rank(model, max_rank(model))
            gates = [torch.full((layer.r,), layer.strength(), requires_grad=True, device="cpu") for _, layer in layers]
            for (_, layer), gate in zip(layers, gates, strict=True):
                layer.set_gate(gate)
            with torch.enable_grad():
                value = finite_loss(model, example, loss, f"example {count + 1}")
                gradients: Any = torch.autograd.grad(value, gates, allow_unused=True)
            for (name, _), gate, gradient in zip(layers, gates, gradients, strict=True):
                if gradient is not None:  # of a layer that was not called
                    found[name] += (gradient * gate.detach()).square().to(found[name].device)
            count += 1
    finally:
        put_modes(modes)
        for (_, layer), state in zip(layers, states, strict=True):
            layer.state = state
    if not count:
        raise ValueError("There are no examples to measure importance on; give a few hundred of the training data.")
    return {name: total / count for name, total in found.items()}


def spread(importance: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """How many components each layer keeps at each rank b = 1..r_max, if rank b may hold as many numbers as b
    components of every layer: {layer's name: (count at 1, .., count at r_max)}.

    Components are taken by importance per number, most first, while they fit; so what a rank keeps, the next keeps too.
    A layer's count may be 0. ``sizes``: the numbers of one component of each layer.
    """
    names = list(importance)
    owner = torch.cat([torch.full((len(importance[name]),), i, device="cpu") for i, name in enumerate(names)])
    size = torch.tensor([sizes[name] for name in names], device="cpu")[owner]
    score = torch.cat([importance[name].double().cpu() for name in names]) / size
    best = score.argsort(descending=True, stable=True)
    used = size[best].cumsum(0)
    ranks = [len(importance[name]) for name in names]
    counts = []
    for b in range(1, max(ranks) + 1):
        budget = sum(sizes[name] * min(b, r) for name, r in zip(names, ranks, strict=True))
        counts.append(owner[best[: int((used <= budget).sum())]].bincount(minlength=len(names)))
    return {name: tuple(int(count[i]) for count in counts) for i, name in enumerate(names)}


def order_by_importance(model: nn.Module, examples: Iterable[dict], loss: Loss | None = None) -> None:
    """Spread ranks over the layers, in place: from now on rank b of the model keeps the most important components of
    all layers, no more numbers than b components of every layer hold (``spread``).

    For an adapter whose training is over: call ``order_components`` first if its components are in no order. Within a
    layer the more important component comes first; ``layer.components_at`` says how many a rank takes, and adapters are
    saved and loaded with it. At r_max nothing changes. ``examples`` and ``loss``: see ``component_importance``.

    Raises ValueError unless all layers run at one strength (scaling "alpha/r"), for a model under FSDP2, and as
    ``component_importance``; nothing is changed then.
    """
    if scaling_of(model) != "alpha/r":
        raise ValueError(f"Ranks are spread over layers at scaling 'alpha/r'; this adapter has {scaling_of(model)!r}.")
    if at_rest(model):
        raise ValueError("The model is spread over processes by FSDP; order its saved adapter in one process.")
    importance = component_importance(model, examples, loss)
    layers = lora_layers(model)
    counts = spread(importance, {name: component_size(layer) for name, layer in layers})
    for name, layer in layers:
        order = importance[name].argsort(descending=True, stable=True).to(layer.lora_A.device)
        with torch.no_grad():
            layer.lora_A.copy_(layer.split_A(layer.lora_A)[:, order].flatten(0, 2))
            layer.lora_B.copy_(layer.split_B(layer.lora_B)[:, order].flatten(1, 2))
        layer.components_at, layer.strength_at = counts[name], None
    set_rank(model, max_rank(model))
    warn_of_what_peft_drops(model, "which components a rank has")
