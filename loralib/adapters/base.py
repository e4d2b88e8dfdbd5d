"""By which an adapter's files tell its base model from another of the same shape."""

from typing import Any

from ..layers import LoRALayer
from ..quantised import is_quantised
from .directory import AdapterFiles
from .fingerprint import fingerprint, is_known


def base_sample(layers: list[tuple[str, LoRALayer]]) -> dict:
    """16 values of the last adapted layer's W0, by which a file tells its base model from another of the same shape;
    nothing of a quantised one, whose numbers are no weights."""
    name, layer = layers[-1]
    weight = (layer._base_weight or [layer.weight])[0]
    return {} if is_quantised(weight) else {"base_sample": fingerprint(weight), "base_sample_of": name}


def check_base(layer: Any, files: AdapterFiles) -> None:
    """Raise ValueError if the file was trained on other weights (to bf16's precision) than the last adapted layer's."""
    sample = files.facts.get("base_sample") if layer is not None and not is_quantised(layer.weight) else None
    if sample and not is_known(layer.weight, sample):
        raise ValueError(
            f"{files.path} was trained on other base weights ({files.config.get('base_model_name_or_path')}); load "
            "that model first."
        )
