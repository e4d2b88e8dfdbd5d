"""The loss of a batch, for what looks at a trained adapter through its loss."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Loss = Callable[[nn.Module, Any], torch.Tensor]


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; a mapping of any kind (a tokenizer's) is a dict then."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def finite_loss(model: nn.Module, batch: Any, loss: Loss | None, what: str) -> torch.Tensor:
    """The scalar that ``loss`` gives (default: the ``loss`` that the model returns, for a batch of keywords). Raises
    ValueError if it is no finite number, calling the batch ``what``, and TypeError where there is none."""
    if loss is None:
        output = model(**batch) if isinstance(batch, dict) else None
        if getattr(output, "loss", None) is None:
            raise TypeError(
                f"{type(model).__name__} gives no loss for {what}; give loss, a function of the model and a batch, or "
                "batches with labels, as the model is called."
            )
        value = output.loss  # type: ignore[union-attr]
    else:
        value = loss(model, batch)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not torch.isfinite(value):
        raise ValueError(f"The loss of {what} is {value}; a finite number is needed.")
    return value.sum()
