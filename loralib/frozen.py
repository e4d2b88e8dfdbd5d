"""Exact frozen training under any optimizer (paper, eq. 10)."""

import torch
from torch import nn

from .layers import LoRALayer
from .model import lora_layers
from .momenta import OWN, VALUE, kept_for, of_parameter, unwrapped_optimizer
from .sharding import whole


def freeze_undrawn(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.step()`` leave alone every component that was not drawn since the last step.

    A zero gradient is not enough: momentum and weight decay move a parameter all the same. From this call on, the
    components that no example, micro-batch or process drew keep their values bit for bit, and the optimizer's state
    for them (momenta) stays as it was, to the precision that it is stored in. Drawn are, with ``set_rank(...,
    frozen=True)``, the ranks themselves; without, components 1..b of every drawn b. They are known by their gradient at
    the step, which is 0 for all others: so what accumulates or is averaged over processes is counted, and a step that a
    GradScaler skips is not. Of a step with a closure (Lightning's) it is the gradient that the closure's first call
    leaves.

        model = lora.inject(...); optimizer = torch.optim.AdamW(...)
        lora.freeze_undrawn(optimizer, model)
    """
    optimizer = unwrapped_optimizer(optimizer)
    layers = [layer for _, layer in lora_layers(model)]
    undrawn: list[torch.Tensor] = []
    before_step: dict[tuple, torch.Tensor] = {}

    def parts():
        """(layer's number, factor, what is kept, its whole, this with the component as second dimension): each factor
        and its momenta. Means over components (Adafactor's) belong to none of them and are left out."""
        for i, layer in enumerate(layers):
            for factor, by_component in (("lora_A", layer.split_A), ("lora_B", layer.split_B)):
                parameter = getattr(layer, factor)
                for kept in [of_parameter(parameter), *kept_for(optimizer, parameter)]:
                    if not kept.is_shared:
                        value = kept.read()
                        yield i, factor, kept, value, by_component(value)

    # A subclass whose step calls its parent's has these called for both, one within the other; done twice they do the
    # same, so what was noted stays until the next step.
    def before(_, args, kwargs):
        before_step.clear()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args begin with the optimizer
        if closure is None:
            return note()

        def noting():
            loss = closure()
            if not before_step:
                note()
            return loss

        return (args[0], noting), {name: value for name, value in kwargs.items() if name != "closure"}

    @torch.no_grad()
    def note():
        undrawn[:] = [(~_has_gradient(layer)).nonzero().squeeze(1) for layer in layers]
        before_step.update(
            ((i, factor, kept.name), view[:, undrawn[i]].clone()) for i, factor, kept, _, view in parts()
        )

    @torch.no_grad()
    def after(*_):
        for i, factor, kept, value, view in parts():
            # What this step created begins, for what was not drawn, as if the step had not been: a momentum at zero, a
            # second set of values where the first one was.
            own = before_step[i, factor, OWN]
            began = own if kept.follows == VALUE else torch.zeros_like(own, dtype=view.dtype)
            view[:, undrawn[i]] = before_step.get((i, factor, kept.name), began)
            kept.write(value)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _has_gradient(layer: LoRALayer) -> torch.Tensor:
    """Which components have a gradient: bool (r,)."""
    found = torch.zeros(layer.r, dtype=torch.bool, device=layer.lora_A.device)
    for factor, by_component in ((layer.lora_A, layer.split_A), (layer.lora_B, layer.split_B)):
        if factor.grad is not None:
            found |= (by_component(whole(factor.grad)) != 0).transpose(0, 1).flatten(1).any(1)
    return found
