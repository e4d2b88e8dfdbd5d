"""A LoRA that is trained already, anybody's, made fit for cutting: its components in the order of their importance."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..ordering import ordered
from . import peft_format
from .directory import cut, read_directory, write_adapter


def squeeze_adapter(source: str | Path, target: str | Path) -> dict[int, float]:
    """Write the adapter of ``source`` (PEFT's format) to ``target`` with its components ordered; it can then be cut to
    any rank (``cut_adapter``, ``dylora export``).

    With ``lora_B @ lora_A = U S V^T`` in every layer, component j becomes the j-th singular pair, so that the first b
    are the nearest update of rank b (see ``loralib.order_components``). At its whole rank the adapter is what it was,
    and each layer keeps its strength at every rank: ``lora_alpha`` follows the rank. Modules saved beside the adapter
    stay as they are.

    Returns {rank b: the share of the update's squared norm, over all layers and with their strengths, that rank b
    keeps}. No base model is needed. Raises FileNotFoundError or ValueError, also for convolutions, whose factors PEFT's
    format stores in a form that has no such components.
    """
    files = read_directory(source)
    tensors = dict(files.tensors)
    keys: dict[str, dict[str, str]] = {}
    for key, name, factor, value in files.factors():
        if value.ndim > 2:
            raise ValueError(f"{files.path} adapts the convolution {name!r}, whose components cannot be ordered.")
        keys.setdefault(name, {})[factor] = key
    if not keys:
        raise ValueError(f"{files.path} holds no LoRA factors.")
    if files.facts.get("projections"):
        raise ValueError(f"{files.path} holds merged projections; order it in its model with loralib.order_components.")
    sizes: dict[str, tuple[int, float]] = {}
    squares: list[torch.Tensor] = []  # of each layer's components' norms
    for name, pair in keys.items():
        A, B = tensors[pair["A"]], tensors[pair["B"]]
        R, alpha = files.rank_and_alpha(name)
        if A.shape[0] != R:
            raise ValueError(f"{files.path} says rank {R} for {name!r}, whose factors have {A.shape[0]}.")
        strength = alpha / (R**0.5 if files.config.get("use_rslora") else R)
        new_A, new_B, _ = ordered(A.double(), B.double())
        tensors |= {pair["A"]: new_A.to(A.dtype).contiguous(), pair["B"]: new_B.to(B.dtype).contiguous()}
        sizes[name] = R, peft_format.tidy(strength * R)
        # Rows of lora_A are orthogonal, so a component's norm is the product of its factors' norms.
        squares.append(strength**2 * new_A.square().sum(1) * new_B.square().sum(0))
    r_max = max(R for R, _ in sizes.values())
    config = files.config | peft_format.patterns(sizes) | {"use_rslora": False}
    facts = {"lora_alpha": config["lora_alpha"], **files.facts}
    for name in ("components_at", "strength_at", "scalings"):  # of another order, and of other rules
        facts.pop(name, None)
    facts |= {"rank": r_max, "r_max": r_max, "scaling": "alpha/r", "ordered": True, "squeezed": True}
    write_adapter(target, tensors, config, facts)
    whole = max(float(sum(each.sum() for each in squares)), torch.finfo().tiny)
    return {b: float(sum(each[:b].sum() for each in squares)) / whole for b in range(1, r_max + 1)}


@dataclass(frozen=True)
class Size:
    """What an adapter has at a rank: numbers in its factors, layers with a component, the most that a layer has."""

    parameters: int
    layers: int
    most: int


def rank_sizes(source: str | Path) -> dict[int, Size]:
    """{rank: its ``Size``} of the adapter in a directory. Raises as ``read_directory``."""
    files = read_directory(source)
    sizes = {}
    for b in range(1, files.rank + 1):
        at_b = cut(files, b)
        ranks = [value.shape[0] for _, _, factor, value in at_b.factors() if factor == "A"]
        sizes[b] = Size(at_b.parameters()[0], len(ranks), max(ranks))
    return sizes
