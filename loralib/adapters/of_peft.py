"""Adapters of a model of PEFT's (``loralib.peft``): saved and loaded through PEFT itself."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from ..layers import LoRALayer
from ..sharding import at_rest, by_one_process, put, whole
from .base import base_plan, warn_of_new_tokens
from .directory import cut_adapter, read_directory, write_adapter
from .keys import is_of_base
from .kinds import label_facts
from .labels import refuse_other_labels
from .refusing import refuse_failed_training
from .spreading import spread_facts, take_spread
from .strength import check_strength


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``get_peft_model`` made it; asked without importing PEFT."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def save_peft_adapter(
    model, layers: list[tuple[str, LoRALayer]], path: str | os.PathLike, rank: int, extra: dict | None
) -> None:
    """As ``save_adapter``: what PEFT would save of the active adapter, with ``dylora.json``, cut to ``rank``."""
    from peft import get_peft_model_state_dict

    adapter = active_with_ranks(layers)
    warn_of_new_tokens(model.get_base_model(), model.peft_config[adapter].modules_to_save or [])
    state = {
        key: whole(value) if "lora_" in key or "modules_to_save" in key else value
        for key, value in model.state_dict().items()
    }
    refuse_failed_training(get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False))
    by_one_process(at_rest(model), lambda: _write(model, state, adapter, layers, path, rank, extra))


def _write(model, state: dict, adapter: str, layers: list[tuple[str, LoRALayer]], path, rank: int, extra) -> None:
    _, first = layers[0]
    r_max = max(layer.r for _, layer in layers)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory, selected_adapters=[adapter], save_embedding_layers=False, state_dict=state)
        own = Path(directory) / adapter if adapter != "default" else Path(directory)
        files = read_directory(own)
        facts = {
            "rank": r_max,
            "r_max": r_max,
            "lora_alpha": first.lora_alpha,
            "scaling": first.scaling,
            **spread_facts(layers, r_max),
            **label_facts(model.get_base_model()),
            **(extra or {}),
        }
        write_adapter(own, files.tensors, files.config, facts)
        cut_adapter(own, path, rank)


def load_peft_adapter(model, layers: list[tuple[str, LoRALayer]], path: str | os.PathLike) -> None:
    """Load a directory of the same rank and targets into the active adapter. Raises ValueError for another one."""
    from peft import get_peft_model_state_dict

    adapter = active_with_ranks(layers)
    files = read_directory(path)
    own = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    weights = base_plan(model.state_dict(), files.tensors, files.path)
    stored = {key for key in files.tensors if not is_of_base(key)}
    for key in sorted(own.keys() ^ stored):
        raise ValueError(f"{path} and the model differ in {key!r}: it was made with other targets or modules to save.")
    for key, value in own.items():
        if value.shape != files.tensors[key].shape:
            raise ValueError(
                f"{path} holds {key!r} of shape {tuple(files.tensors[key].shape)}, the model has {tuple(value.shape)}; "
                "give DyLoraConfig the r of the file."
            )
    check_strength(layers, files)
    refuse_other_labels(model.get_base_model(), files.facts.get("labels"), path)
    state = model.state_dict()
    with torch.no_grad():
        for key, value in own.items():
            put(value, files.tensors[key])
        for key, value in weights.items():
            put(state[key], value)
    take_spread(layers, files.facts)


def active_with_ranks(layers: list[tuple[str, LoRALayer]]) -> str:
    """The active adapter that has ranks. Raises ValueError unless it is one."""
    names = {getattr(layer, "adapter", "default") for _, layer in layers}
    if len(names) != 1:
        raise ValueError(f"The adapters {', '.join(sorted(names))} are active together; set one with set_adapter.")
    return names.pop()
