"""The rank that a command line asks for, and why: what ``--within``, ``--max-parameters`` and ``--split`` mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report.results import Choice, RankResults


def chosen(args, results: RankResults) -> Choice:
    from .report.choice import choose

    return choose(results, getattr(args, "split", None), within(args.within or "1se"), args.max_parameters)


def refuse_unused(args, rank: object, *names: str) -> None:
    """Raises ValueError for a flag of ``names`` that was given although ``rank``, a number, leaves nothing to
    choose."""
    for name in names:
        if getattr(args, name, None) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--rank {rank} leaves nothing to choose for {flag}; leave one of the two out.")


def why(results: RankResults, found: Choice) -> str:
    error = found.standard_error
    factor, digits = results.factor(results.metric), 4 if results.metric == "loss" else 2
    spread = f" (standard error of the difference {factor * error:.{digits}f})" if error is not None else ""
    return f"{results.task}, {found.split}: {found.rule}; {results.metric} {factor * found.score:.{digits}f}{spread}"


def within(text: str) -> float | str:
    if text == "1se":
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--within is {text!r}; give 1se or a number of points, as in 0.5.") from None
