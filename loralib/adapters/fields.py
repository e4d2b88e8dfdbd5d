"""What may stand in an adapter's tables: the fields that are read, and what each of them is."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..gate import SCALINGS


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


def _fingerprint(value: Any) -> bool:
    return _list_of(_finite)(value) and len(value) == 16


def _by_name(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Values by names of layers, which PEFT takes for regular expressions."""
    return lambda value: isinstance(value, dict) and all(map(_expression, value)) and all(map(is_one, value.values()))


def _expression(name: str) -> bool:
    try:
        re.compile(name)
    except re.error:
        return False
    return True


def _counts_by_name(value: Any) -> bool:
    """Counts of components at ranks 1, 2, .., as many for each layer."""
    if not isinstance(value, dict) or not all(map(_list_of(_count), value.values())):
        return False
    rising = all(list(counts) == sorted(counts) and counts[-1:] > [0] for counts in value.values())
    return rising and len(set(map(len, value.values()))) == 1


def _strengths(value: Any) -> bool:
    """Factors at ranks 1, 2, .. r of a layer, of which the last is 1."""
    return _list_of(_number)(value) and bool(value) and value[-1] == 1


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


# Each field's check and what it should be, as it stands in adapter_config.json and dylora.json; null counts as not
# there.
CONFIG = {
    "peft_type": (_text, "a text"),
    "r": (_whole, "a whole number above 0"),
    "lora_alpha": (_number, "a number above 0"),
    "rank_pattern": (_by_name(_whole), "a table of whole numbers above 0"),
    "alpha_pattern": (_by_name(_number), "a table of numbers above 0"),
    "use_rslora": (_truth, "true or false"),
    "fan_in_fan_out": (_truth, "true or false"),
    "lora_dropout": (_finite, "a number"),
    "target_modules": (lambda value: _text(value) or _list_of(_text)(value), "names of modules"),
    "modules_to_save": (_list_of(_text), "a list of names"),
    "base_model_name_or_path": (_text, "a text"),
}
FACTS = {
    "rank": (_whole, "a whole number above 0"),
    "r_max": (_whole, "a whole number above 0"),
    "lora_alpha": (_number, "a number above 0"),
    "scaling": (lambda value: value in SCALINGS or value == "several", "one of " + ", ".join(SCALINGS)),
    "projections": (_by_name(_whole), "a table of whole numbers above 0"),
    "base_sample": (_fingerprint, "16 numbers"),
    "base_sample_of": (_text, "a layer's name"),
    "factors": (_fingerprint, "16 numbers"),
    "labels": (_list_of(_text), "a list of names"),
    "columns": (_list_of(_text), "a list of names"),
    "num_labels": (_whole, "a whole number above 0"),
    "task": (_text, "a text"),
    "regression": (_truth, "true or false"),
    "ordered": (_truth, "true or false"),
    "cut_short": (_truth, "true or false"),
    "spread": (_truth, "true or false"),
    "max_seq_length": (_whole, "a whole number above 0"),
    "peft_convolutions": (_truth, "true or false"),
    "files": (
        lambda value: isinstance(value, dict) and all(map(_text, value.values())),
        "a table of hashes by files' names",
    ),
    "scalings": (
        lambda value: isinstance(value, dict) and set(value.values()) <= set(SCALINGS),
        f"one of {', '.join(SCALINGS)} by layers' names",
    ),
    "strength_at": (_by_name(_strengths), "for each layer factors above 0 at its ranks, the last of them 1"),
    "components_at": (_counts_by_name, "for each layer as many rising counts of components as there are ranks"),
}


def check(table: dict, fields: dict, file: Path, needed: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming the file and the field, for a value that is not what the field is."""
    for name, (is_right, what) in fields.items():
        value = table.get(name)
        if (name in needed and value is None) or (value is not None and not is_right(value)):
            raise ValueError(f"{file} has {name} = {value!r}; it should be {what}: save the adapter anew.")
