"""Models whose parameters are spread over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of several processes' parts of it, a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported, nothing is sharded
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> torch.Tensor:
    """The whole of a tensor, gathered if it is sharded: then all processes call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def put(tensor: Any, value: torch.Tensor) -> None:
    """Write ``value``, the same in all processes, into a tensor, or into this process's part of it."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    if value is not tensor:
        tensor.copy_(value)


def at_rest(model: nn.Module) -> bool:
    """Have parameters that a pass left whole be parts again, and say whether the model is sharded.

    After a pass the outermost parameters stay whole for the next one; what is written into them then would be lost.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    found = [] if module is None else [one for one in model.modules() if isinstance(one, module.FSDPModule)]
    for one in found:
        one.reshard()
    return bool(found)


def whole_copy(model: nn.Module) -> nn.Module:
    """A copy of a sharded model on the CPU, whole, that FSDP knows nothing of; all processes call this together."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): whole(tensor.detach()).cpu().clone() for tensor in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    with _without_marks(model):
        return copy.deepcopy(model, memo)


@contextlib.contextmanager
def _without_marks(model: nn.Module):
    """Within, modules are without what FSDP put on them: a class before their own, its state and its hooks."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    for module, kind, attributes in before:
        if isinstance(module, sys.modules["torch.distributed.fsdp"].FSDPModule):
            module.__class__ = kind.__mro__[2]  # FSDPX, FSDPModule, X
        for name, value in attributes.items():
            if name.startswith(("__composable_api_state", "_is_fsdp", "_fsdp_use")):
                del module.__dict__[name]
            elif name.endswith("_hooks") and isinstance(value, dict):
                module.__dict__[name] = OrderedDict((key, hook) for key, hook in value.items() if not _of_fsdp(hook))
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            module.__dict__.update(attributes)


def _of_fsdp(hook) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of several."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
