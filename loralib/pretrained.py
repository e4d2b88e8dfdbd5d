"""What transformers' ``save_pretrained`` makes of a model with injected layers: a warning says it."""

import types
import warnings
from typing import Any

from torch import nn

from .layers import adapted_layers


def say_what_save_pretrained_leaves_out(model: nn.Module) -> None:
    """From here on ``model.save_pretrained`` warns, as long as the model has adapted layers. A bound method, which a
    copy of the model binds to itself."""
    if hasattr(type(model), "save_pretrained"):
        model.__dict__["save_pretrained"] = types.MethodType(save_pretrained, model)


def save_pretrained(model: Any, *args, **kwargs):
    # Pickle asks for a bound method by its function's name, and a model from there has its class's again.
    if adapted_layers(model):
        warnings.warn(
            f"save_pretrained writes a whole {type(model).__name__} with the factors beside, which from_pretrained "
            "passes over: keep the adapter with loralib.save_adapter(model, directory), or a plain model with "
            "loralib.merge(model, rank).save_pretrained(directory).",
            stacklevel=2,
        )
    return type(model).save_pretrained(model, *args, **kwargs)
