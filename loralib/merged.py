"""A plain model out of one with ranks."""

from typing import Any

import torch
from torch import nn

from .attending import attend_no_more
from .copying import deep_copy
from .inside_peft import merge_by_peft, refuse_add_adapter
from .layers import LoRALayer, adapted_layers
from .model import has_lora, lora_layers, set_rank
from .quantised import say_what_merging_costs, tell_what_is_whole
from .sharding import at_rest, whole_copy
from .walking import unwrapped


def merge(model: nn.Module, rank: int | None = None, inplace: bool = False) -> nn.Module:
    """A plain model, no loralib layer left, that computes what ``model`` computes at ``rank`` (default: the one in
    use).

    Works on a copy unless ``inplace``. A model of PEFT's is merged by PEFT, and comes back without PEFT's layers. Of a
    model under FSDP2 every process gets a whole copy on its CPU (all call this together). Raises ValueError while
    per-example ranks are set and no rank is given, and for ``inplace`` under FSDP2.
    """
    model = unwrapped(model)
    sharded = at_rest(model)
    if sharded and inplace:
        raise ValueError("The model is spread over processes by FSDP, and merging makes it whole: leave out inplace.")
    if not inplace:
        model = whole_copy(model) if sharded else deep_copy(model)
        # Accelerate and TRL put a forward of their own on a model, which runs the original from a copy too.
        model.__dict__.pop("forward", None)
    if rank is not None:
        for _, layer in lora_layers(model):
            layer.unmerge()
        if isinstance(rank, torch.Tensor):
            raise TypeError("rank is a tensor; a merged model has one rank, give an int.")
        set_rank(model, rank)
    refuse_add_adapter(model, lora_layers(model) if has_lora(model) else [], "merged")
    if hasattr(model, "merge_and_unload"):
        attend_no_more(model)
        return merge_by_peft(model)
    say_what_merging_costs(layer for _, layer in adapted_layers(model))
    stored: list[torch.Tensor] = []
    plain: dict[LoRALayer, nn.Module] = {}
    for name, layer in [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRALayer)]:
        if layer not in plain:  # one that stands in several places is one layer there
            layer.module_name = name
            plain[layer] = layer.to_plain()
            stored += layer._base_weight or []
        if not name:
            return plain[layer]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain[layer])
    attend_no_more(model)
    tell_what_is_whole(model)
    config: Any = getattr(model, "config", None)
    if getattr(config, "apply_lora", False):
        config.apply_lora = False
    others = {id(parameter) for parameter in model.parameters()}
    untied = getattr(model, "lora_untied", False) or any(id(weight) in others for weight in stored)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # tied again on loading, one of the two weights would be lost
        _untie(model)
    return model


def _untie(model: nn.Module) -> None:
    """Give each parameter that two modules share a copy of its own: nothing ties them any more once the model is
    loaded, and of two that are one its file would hold the first alone."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
