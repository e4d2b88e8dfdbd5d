"""The label column: what its cells mean, by the names of their source."""

import math
from collections.abc import Sequence
from datetime import date, time
from typing import Any

import datasets

from loralib.adapters.labels import places, told

from .errors import UsageError
from .tasks import Task


def names_in(kind) -> tuple[str, ...]:
    """The names that a label column brings along (a ClassLabel, as save_to_disk and Parquet keep it), if they say
    anything."""
    return told(kind.names) if isinstance(kind, datasets.ClassLabel) else ()


def refuse_missing(values: Sequence[Any], where: str) -> None:
    """Raise UsageError for the first label that is missing, is a list, a table or a time (as JSON's dates are read), or
    is no finite number."""
    for i, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UsageError(f"{where} has no label in example {i}; every example needs one.")
        if isinstance(value, (list, dict, date, time)) or (isinstance(value, float) and not math.isfinite(value)):
            shown = str(value) if isinstance(value, (date, time)) else value
            raise UsageError(f"{where} has the label {shown!r} in example {i}; give a name or a finite number.")
        if isinstance(value, str) and any(sign in value for sign in "\t\r\n"):
            raise UsageError(f"{where} has the label {value!r} in example {i}; give a name in one line, without tabs.")


def label_names(values: Sequence[Any]) -> tuple[str, ...]:
    """The labels of one's own data as names, each once: numbers in their order, else by the alphabet."""
    names = {text(value) for value in values}
    numeric = all(_number(name) is not None for name in names)
    return tuple(sorted(names, key=lambda name: (_number(name), name) if numeric else name))


def refuse_doubtful(values: Sequence[Any], where: str) -> None:
    """Raise UsageError for labels of which some are values, with fractions, and others names; and for names that differ
    in nothing but spaces around them or capitals. To be asked where nobody said what the labels are."""
    names = [text(value) for value in values]
    fraction = next((name for name in names if (_number(name) or 0) % 1), None)
    word = next((i for i, name in enumerate(names) if _number(name) is None), None)
    if fraction is not None and word is not None:
        raise UsageError(
            f"{where} has the label {names[word]!r} in example {word} beside values such as {fraction}: mend it, or "
            "say --regression false if all are names."
        )
    alike: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = alike.setdefault(name.strip().lower(), name)
        if other != name:
            raise UsageError(
                f"{where} has the labels {other!r} and {name!r}: write them alike, or name all labels with --labels."
            )


def any_fraction(values: Sequence[Any]) -> bool:
    """Whether all labels are numbers and one of them has a fraction: then they are values and no classes."""
    numbers = [_number(text(value)) for value in values]
    return bool(numbers) and None not in numbers and any(number % 1 for number in numbers)


def text(value: Any) -> str:
    """A label as a name: 2.0 is 2, as in a file where other labels were missing."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def is_number(value: Any) -> bool:
    """Whether a cell of text is a finite number."""
    return isinstance(value, str) and _number(value) is not None


def as_numbers(values: Sequence[Any], task: Task, where: str, source: tuple[str, ...] = ()) -> list[float] | list[int]:
    """The labels as the task numbers them.

    Args:
        source: the names behind numbers, where the column brings them; else a number is the task's own.

    Raises UsageError for a label that is missing or that the task does not know, and for a source with other names.
    """
    refuse_missing(values, where)
    if task.regression:
        return [_value(value, i, where, task) for i, value in enumerate(values)]
    order = list(range(len(task.labels)))
    if source:
        found = places(task.labels, source)
        if found is None:
            raise UsageError(f"{where} has the labels {', '.join(source)}; {task.name} knows {', '.join(task.labels)}.")
        order = found
    fold = str.lower if len({name.lower() for name in task.labels}) == len(task.labels) else str
    numbers = {fold(name): i for i, name in enumerate(task.labels)}
    return [_class(value, i, where, task, numbers.get(fold(text(value))), order) for i, value in enumerate(values)]


def _value(value: Any, i: int, where: str, task: Task) -> float:
    number = None if isinstance(value, bool) else _number(str(value))
    if number is None:
        raise UsageError(
            f"{where} has the label {value!r} in example {i}, which is no finite number; {task.name} is a regression."
        )
    return number


def _class(value: Any, i: int, where: str, task: Task, by_name: int | None, order: list[int]) -> int:
    if by_name is not None:
        return by_name
    number = _number(str(int(value)) if isinstance(value, bool) else text(value))
    if number is not None and number.is_integer() and 0 <= number < len(order) and (task.name != "custom"):
        return order[int(number)]
    known = ", ".join(f"{k} ({label})" for k, label in enumerate(task.labels))
    raise UsageError(f"{where} has the label {value!r} in example {i}; {task.name} knows {known}.")
