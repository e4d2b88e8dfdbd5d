"""What a model of PEFT's asks of the functions for whole models; PEFT itself is not imported."""

import warnings
from typing import Any

from torch import nn


def refuse_layers_without_ranks(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    """Raise ValueError for a model of PEFT's whose active adapter should have ranks, on a layer made for a plain one:
    the layer would run at its full rank whatever is set."""
    holder: Any = next((module for _, module in modules if "peft_config" in module.__dict__), None)
    configs: Any = getattr(holder, "peft_config", {})
    active = _active(holder)
    ranked = {name for name in active if hasattr(configs.get(name), "rank_scaling")}
    if len(ranked) > 1:
        raise ValueError(f"The adapters {', '.join(sorted(ranked))} are active together; set one with set_adapter.")
    for name, module in modules if ranked else ():
        found = module._modules.get("lora_A") or module._modules.get("lora_embedding_A")
        factors = found if isinstance(found, (nn.ModuleDict, nn.ParameterDict)) else ()
        for adapter in ranked.intersection(factors).difference(module.__dict__.get("dylora_layers", ())):
            raise ValueError(
                f"The adapter {adapter!r} of a DyLoraConfig lies in {name!r}, which PEFT made for a plain LoraConfig, "
                "and has no ranks there; add the DyLoraConfig's adapter to the model first."
            )


def _active(holder: Any) -> list[str]:
    """The names of the active adapters; a model of transformers' with add_adapter has a method for them."""
    active = getattr(holder, "active_adapters", [])
    if callable(active):
        # Without add_adapter it knows of none: inject_adapter_in_model's are all active.
        known = getattr(holder, "_hf_peft_config_loaded", False)
        active = active() if known else list(getattr(holder, "peft_config", {}))
    return active if isinstance(active, list) else []


def refuse_add_adapter(model: nn.Module, layers: list[tuple[str, Any]], what: str) -> None:
    """Raise ValueError for layers of PEFT's that transformers' ``add_adapter`` put in: without a PeftModel around them
    PEFT can neither merge nor load."""
    inside = next((name for name, layer in layers if model.get_submodule(name) is not layer), None)
    if inside is not None and not hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"{inside} is PEFT's, put in by add_adapter, and cannot be {what} so; make the model with "
            "peft.get_peft_model, or save the adapter and load it with PeftModel.from_pretrained."
        )


def refuse_heads_of_add_adapter(model: nn.Module) -> None:
    """Raise ValueError for modules to save that PEFT wrapped in a model that is none of PEFT's: their names are known
    to whoever put them there."""
    for name, module in model.named_modules():
        if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            raise ValueError(
                f"{name} trains beside the adapter, put there by add_adapter or inject_adapter_in_model; save with "
                "model.save_pretrained, or make the model with peft.get_peft_model."
            )


def trained_beside_ranks(model: nn.Module) -> str | None:
    """An active adapter of PEFT's that trains and has no ranks, while another has; None if there is none."""
    configs: Any = getattr(model, "peft_config", {})
    active = _active(model) if configs else []
    plain = [name for name in active if not hasattr(configs.get(name), "rank_scaling")]
    training = [name for name, parameter in model.named_parameters() if parameter.requires_grad] if plain else []
    return next((one for one in plain if any(f".{one}." in f"{name}." for name in training)), None)


def merge_by_peft(model: Any) -> nn.Module:
    """What PEFT's ``merge_and_unload`` gives. An adapted weight that is tied to another gets a copy of its own first,
    since the update is one layer's alone; PEFT then says in the configuration that nothing is tied."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for module in model.modules():
        if not hasattr(module, "get_base_layer") or not hasattr(module, "merged_adapters"):
            continue
        base = module.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is not None and holders[id(weight)] > 1:
            holders[id(weight)] -= 1
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return model.merge_and_unload()


def warn_of_what_peft_drops(model: nn.Module, what: str) -> None:
    """Warn that a model of PEFT's has what only an adapter saved by us keeps."""
    if hasattr(model, "peft_config"):
        warnings.warn(
            f"PEFT's save_pretrained does not keep {what} here; save with loralib.save_adapter, at the rank that stock "
            "PEFT is to load.",
            stacklevel=3,
        )
