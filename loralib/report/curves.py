"""Runs put together: seeds of one method become a curve with error bars, tasks become a GLUE-style average."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .choice import mean_and_error, resampled_scores
from .results import LOWER, RankResults
from .tables import csv_text

STORED = "run_settings.json"  # of examples/NLU
SETTINGS = ("model_name_or_path", "lora_alpha", "distribution", "r_min", "max_rank")
# Stored settings that a run's method tells.
IN_METHOD = (
    *("rank_sampling", "rank_distribution", "lora_r_min", "full_rank_share", "lora_frozen", "lora_paced"),
    "matryoshka_reduce",
)


@dataclass(frozen=True)
class Curve:
    """The main score, as tables show it, by rank, over ``seeds`` runs.

    ``errors`` are standard errors over the runs, None for one. ``band``, for one run whose predictions are stored: by
    rank the 95 percent interval over examples drawn anew (of a loss: of its difference to the best rank's, since
    examples differ more than ranks do). ``samples`` are the examples of an evaluation, ``name`` is the method in a few
    words.
    """

    task: str
    split: str
    method: str
    metric: str
    ranks: tuple[int, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...] | None
    seeds: int
    name: str = ""
    band: tuple[tuple[float, float], ...] | None = None
    samples: int = 0

    @classmethod
    def over_seeds(
        cls,
        task: str,
        split: str,
        method: str,
        metric: str,
        ranks: Iterable[int],
        values,
        name="",
        band=None,
        samples=0,
    ) -> Curve:
        """The curve of ``values``, (seeds, ranks), as tables show them."""
        means, errors = mean_and_error(values)
        return cls(
            task, split, method, metric, tuple(ranks), tuple(means.tolist()),
            None if errors is None else tuple(errors.tolist()), len(values), name or method, band, samples,
        )  # fmt: skip

    @property
    def spread(self) -> float:
        """The largest standard error of a point. Without seeds or predictions: what an accuracy of 50 percent over so
        many examples has; 0 for a loss."""
        errors = self.errors or [(high - low) / (2 * 1.96) for low, high in self.band or ()]
        if not errors and self.samples and self.metric not in LOWER:
            return (50 if max(map(abs, self.means)) > 1 else 0.5) / self.samples**0.5
        return float(np.nanmax(errors)) if len(errors) and not np.isnan(errors).all() else 0.0


def label(results: RankResults) -> str:
    """How tables call a run's method, with a scaling rule that is not the usual one."""
    name = results.method.replace("at r_max", f"at rank {results.max_rank}")
    return name if results.scaling in (None, "alpha/r") else f"{name}, {results.scaling}"


def bootstrap_band(results: RankResults, split: str) -> tuple[tuple[float, float], ...] | None:
    """The 95 percent interval of each rank's score by the run's stored predictions; None where they are not there."""
    try:
        found = results.factor(results.metric) * resampled_scores(results, split)
    except (FileNotFoundError, ValueError, ImportError):
        return None
    with np.errstate(all="ignore"):
        if results.metric in LOWER:
            _, told = results.curve(split)
            best = int(np.nanargmin(told))
            found = found - found[:, [best]] + told[best]
        low, high = np.nanpercentile(found, [2.5, 97.5], axis=0)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def settings_of_run(results: RankResults) -> dict[str, Any]:
    """What makes a run another one, but for its seed: what its results tell, and the settings stored beside them."""
    found = {name: getattr(results, name) for name in SETTINGS}
    file = Path(results.directory or "", STORED)
    try:
        stored = json.loads(file.read_text(encoding="utf-8")) if results.directory and file.exists() else {}
    except (OSError, ValueError):
        stored = {}
    stored = stored if isinstance(stored, dict) else {}
    told = {*found, *IN_METHOD, "seed", "data_seed"}
    return found | {n: v for n, v in stored.items() if n not in told}


def measured_elsewhere(results: RankResults) -> bool:
    """Whether a directory tells of an adapter that was trained in another one: with which settings is not known."""
    beside = Path(results.directory or "", "adapter_model.safetensors")
    return results.adapter is not None and not beside.exists()


