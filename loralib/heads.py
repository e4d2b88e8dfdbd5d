"""The modules that train in full beside an adapter and are saved with it: a classifier's head, or what was named."""

import inspect
import re

from torch import nn

# Classifier classes of transformers: their head is new, trained in full and saved with the adapter.
_CLASSIFIER = re.compile(r"For(\w*Classification|MultipleChoice|QuestionAnswering)$")


def default_head(model: nn.Module) -> list[str]:
    """The direct children of a transformers classifier that are not its base model."""
    if not any(_CLASSIFIER.search(cls.__name__) for cls in type(model).__mro__):
        return []
    base = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())]


def modules_to_save(model: nn.Module) -> list[str]:
    """The modules that train in full beside the adapter: what ``inject`` was told, else a classifier's head."""
    return getattr(model, "lora_modules_to_save", default_head(model))


def is_inside(name: str, heads: list[str]) -> bool:
    """Whether a module or parameter name is one of ``heads`` or within it."""
    return any(f".{head}." in f".{name}." for head in heads)


def tied(model: nn.Module, heads: list[str]) -> list[tuple[nn.Module, str]]:
    """The parameters, as (module, name), of modules to save that a module which stays frozen has too (a tied
    ``lm_head``).

    They get a copy to train, as in PEFT. Raises ValueError for a model that computes otherwise when they are not tied.
    """
    parameters = [
        (module, name, parameter, is_inside(f"{where}.{name}", heads))
        for where, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    frozen = {id(parameter) for _, _, parameter, trains in parameters if not trains}
    tied = [(module, name) for module, name, parameter, trains in parameters if trains and id(parameter) in frozen]
    if tied and "tie_word_embeddings" in inspect.unwrap(type(model).forward).__code__.co_names:
        raise ValueError(
            f"modules_to_save names a module with tied weights, and {type(model).__name__} computes otherwise without "
            "the tie; leave it out of modules_to_save and adapt the layer instead."
        )
    return tied
