"""The precision of autocast: which the processor has, and frozen weights held in it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def frozen_weights_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the body the frozen weights of the linear layers are held in ``dtype``; the originals come back
    afterwards.

    For work under ``torch.autocast(..., dtype)``, which rounds these weights in every forward pass: done once, the
    outputs and gradients are the same to the bit, a step saves the rounding, and autograd keeps no copies for the
    backward pass. Costs the memory of one copy, half the size of the weights. Parameters that train keep their
    precision.
    """
    replaced = []
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
        if weight is not None and not weight.requires_grad and weight.dtype == torch.float32:
            replaced.append((module, weight))
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in replaced:
            module.weight = weight


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16 products. Without them every product is emulated and a step takes
    about 20 times as long as in fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
