"""The loss of a batch, for what looks at a trained adapter through its loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Loss = Callable[[nn.Module, dict], torch.Tensor]


def on_device(batch: Any, device: torch.device) -> dict:
    """A batch with its tensors on a device."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, dict(batch))


def finite_loss(model: nn.Module, batch: dict, loss: Loss | None, what: str) -> torch.Tensor:
    """The scalar that ``loss`` gives (default: the ``loss`` that the model returns). Raises ValueError if it is no
    finite number, calling the batch ``what``."""
    value = model(**batch).loss if loss is None else loss(model, batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not torch.isfinite(value):
        raise ValueError(f"The loss of {what} is {value}; a finite number is needed.")
    return value.sum()
