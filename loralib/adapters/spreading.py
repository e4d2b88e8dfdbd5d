"""Ranks that importance spread over the layers (``loralib.importance``), in an adapter's files."""

from ..layers import LoRALayer
from .peft_format import PREFIX, clean


def file_name(name: str) -> str:
    """What files call a layer of a model, PEFT's prefix left out."""
    return clean(name).removeprefix(PREFIX)


def spread_facts(layers: list[tuple[str, LoRALayer]], rank: int) -> dict:
    """What dylora.json tells of an adapter saved at ``rank``: the counts of each rank as long as it is whole; cut, each
    layer has a rank of its own."""
    counts = {file_name(name): list(layer.components_at) for name, layer in layers if layer.components_at}
    if not counts:
        return {}
    return {"components_at": counts} if rank == max(layer.r for _, layer in layers) else {"spread": True}


def take_spread(layers: list[tuple[str, LoRALayer]], facts: dict) -> None:
    """Give the layers of a model the counts of a file."""
    counts = facts.get("components_at") or {}
    for name, layer in layers:
        own = counts.get(file_name(name))
        layer.components_at = tuple(own) if own else None
