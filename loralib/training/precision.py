"""The precision of autocast: which the processor has, and frozen weights held in it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def frozen_weights_in(model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> Iterator[None]:
    """Within the body the frozen weights of linear layers are held in ``dtype``; the originals come back afterwards.

    For work under ``torch.autocast(device, dtype)``, which rounds these weights in every forward pass: done once, the
    outputs and gradients are the same to the bit, a step saves the rounding, and autograd keeps no copies for the
    backward pass. In the model's first pass it is noted which layers are called there, and which ever without autocast
    (an output layer in fp32, say): the former without the latter are held so from the second pass on. Costs the memory
    of one copy, half the size of the weights. Parameters that train keep their precision.
    """
    under: set[nn.Module] = set()
    outside: set[nn.Module] = set()
    replaced: list[tuple[nn.Module, nn.Parameter]] = []

    def note(module: nn.Module, args: tuple) -> None:
        on = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == dtype
        (under if on else outside).add(module)

    def hold(*_) -> None:
        called = under - outside
        if not under | outside:
            return  # the first pass begins, or a pass within it has come here before
        end_noting()
        under.clear()
        outside.clear()
        for module in called:
            weight = module._parameters["weight"]
            assert weight is not None
            replaced.append((module, weight))
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def end_noting() -> None:
        while hooks:
            hooks.pop().remove()

    hooks = [model.register_forward_pre_hook(hold)]
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and not weight.requires_grad and weight.dtype == torch.float32:
            hooks.append(module.register_forward_pre_hook(note))
    try:
        yield
    finally:
        end_noting()
        for module, weight in replaced:
            module.weight = weight


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16 products. Without them every product is emulated and a step takes
    about 20 times as long as in fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
