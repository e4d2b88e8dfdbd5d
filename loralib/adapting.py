"""Which layer adapts a module: the table behind ``inject``."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .convolution import Conv2d
from .layers import Embedding, Linear, LoRALayer
from .quantised import is_quantised

CONV_GEOMETRY = (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice")


def can_adapt(module: nn.Module) -> bool:
    """Whether ``module`` is of a kind that ``around`` takes, from its type alone."""
    return _kind(module) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: nn.Linear, a subclass, or Hugging Face's Conv1D."""
    return _kind(module) in (nn.Linear, object)


def around(module: Any, **adapter) -> LoRALayer | None:
    """The layer that adapts ``module`` and holds it as its base layer, or None if there is none.

    nn.Linear, Hugging Face's Conv1D, nn.Embedding, nn.Conv2d, and their subclasses so far as these compute what they
    do: a Linear W0 x + bias, an Embedding its row times ``embed_scale``. That is tried out on one input, where the
    weights are there. Quantised linear layers of bitsandbytes and torchao are taken as they are. ``adapter``: r,
    lora_alpha, lora_dropout, scaling.
    """
    kind = _kind(module)
    if kind is None or not _computes_as(kind, module):
        return None
    if kind is nn.Linear:
        geometry = {name: getattr(module, name) for name in nn.Linear.__constants__}
        return Linear.around(module, {**geometry, "fan_in_fan_out": False}, **adapter)
    if kind is nn.Conv2d:
        geometry = {name: getattr(module, name) for name in CONV_GEOMETRY}
        return Conv2d.around(module, {**geometry, "rows": module.kernel_size[0]}, **adapter)
    if kind is nn.Embedding:
        adapter.pop("lora_dropout", None)  # as in microsoft/LoRA, an index has no dropout
        geometry = {name: getattr(module, name) for name in nn.Embedding.__constants__}
        return Embedding.around(module, geometry, **adapter)
    rows, columns = module.weight.shape  # Conv1D stores (in, out)
    return Linear.around(module, {"in_features": rows, "out_features": columns, "fan_in_fan_out": True}, **adapter)


def adapt(modules: dict[str, Any], options: dict[str, tuple[int, float]], **adapter) -> dict[str, LoRALayer]:
    """Make the layers for ``options``, {name: (r, alpha)}: {name: layer}, once for a module under several names.

    Raises ValueError that names the first module that cannot be adapted; then none is, and all are as they were.
    """
    layers: dict[str, LoRALayer] = {}
    trained = {name: modules[name].weight.requires_grad for name in options if "weight" in modules[name]._parameters}
    try:
        for name, (rank, alpha) in options.items():
            module = modules[name]
            if any(layer.base_layer is module for layer in layers.values()):
                continue
            layer = around(module, r=rank, lora_alpha=alpha, **adapter)
            if layer is None:
                raise ValueError(
                    f"{name} is a {type(module).__name__}, which computes in its own way and cannot be adapted; leave "
                    "it out of target_modules."
                )
            layers[name] = layer
    except BaseException:
        for name, requires_grad in trained.items():  # a layer shares its base layer's parameters
            for factor in ("lora_A", "lora_B"):
                modules[name]._parameters.pop(factor, None)
            modules[name].weight.requires_grad_(requires_grad)
        raise
    return layers


def _kind(module: nn.Module) -> type | None:
    """The plain type that ``module`` is, or derives from; ``object`` stands for Conv1D, which lives in transformers."""
    if isinstance(module, (LoRALayer, NonDynamicallyQuantizableLinear)) or "weight" not in module._parameters:
        return None  # nn.MultiheadAttention never calls its NonDynamicallyQuantizableLinear
    if isinstance(module.weight, UninitializedParameter):
        return None  # it has no shape yet
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return object
    if type(module) is nn.Conv2d:
        return nn.Conv2d
    return next((kind for kind in (nn.Linear, nn.Embedding) if isinstance(module, kind)), None)


def _of_bitsandbytes(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes: a subclass that computes what nn.Linear does."""
    return type(module).__module__.startswith("bitsandbytes.nn") and isinstance(module, nn.Linear)


@torch.no_grad()
def _computes_as(kind: type, module: Any) -> bool:
    """Whether a subclass gives, for one input, what the plain type gives: then one update is right for both."""
    weight = module.weight
    if is_quantised(weight) or _of_bitsandbytes(module):
        return type(module) is nn.Linear or _of_bitsandbytes(module)
    if type(module) is kind or kind is object or weight.is_meta:
        return True
    try:
        if kind is nn.Linear:
            x = torch.linspace(-1, 1, module.in_features, dtype=weight.dtype, device=weight.device)[None]
            return torch.allclose(module(x), nn.functional.linear(x, weight, module.bias), rtol=1e-3, atol=1e-4)
        x = torch.arange(min(2, module.num_embeddings), device=weight.device)[None]
        wanted = nn.functional.embedding(x, weight) * getattr(module, "embed_scale", 1.0)
        return torch.allclose(module(x).to(wanted.dtype), wanted, rtol=1e-3, atol=1e-4)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # it takes other inputs, or gives other shapes
