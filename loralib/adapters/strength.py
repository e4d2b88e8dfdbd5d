"""Whether a file's adapter and a model's layers have one strength."""

from ..gate import scale
from ..layers import LoRALayer
from . import peft_format
from .directory import AdapterFiles


def check_strength(layers: list[tuple[str, LoRALayer]], files: AdapterFiles) -> None:
    """Raise ValueError if the file was trained at another strength than the model's layers have."""
    for name, layer in layers:
        name = peft_format.clean(name).removeprefix(peft_format.PREFIX)
        rule = files.scaling_of(name)
        if rule != layer.scaling:
            raise ValueError(
                f"{files.path} was trained with scaling {rule!r}, the model has {layer.scaling!r}; use the file's."
            )
        # The strength at the file's rank, which may be below the model's.
        R, _ = files.rank_and_alpha(name)
        wanted = scale(R // peft_format.expansion(layer), layer.r, layer.lora_alpha, layer.scaling)
        share = files.strength(name) / wanted
        if abs(share - 1) > 1e-6:
            raise ValueError(
                f"{files.path} was trained with lora_alpha = {layer.lora_alpha * share:g}, the model has "
                f"{layer.lora_alpha:g}; use the file's."
            )
