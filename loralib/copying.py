"""Copies of models that torch would refuse to make."""

import copy
from typing import Any

import torch
from torch import nn

from .state import RankState


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """``copy.deepcopy(model, memo)``; a tensor that an attribute holds as the result of a computation (the weight under
    ``weight_norm``, a gate with a gradient) is copied as its value."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for each in (module, module.__dict__.get("_base")):
            for value in vars(each).values() if each is not None else ():
                tensor = value.gate if isinstance(value, RankState) else value
                if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                    memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(model, memo)


def replica_of_base(layer: nn.Module, base: nn.Module) -> nn.Module:
    """The base layer with the parameters of a replica of ours, which nn.DataParallel has put on another device."""
    replica = base._replicate_for_data_parallel()
    for name in (*base._parameters, *base._buffers):
        setattr(replica, name, getattr(layer, name))
    return replica
