"""The modules that train in full beside an adapter and are saved with it: a classifier's head, or what was named."""

import inspect
import re
import warnings

from torch import nn

from .walking import named_modules

# Classifier classes of transformers: their head is new, trained in full and saved with the adapter.
_CLASSIFIER = re.compile(r"For(\w*Classification|MultipleChoice|QuestionAnswering)$")


def default_head(model: nn.Module) -> list[str]:
    """The direct children of a transformers classifier that are not its base model, nor models by themselves (CLIP's
    image classifier calls its base otherwise than its prefix says)."""
    if not any(_CLASSIFIER.search(cls.__name__) for cls in type(model).__mro__):
        return []
    base = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != base and not _is_model(child) and any(True for _ in child.parameters())
    ]


def _is_model(module: nn.Module) -> bool:
    """Whether transformers has it as a model of its own; asked without importing transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def modules_to_save(model: nn.Module) -> list[str]:
    """The modules that train in full beside the adapter: what ``inject`` was told of the model or of a module inside
    it, else a classifier's head."""
    told = [(name, vars(module).get("lora_modules_to_save")) for name, module in named_modules(model)]
    if all(heads is None for _, heads in told):
        return default_head(model)
    return [f"{name}.{head}" if name else head for name, heads in told for head in heads or ()]


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


def say_what_moves_beside(modules: dict[str, nn.Module], heads: list[str]) -> None:
    """Warn of running statistics that a training would move though no adapter holds them: at rank 0, and after saving
    and loading, the model would compute otherwise."""
    kept = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if not is_inside(name, heads)
    ]
    if kept:
        warnings.warn(
            f"{kept[0]} (one of {len(kept)}) keeps running statistics, which move in training mode and belong to no "
            "adapter: name such modules in modules_to_save, or keep them in evaluation mode.",
            stacklevel=3,
        )
