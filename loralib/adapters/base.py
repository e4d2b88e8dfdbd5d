"""By which an adapter's files tell its base model from another, and what of a base model they do not hold."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ..heads import is_inside
from ..layers import LoRALayer
from ..quantised import is_quantised
from .directory import AdapterFiles
from .fingerprint import fingerprint, is_known
from .keys import is_of_base
from .peft_format import PREFIX


def base_sample(layers: list[tuple[str, LoRALayer]]) -> dict:
    """16 values of the last adapted layer's W0, by which a file tells its base model from another of the same shape;
    nothing of a quantised one, whose numbers are no weights."""
    name, layer = layers[-1]
    weight = (layer._base_weight or [layer.weight])[0]
    return {} if is_quantised(weight) else {"base_sample": fingerprint(weight), "base_sample_of": name}


def check_base(layer: Any, files: AdapterFiles) -> None:
    """Raise ValueError if the file was trained on other weights (to bf16's precision) than the last adapted layer's."""
    weight, sample = getattr(layer, "weight", None), files.facts.get("base_sample")
    if not sample or not isinstance(weight, torch.Tensor) or is_quantised(weight):
        return
    if not is_known(weight, sample):
        raise ValueError(
            f"{files.path} was trained on other base weights ({files.config.get('base_model_name_or_path')}); load "
            "that model first."
        )


def base_plan(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Weights of adapted layers themselves, which PEFT stores beside an adapter of embeddings or of an output layer
    (after a resizing their new rows are nowhere else): {parameter's name in ``state``: value}.

    Raises ValueError for another shape than the model's, and where the model's is quantised.
    """
    plan = {}
    for key, value in tensors.items():
        if not is_of_base(key):
            continue
        name = key if key in state else key.removeprefix(PREFIX).replace(".base_layer.", ".")
        own = state.get(name)
        if own is None or is_quantised(own) or own.shape != value.shape:
            has = "not" if own is None else "quantised" if is_quantised(own) else f"with {tuple(own.shape)}"
            raise ValueError(
                f"{path} holds {key!r} of shape {tuple(value.shape)}, which the model has {has}; resize its embeddings "
                "first (model.resize_token_embeddings)."
            )
        plan[name] = value
    return plan


def warn_of_new_tokens(model: Any, heads: list[str]) -> None:
    """Warn where the base model's embeddings were resized: the rows of new tokens are drawn anew at each resizing.

    ``heads`` are the modules that are saved beside. The base model's own configuration is looked for in its directory
    or the hub's cache.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
        text = getattr(config, "get_text_config", lambda: config)()
    except (NotImplementedError, ValueError):  # a model of sounds or images, or of several texts
        return
    if not isinstance(getattr(embeddings, "weight", None), torch.Tensor):
        return
    held = [key for key, module in model.named_modules() if module is embeddings and is_inside(key, heads)]
    before, now = _vocabulary_of(name), getattr(text, "vocab_size", None)
    if not held and before is not None and now is not None and before != now:
        warnings.warn(
            f"The embeddings have {now} tokens, those of {name} {before}: the adapter does not hold them, and resized "
            "anew they would be others. Save the base model itself once it is resized, before inject, and start from "
            "there.",
            stacklevel=3,
        )


def _vocabulary_of(name: str) -> int | None:
    """How many tokens a model knows, by its directory or the hub's cache; None where neither says."""
    from huggingface_hub import try_to_load_from_cache

    here = Path(name, "config.json")
    try:
        found = here if here.is_file() else try_to_load_from_cache(name, "config.json")
        table = json.loads(Path(found).read_text(encoding="utf-8")) if isinstance(found, (str, Path)) else {}
    except (OSError, ValueError):  # no name of the hub's, or no JSON
        return None
    size = (table.get("text_config") or table).get("vocab_size")
    return size if isinstance(size, int) else None
