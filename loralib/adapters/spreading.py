"""What a rank is in each layer, in an adapter's files: ranks that importance spread over the layers
(``loralib.importance``), and strengths of their own (``loralib.strengths``)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..layers import LoRALayer
from ..state import renew_gates
from .peft_format import PREFIX, clean


def file_name(name: str) -> str:
    """What files call a layer of a model, PEFT's prefix left out."""
    return clean(name).removeprefix(PREFIX)


def spread_facts(layers: list[tuple[str, LoRALayer]], rank: int) -> dict:
    """What dylora.json tells of an adapter saved at ``rank``: the counts of each rank as long as it is whole (cut, each
    layer has a rank of its own), and the strengths up to ``rank``, beside the one there."""
    strengths = {file_name(name): up_to(rank, layer.strength_at) for name, layer in layers if layer.strength_at}
    facts: dict = {"strength_at": strengths} if strengths else {}
    counts = {file_name(name): list(layer.components_at) for name, layer in layers if layer.components_at}
    if not counts:
        return facts
    return facts | ({"components_at": counts} if rank == max(layer.r for _, layer in layers) else {"spread": True})


def up_to(rank: int, strength_at: Sequence[float]) -> list[float]:
    """The factors of a layer's strengths, once the one at ``rank`` is part of lora_B."""
    kept = [float(factor) for factor in strength_at[:rank]]
    return [factor / kept[-1] for factor in kept]


def digest_of_strengths(facts: dict) -> dict:
    """What the weights' file tells of the strengths beside it."""
    told = facts.get("strength_at")
    return {"strengths": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]} if told else {}


def take_strengths_of(of_weights: dict, facts: dict, told: Path) -> None:
    """Leave out of ``dylora.json``'s facts strengths that the weights beside it do not name: they are of an earlier
    adapter. Raises ValueError where the weights name others. ``of_weights``: what their file tells."""
    named = of_weights.pop("strengths", None)
    if named is None:
        facts.pop("strength_at", None)
    elif digest_of_strengths(facts).get("strengths") != named:
        raise ValueError(f"{told} has not the strength_at of the weights beside it; save the adapter anew.")


def refuse_other_strengths(files: Any, told: Path) -> None:
    """Raise ValueError where the strengths that ``dylora.json`` tells are not those of a directory's layers."""
    if strengths := files.facts.get("strength_at"):
        held = {name: files.components(name, value) for _, name, factor, value in files.factors() if factor == "A"}
        if any(held.get(name) != len(own) for name, own in strengths.items()):
            raise ValueError(
                f"{told} has strength_at for other layers or ranks than the weights; save the adapter anew."
            )


def take_spread(layers: list[tuple[str, LoRALayer]], facts: dict) -> None:
    """Give the layers of a model the counts and strengths of a file."""
    changed = False
    for name, layer in layers:
        for fact in ("components_at", "strength_at"):
            own = (facts.get(fact) or {}).get(file_name(name))
            own = tuple(own) if own else None
            changed |= own != getattr(layer, fact)
            setattr(layer, fact, own)
    if changed:
        renew_gates([layer for _, layer in layers])
