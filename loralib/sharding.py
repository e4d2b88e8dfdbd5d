"""Models whose parameters are spread over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is one of several processes' parts of it, a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported, nothing is sharded
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Any) -> torch.Tensor:
    """The whole of a tensor, gathered if it is sharded: then all processes call this together."""
    if not is_sharded(tensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # offloaded parts cannot be gathered where they lie


def put(tensor: Any, value: torch.Tensor) -> None:
    """Write ``value``, the same in all processes, into a tensor, or into this process's part of it."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(tensor.device, tensor.dtype)
        device = tensor.device_mesh.device_type
        value = distribute_tensor(value.to(device), tensor.device_mesh, tensor.placements)
    if value is not tensor:
        tensor.copy_(value)


def at_rest(model: nn.Module) -> bool:
    """Have parameters that a pass left whole be parts again, and say whether the model is sharded.

    After a pass the outermost parameters stay whole for the next one; what is written into them then would be lost.
    """
    found = _spread(model)
    for module in found:
        module.reshard()
    return bool(found)


def is_sharded_model(model: nn.Module) -> bool:
    """Whether FSDP2 spreads a part of the model."""
    return bool(_spread(model))


def _spread(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called with."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, nothing is spread
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


@contextlib.contextmanager
def without_fsdp(model: nn.Module) -> Iterator[None]:
    """Within, a sharded model is whole, and its passes are each process's own. All processes enter and leave it."""
    found, parts = _spread(model), []
    for module in found:  # what was whole before, as the outermost within a pass, stays so
        inner = {p for other in found if other is not module and _holds(module, other) for p in other.parameters()}
        if any(is_sharded(p) for p in module.parameters() if p not in inner):
            parts.append(module)
        module.unshard()
    try:
        with _without_marks(model):
            yield
    finally:
        for module in parts:
            module.reshard()


def _holds(module: nn.Module, other: nn.Module) -> bool:
    return any(one is other for one in module.modules())


def is_managed(module: nn.Module) -> bool:
    """Whether FSDP looks after a module, even while its parameters are whole."""
    return module.__dict__.get("_is_fsdp_managed_module", False)


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
    taken: list[tuple[nn.Module, type, dict[str, Any]]] = []
    spread = set(_spread(model))
    for module in list(model.modules()):
        kind, marks = type(module), {}
        if module in spread:
            module.__class__ = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]  # FSDPX, FSDPModule, X
        for name, value in list(vars(module).items()):
            # The last: what register_fsdp_forward_method puts before a method of the class, as Trainer has it done.
            wrapped = hasattr(getattr(value, "__func__", None), "__wrapped__") and hasattr(type(module), name)
            if wrapped or name.startswith(("__composable_api_state", "_is_fsdp", "_fsdp_use")):
                marks[name] = module.__dict__.pop(name)
            elif name.endswith("_hooks") and isinstance(value, dict) and any(map(_of_fsdp, value.values())):
                marks[name] = value
                module.__dict__[name] = OrderedDict((key, hook) for key, hook in value.items() if not _of_fsdp(hook))
        taken.append((module, kind, marks))
    try:
        yield
    finally:
        for module, kind, marks in taken:
            module.__class__ = kind
            module.__dict__.update(marks)


def _of_fsdp(hook) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")


def by_one_process(sharded: bool, write: Callable[[], None]) -> None:
    """Call ``write``; for a sharded model in the first process alone, and all return when it is done."""
    if not sharded:
        return write()
    try:
        if torch.distributed.get_rank() == 0:
            write()
    finally:
        torch.distributed.barrier()
