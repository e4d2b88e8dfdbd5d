"""Methods of transformers' models that do not know injected layers, and say so after ``inject``."""

import types
import warnings
from typing import Any

from torch import nn

from .layers import LoRALayer, adapted_layers


def guard_pretrained(model: nn.Module) -> None:
    """From here on, as long as the model has adapted layers, ``save_pretrained`` warns of what it leaves out, and
    ``resize_token_embeddings`` refuses what would lose an adapter."""
    for guard in (save_pretrained, resize_token_embeddings):
        if hasattr(type(model), guard.__name__):
            # Bound, so that a copy of the model has its own. Pickle asks for it by the function's name, and a model
            # from there has its class's method again.
            model.__dict__[guard.__name__] = types.MethodType(guard, model)


def save_pretrained(model: Any, *args, **kwargs):
    if adapted_layers(model):
        warnings.warn(
            f"save_pretrained writes a whole {type(model).__name__} with the factors beside, which from_pretrained "
            "passes over: keep the adapter with loralib.save_adapter(model, directory), or a plain model with "
            "loralib.merge(model, rank).save_pretrained(directory).",
            stacklevel=2,
        )
    return type(model).save_pretrained(model, *args, **kwargs)


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args, **kwargs):
    both = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    for which, embeddings in both.items():
        if isinstance(embeddings, LoRALayer) and embeddings.r and new_num_tokens not in (None, len(embeddings.weight)):
            raise ValueError(
                f"The {which} embeddings have an adapter for {len(embeddings.weight)} tokens, which "
                f"resize_token_embeddings({new_num_tokens}) would lose; call it before inject."
            )
    return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
