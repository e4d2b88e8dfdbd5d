"""What is refused among an adapter's tensors, in a file and before it is written."""

import re
from pathlib import Path

import torch

from .fingerprint import are_known
from .keys import factor_in, other_half


def refuse_facts_of_other_weights(facts: dict, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raise ValueError where another program wrote an adapter beside the dylora.json of an earlier one."""
    if "factors" in facts and not are_known(tensors, facts["factors"]):
        raise ValueError(f"{file} is of other weights than those beside it, which another program wrote: remove it.")


def refuse_half_pairs(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise ValueError for a factor without its other half, for halves of different ranks, and for what stands beside a
    layer's factors or in their place and is none."""
    layers = {found[0] for key in tensors if (found := factor_in(key))}
    for key, value in tensors.items():
        if factor_in(key) is None:
            layer, beside, _ = key.rpartition(".lora_")
            if beside and (layer in layers or re.search(r"\.lora_(embedding_)?[AB]\.", key)):
                raise ValueError(
                    f"{path} holds {key!r}, which is no factor of a plain LoRA as PEFT's save_pretrained writes them; "
                    "save the adapter so, without DoRA and biases."
                )
            continue
        other = other_half(key)
        if other not in tensors:
            raise ValueError(f"{path} holds {key!r} without {other!r}; the adapter is incomplete.")
        if value.ndim < 2 or (key < other and value.shape[0] != tensors[other].shape[1:2].numel()):
            raise ValueError(
                f"{path} holds {key!r} and {other!r} of shape {tuple(value.shape)} and {tuple(tensors[other].shape)}, "
                "which are no pair of factors; save the adapter anew."
            )


def refuse_bad_numbers(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise ValueError for a factor that is no float, and for what holds nan or inf. A module to save may count (the
    batches that a BatchNorm has seen)."""
    for key, value in tensors.items():
        if factor_in(key) and not value.is_floating_point():
            raise ValueError(f"{path} holds {key!r} in {value.dtype}; an adapter's numbers are floats.")
        if not torch.isfinite(value).all():
            raise ValueError(f"{path} holds numbers that are not finite ({key!r}): its training failed; train it anew.")


def refuse_failed_training(tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for numbers that are not finite among those to save."""
    bad = next((key for key, value in tensors.items() if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise ValueError(f"{bad!r} holds numbers that are not finite, and nothing was saved: the training failed.")
