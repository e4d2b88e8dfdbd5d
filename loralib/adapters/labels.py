"""Labels by name: a class number means something only with the names of its source."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..heads import default_head, is_inside


def told(names: Sequence[str] | None, beside: Sequence[str] = ()) -> tuple[str, ...]:
    """``names`` if they say anything; () for none, for transformers' LABEL_0, LABEL_1, .. and for the outputs' own
    numbers 0, 1, .., unless ``beside``, what they are held against, has these numbers as names in another order."""
    names = tuple(map(str, names or ()))
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return ()
    numbers = tuple(map(str, range(len(names))))
    return names if names != numbers or (set(beside) == set(names) and tuple(beside) != numbers) else ()


def places(source: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """Where each of the ``wanted`` names stands in ``source``; None if they are not the same names.

    Upper and lower case do not count, unless two names of one side would then coincide.
    """
    fold = str.lower if all(len({n.lower() for n in names}) == len(names) for names in (source, wanted)) else str
    of = {fold(name): i for i, name in enumerate(source)}
    if of.keys() != {fold(name) for name in wanted} or len(source) != len(wanted):
        return None
    return [of[fold(name)] for name in wanted]


def names_of(model: nn.Module, beside: Sequence[str] = ()) -> tuple[str, ...]:
    """The label names in a transformers classifier's configuration, as far as they say anything (``told``)."""
    config: Any = getattr(model, "config", None)
    names = getattr(config, "id2label", None) or {}
    return told([names[i] for i in sorted(names)], beside)


def refuse_other_labels(model: nn.Module, stored: Sequence[str] | None, path: Any) -> None:
    """Raise ValueError where the labels of the file at ``path`` are not the model's, in its order."""
    wanted = names_of(model, stored or ())
    source = told(stored, wanted)
    if source and wanted and places(source, wanted) != list(range(len(wanted))):
        raise ValueError(
            f"{path} knows the labels {', '.join(source)}, the model {', '.join(wanted)}; give the base model those of "
            "the file, in that order."
        )


def output_keys(model: nn.Module, classes: int) -> list[str]:
    """The parameters of a classifier's head with a row for each class: those of its last linear layer of that size."""
    heads = default_head(model)
    layers = [
        name
        for name, module in model.named_modules()
        if is_inside(name, heads) and isinstance(module, nn.Linear) and module.out_features == classes
    ]
    return [f"{layers[-1]}.{kind}" for kind in ("weight", "bias")] if layers else []


@torch.no_grad()
def reorder_head(model: nn.Module, order: list[int]) -> None:
    """Put the rows of a classifier's output layer in another order: row i becomes what row ``order[i]`` was."""
    parameters = dict(model.named_parameters())
    for key in output_keys(model, len(order)):
        if key in parameters:
            parameters[key].copy_(parameters[key][order].clone())
