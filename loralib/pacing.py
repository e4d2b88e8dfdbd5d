"""Components that learn at paces of their own, under any optimizer."""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import Embedding, LoRALayer
from .model import lora_layers
from .momenta import VALUE, kept_for, unwrapped_optimizer
from .sharding import put, whole


def pace_components(optimizer: torch.optim.Optimizer, model: nn.Module, paces: Sequence[float]) -> None:
    """Make each ``optimizer.step()`` change component k of the factor that starts at zero ``paces[k - 1]`` times as
    much.

    From this call on, a step that would take lora_B (of an Embedding lora_A) from B to B + D takes it to

        B[:, k] + paces[k] * D[:, k]

    which is that optimizer at ``paces[k]`` times the learning rate for these entries, weight decay included. The other
    factor and the optimizer's state are as they would be. Under Adam this is how a component would learn whose strength
    were ``paces[k]`` times as high: the factor is then as much smaller, and the update the same.

        model = lora.inject(...); optimizer = torch.optim.AdamW(...)
        lora.pace_components(optimizer, model, [8 / k for k in range(1, 9)])

    Raises ValueError unless there is a number above 0 for each component of every layer, if the optimizer holds none of
    the adapter's factors, and at the step if it keeps a second set of values (schedule-free optimizers), which a change
    behind its back would contradict.
    """
    optimizer = unwrapped_optimizer(optimizer)
    layers = [layer for _, layer in lora_layers(model)]
    for r in {layer.r for layer in layers}:
        if len(paces) != r or not all(0 < pace < float("inf") for pace in paces):
            raise ValueError(f"paces are {list(paces)}; give a number above 0 for each of the {r} components.")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    paced = [layer for layer in layers if id(_from_zero(layer)) in held]
    if not paced:
        raise ValueError(
            f"{type(optimizer).__name__} holds no parameter of the adapter: make it after inject, of what trains."
        )
    before: list[torch.Tensor] = []

    @torch.no_grad()
    def remember(*_):
        before[:] = [whole(_from_zero(layer)).clone() for layer in paced]

    @torch.no_grad()
    def scale_change(*_):
        for layer, old in zip(paced, before, strict=True):
            factor = _from_zero(layer)
            if any(kept.follows == VALUE for kept in kept_for(optimizer, factor)):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a second set of values, so that components cannot learn at "
                    "paces of their own; take another optimizer."
                )
            new = whole(factor)
            pace = torch.tensor(paces, dtype=torch.float32, device=new.device)
            pace = pace[:, None] if factor is layer.lora_B else pace[:, None, None]
            see = layer.split_B if factor is layer.lora_B else layer.split_A
            put(factor, (see(old) + pace * (see(new) - see(old))).view_as(new))
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale_change)


def _from_zero(layer: LoRALayer) -> nn.Parameter:
    """The factor that starts at zero."""
    return layer.lora_A if isinstance(layer, Embedding) else layer.lora_B
