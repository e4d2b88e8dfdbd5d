"""Which layers of a model an adapter goes to, and at which rank: the words of PEFT's ``LoraConfig``."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from .adapting import can_adapt, is_linear
from .checks import check_int
from .heads import is_inside

ALL_LINEAR = "all-linear"


def matches(name: str, targets: str | Collection[str], what: str = "target_modules") -> bool:
    """Whether a layer's name is one of a list or ends with one.

    A string is a regular expression for the whole name, or one ending.
    """
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None or name.endswith("." + targets)
        except re.error as error:
            raise ValueError(
                f"{what} = {targets!r} is no regular expression ({error}); give one, or a list of names."
            ) from None
    return any(name == target or name.endswith("." + target) for target in targets)


def usual_targets(model: nn.Module) -> list[str] | str:
    """The layers that PEFT adapts in this architecture if it is told nothing, by its own table.

    Raises ValueError where PEFT is not installed, or has no entry for the model.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    advice = f"give target_modules, names of layers or {ALL_LINEAR!r}."
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
    except ImportError:
        raise ValueError(
            f"The usual layers of a model are looked up in PEFT, which is not installed; {advice}"
        ) from None
    if kind not in table:
        raise ValueError(f"PEFT's table has no usual layers for {kind or type(model).__name__}; {advice}")
    found = table[kind]
    return found if isinstance(found, str) else list(found)


def chosen_layers(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    heads: list[str],
    target_modules: str | Collection[str] | None,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
) -> list[str]:
    """The names of the layers to adapt, in the model's order; ``heads`` and what is in them are left out. What is left
    out under one of its names is so under all.

    Raises ValueError if there are none, naming what could have matched, and for a name of which nothing can be adapted;
    warns of names that are none of the model's.
    """
    held = {module for name, module in modules.items() if is_inside(name, heads)}
    able = [name for name, module in modules.items() if name and can_adapt(module) and module not in held]
    _check_names(modules, held, "target_modules", target_modules)
    _check_names(modules, held, "exclude_modules", exclude_modules)
    wanted = usual_targets(model) if target_modules is None else target_modules
    if wanted == ALL_LINEAR:
        out = getattr(model, "get_output_embeddings", lambda: None)()
        found = [name for name in able if is_linear(modules[name]) and modules[name] is not out]
    else:
        found = [name for name in able if matches(name, wanted)]
    before = found
    if exclude_modules:
        left = {module for name, module in modules.items() if matches(name, exclude_modules, "exclude_modules")}
        found = [name for name in found if modules[name] not in left]
    if layers_to_transform is not None:
        numbers = {layers_to_transform} if isinstance(layers_to_transform, int) else set(layers_to_transform)
        found = [name for name in found if _layer_number(name, layers_pattern) in numbers]
    elif layers_pattern:
        raise ValueError("layers_pattern says where layers are numbered; it needs layers_to_transform.")
    if before and not found:
        left_out = {"exclude_modules": exclude_modules, "layers_to_transform": layers_to_transform}
        told = " and ".join(f"{name} = {value!r}" for name, value in left_out.items() if value is not None)
        raise ValueError(f"{told} leaves out all {len(before)} layers that target_modules matches, as {before[-1]}.")
    if not found:
        raise ValueError(_nothing(model, modules, able, wanted))
    return found


def _check_names(
    modules: Mapping[str, nn.Module], held: Collection[nn.Module], what: str, names: str | Collection[str] | None
) -> None:
    """Raise ValueError for a name to adapt of which no layer can be; warn of one that no module has."""
    for name in names if names and not isinstance(names, str) else ():
        named = {where: module for where, module in modules.items() if where and matches(where, [name])}
        if not named:
            warnings.warn(f"{what} names {name!r}, which ends no module's name.", stacklevel=4)
        elif what == "target_modules" and not any(can_adapt(m) or m in held for m in named.values()):
            where, module = next(iter(named.items()))
            raise ValueError(
                f"target_modules names {name!r}, and {where} is a {type(module).__name__}, which cannot be adapted; "
                "leave it out."
            )


def _layer_number(name: str, pattern: str | Collection[str] | None) -> int | None:
    """The number of the layer that a module is in, as PEFT reads it: the last number in the name, or the one after
    ``pattern``."""
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    for each in [rf".*\.{one}\.(\d+)\." for one in patterns] or [r".*\.[^.]*\.(\d+)\."]:
        try:
            found = re.match(each, f".{name}")
        except re.error as error:
            raise ValueError(
                f"layers_pattern is {pattern!r}, which is no regular expression ({error}); name what stands before a "
                "layer's number."
            ) from None
        if found:
            return int(found[1])
    return None


def _nothing(model: nn.Module, modules: Mapping[str, nn.Module], able: list[str], wanted: Any) -> str:
    """The sentence for targets that match nothing."""
    what = f"target_modules = {wanted!r} matches no layer of {type(model).__name__} that can be adapted"
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in able))
    if not endings:
        leaves = dict.fromkeys(type(m).__name__ for m in modules.values() if m._parameters and not list(m.children()))
        return (
            f"{what}: outside of modules_to_save it has no linear layer, embedding or Conv2d, only {', '.join(leaves)}."
        )
    first = next(iter(wanted), "") if not isinstance(wanted, str) else wanted
    near = difflib.get_close_matches(str(first).rpartition(".")[2], endings, 1)
    return f"{what}; it has {', '.join(sorted(endings))}{f'. Did you mean {near[0]}?' if near else '.'}"


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What PEFT's ``rank_pattern`` or ``alpha_pattern`` says for a layer.

    Keys are regular expressions for endings of names; the first that fits counts.
    """
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise ValueError(f"{key!r} is no regular expression ({error}); name a layer's ending.") from None
    return default


def layer_options(
    names: list[str], r: int, lora_alpha: float | None, rank_pattern: Mapping | None, alpha_pattern: Mapping | None
) -> dict[str, tuple[int, float]]:
    """{name: (r, alpha)}; without any alpha it is 2 r, of each layer's r.

    Raises ValueError for a rank below 1 and for a pattern that fits no layer.
    """
    for word, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for key in patterns or {}:
            if not any(pattern_value({key: True}, name, False) for name in names):
                raise ValueError(f"{word} names {key!r}, which no adapted layer's name ends with.")
    found = {}
    for name in names:
        rank = pattern_value(rank_pattern, name, r)
        check_int(f"the rank of {name}", rank, 1, float("inf"), "give a maximum rank of 1 or more.")
        alpha = pattern_value(alpha_pattern, name, 2 * rank if lora_alpha is None else lora_alpha)
        found[name] = rank, alpha
    return found
