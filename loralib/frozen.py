"""Exact frozen training under any optimizer (paper, eq. 10)."""

import torch
from torch import nn

from .model import lora_layers


def freeze_undrawn(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.step()`` leave alone every component that was not drawn since the last step.

    A zero gradient is not enough: momentum and weight decay move a parameter all the same. From this call on, the
    components that no example, micro-batch or process drew keep their values bit for bit, and the optimizer's state
    for them (momenta) stays as it was. Drawn are, with ``set_rank(..., frozen=True)``, the ranks themselves; without,
    components 1..b of every drawn b.

        model = lora.inject(...); optimizer = torch.optim.AdamW(...)
        lora.freeze_undrawn(optimizer, model)

    In a distributed run all processes must call it, and step together; they exchange one small tensor a step.
    """
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer._drawn = torch.zeros(layer.r, dtype=torch.bool, device=layer.lora_A.device)
    undrawn: list[torch.Tensor] = []
    kept: dict[tuple, torch.Tensor] = {}

    def tensors():
        """(key, layer's number, tensor with the component as second dimension): each factor and its momenta."""
        for i, layer in enumerate(layers):
            for factor, by_component in (("lora_A", layer.split_A), ("lora_B", layer.split_B)):
                parameter = getattr(layer, factor)
                state = {"": parameter, **optimizer.state.get(parameter, {})}
                for name, tensor in state.items():
                    if isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape:
                        yield (i, factor, name), i, by_component(tensor.detach())

    @torch.no_grad()
    def before(*_):
        drawn = torch.cat([layer._drawn for layer in layers]).to(torch.uint8)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(drawn, torch.distributed.ReduceOp.MAX)
        masks = drawn.bool().split([layer.r for layer in layers])
        undrawn[:] = [(~mask).nonzero().squeeze(1) for mask in masks]
        kept.update((key, view[:, undrawn[i]].clone()) for key, i, view in tensors())

    @torch.no_grad()
    def after(*_):
        for key, i, view in tensors():
            # A momentum that this step created starts at zero for what was not drawn, as if the step had not been.
            view[:, undrawn[i]] = kept.get(key, torch.zeros((), dtype=view.dtype, device=view.device))
        kept.clear()
        for layer in layers:
            layer._drawn.zero_()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