def _as_text(value: Any) -> str:
    """A setting as labels show it; 16 and 16.0 are one."""
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def curves(runs: list[RankResults]) -> list[Curve]:
    """One curve for each task, split, method and setting; runs that differ in nothing but the seed are averaged. Two
    of one seed, or of none that is known, are no two seeds, and stand apart."""
    groups: dict[tuple, list[RankResults]] = defaultdict(list)
    once = {Path(run.directory).resolve() if run.directory else id(run): run for run in runs}
    for results in once.values():
        for split in results.splits:
            ranks = tuple(results.curve(split)[0])
            own = settings_of_run(results) | {"examples": results.splits[split][0].samples}
            own |= {"data": results.data[split]} if split in results.data else {}
            start = (results.task, split, label(results), results.metric, ranks)
            key = (*start, tuple((name, _as_text(value)) for name, value in own.items()))
            seeds = [other.seed for other in groups.get(key, [])]
            if seeds and (results.seed is None or results.seed in seeds or measured_elsewhere(results)):
                key = (*start, (*key[-1], ("run", str(results.directory))))
            groups[key].append(results)
    found = []
    settings_of = defaultdict(list)
    for task, split, method, *_, settings in groups:
        settings_of[task, split, method].append(dict(settings))
    for (task, split, method, metric, at, settings), of_seeds in groups.items():
        # Methods of one name that differ in a setting are told apart by it.
        rivals = settings_of[task, split, method]
        differing = [f"{n.split('_name')[0]} {v}" for n, v in settings if len({s.get(n) for s in rivals}) > 1]
        one = of_seeds[0]
        short = one.short_name() + (f", {one.scaling}" if one.scaling not in (None, "alpha/r") else "")
        factor = min(results.factor(metric) for results in of_seeds)
        values = np.array([[factor * v for v in results.curve(split)[1]] for results in of_seeds], float)
        band = bootstrap_band(one, split) if len(of_seeds) == 1 else None
        names = [", ".join([name, *differing]) for name in (method, short)]
        found.append(
            Curve.over_seeds(task, split, names[0], metric, at, values, names[1], band, one.splits[split][0].samples)
        )
    return found


def runs_to_csv(runs: list[RankResults]) -> str:
    """One line for each run, split and rank: the main score, 0-1."""
    rows = []
    for results in runs:
        start = [results.directory, results.task, label(results), results.seed]
        for split in results.splits:
            rows += [[*start, split, b, results.metric, value] for b, value in zip(*results.curve(split), strict=True)]
    return csv_text(["run", "task", "method", "seed", "split", "rank", "metric", "score"], rows)


def averages(curves: list[Curve]) -> list[Curve]:
    """The mean over tasks of each method's curve (a task's first split), for methods with the same tasks and ranks.

    Empty unless there are two tasks or more, and where a loss is among them, which is on no scale with scores. The
    error is that of a mean of independent means.
    """
    if any(curve.metric in LOWER for curve in curves):
        return []
    first: dict[tuple[str, str], Curve] = {}
    for curve in curves:
        first.setdefault((curve.task, curve.method), curve)
    tasks = {curve.task for curve in curves}
    result = []
    for method in dict.fromkeys(curve.method for curve in curves):
        of_tasks = [curve for curve in first.values() if curve.method == method]
        if len(tasks) < 2 or len(of_tasks) < len(tasks) or len({curve.ranks for curve in of_tasks}) > 1:
            continue
        means = np.mean([curve.means for curve in of_tasks], axis=0)
        errors = [curve.errors for curve in of_tasks if curve.errors]
        both = None
        if len(errors) == len(of_tasks):
            both = tuple((np.sqrt(np.sum(np.square(errors), axis=0)) / len(of_tasks)).tolist())
        name, seeds = f"average of {len(of_tasks)} tasks", min(curve.seeds for curve in of_tasks)
        result.append(
            Curve(name, "", method, "score", of_tasks[0].ranks, tuple(means.tolist()), both, seeds, of_tasks[0].name)
        )
    return result


def summary_rows(curves: list[Curve], short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of several runs: mean over seeds, with its standard error. ``short``: names in a few
    words."""
    ranks = sorted({b for curve in curves for b in curve.ranks})
    rows = []
    for curve in curves:
        errors = curve.errors or [None] * len(curve.ranks)
        shown = {
            b: f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")
            for b, mean, error in zip(curve.ranks, curve.means, errors, strict=True)
        }
        name = " ".join(filter(None, (curve.task, curve.split)))
        rows.append([name, curve.name if short else curve.method, str(curve.seeds), *(shown.get(b, "") for b in ranks)])
    return ["task", "method", "seeds", *(f"r={b}" for b in ranks)], rows
