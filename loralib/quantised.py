"""Base layers whose weight is stored in fewer bits: by bitsandbytes (4 and 8 bits) or torchao (int8)."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def is_quantised(weight: torch.Tensor) -> bool:
    """Whether a base weight's stored numbers are not its values. torchao's tensors call themselves floats, and 4-bit
    weights of bitsandbytes may be stored as such (``quant_storage``)."""
    weight = getattr(weight, "_local_tensor", weight)  # of one that FSDP spreads
    torchao = type(weight).__module__.startswith("torchao.")
    return torchao or not weight.is_floating_point() or getattr(weight, "bnb_quantized", False)


def stored_bytes(weight: Any) -> int:
    """What a quantised weight takes in memory, scales included where the tensor holds them."""
    names = [*getattr(weight, "tensor_data_names", ()), *getattr(weight, "optional_tensor_data_names", ())]
    parts = [getattr(weight, name, None) for name in names] or [weight]
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def say_what_merging_costs(layers: Iterable[Any]) -> None:
    """Warn where merging makes quantised layers whole: they take more memory then."""
    before = after = 0
    for layer in layers:
        if is_quantised(layer.weight):
            before += stored_bytes(layer.weight)
            after += layer.lora_A.shape[1] * layer.lora_B.shape[0] * 2
    if before:
        warnings.warn(
            f"Merging makes the quantised layers whole: {before / 2**20:.1f} MiB become {after / 2**20:.1f} MiB at two "
            "bytes a number.",
            stacklevel=3,
        )


def tell_what_is_whole(model: Any) -> None:
    """Have a model's configuration name the layers that are not quantised, which ``from_pretrained`` would expect to
    be; where none is left that is, it says nothing of quantising any more."""
    config: Any = getattr(model, "config", None)
    quantising = getattr(config, "quantization_config", None)
    if quantising is None:
        return
    linear = {
        name: is_quantised(module.weight)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2
    }
    if not any(linear.values()):
        del config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        return
    given = quantising if isinstance(quantising, dict) else vars(quantising)
    field = "llm_int8_skip_modules" if "llm_int8_skip_modules" in given else "modules_to_not_convert"
    given[field] = [name for name, is_stored_in_bits in linear.items() if not is_stored_in_bits]


def unpack(base: nn.Module) -> None:
    """Have a layer of bitsandbytes hold its weight as it was stored: on a CPU the first pass packs it in another way,
    which its own dequantisation does not know. Its ``state_dict`` undoes that in place."""
    if type(base).__module__.startswith("bitsandbytes."):
        base.state_dict()


def base_of(module: nn.Module) -> Any:
    """The base layer of an injected layer, which is no child of it; any other module itself."""
    base = module.__dict__.get("_base")
    return base if isinstance(base, nn.Module) else module


def keep_gradients(modules: Iterable[nn.Module]) -> None:
    """Turn that packing off in a model's modules, and undo it: a packed layer passes no gradient on, without a word, so
    that a training after an evaluation would learn through none of them (bitsandbytes 0.50)."""
    if "bitsandbytes" not in sys.modules:
        return
    for module in modules:
        base = base_of(module)
        if base.__dict__.get("support_avx512bf16_for_cpu", False):
            base.support_avx512bf16_for_cpu = False
            unpack(base)


@torch.no_grad()
def dequantised(base: Any) -> tuple[torch.Tensor, torch.dtype]:
    """The weight (out, in) that a quantised linear layer stands for, and the dtype that it computes in.

    PEFT knows the ways of storing; it is needed here alone.
    """
    if _in_8_bits(base):  # PEFT would move the weight, and the layer lose its scales (bitsandbytes 0.50)
        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return base.weight.data.float() * (scales.to(base.weight.device)[:, None] / 127), torch.float32
    from peft.utils.integrations import dequantize_module_weight

    unpack(base)
    weight = dequantize_module_weight(base)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return weight, getattr(base, "compute_dtype", None) or dtype


@contextlib.contextmanager
def row_by_row(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, 8-bit layers of bitsandbytes compute with the values that their weights stand for.

    LLM.int8 rounds what goes in to 8 bits, too: a last digit, which depends on the rows of a batch, becomes a step of
    8 bits and grows from layer to layer, until a row in a batch and the same alone have little in common.
    """
    bases = [base for base in map(base_of, modules) if _in_8_bits(base)]
    hooks = [base.register_forward_hook(_as_whole) for base in bases]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_8_bits(base: Any) -> bool:
    """Whether it is a layer of bitsandbytes with LLM.int8 weights."""
    return "bitsandbytes" in sys.modules and type(base._parameters.get("weight")).__name__ == "Int8Params"


def _as_whole(base: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """A hook: in the place of what the layer gave."""
    weight, _ = dequantised(base)
    x = args[0].to(output.device, torch.float32)
    found = nn.functional.linear(x, weight.to(x), None if base.bias is None else base.bias.to(x))
    return found.to(output.dtype)
