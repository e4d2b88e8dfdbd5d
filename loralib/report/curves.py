"""Runs on disk, put together: seeds of one method become a curve with error bars, tasks become a GLUE-style average."""

import csv
import io
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .scores import decide, score
from .tables import bootstrap, select_rank

SETTINGS = ("model_name_or_path", "lora_alpha", "distribution", "r_min", "max_rank")


@dataclass(frozen=True)
class Curve:
    """The main score (0-100 scale) by rank, over ``seeds`` runs; ``errors`` are standard errors, None for one run."""

    task: str
    split: str
    method: str
    metric: str
    ranks: tuple[int, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...] | None
    seeds: int


def read_run(path: str | Path) -> dict:
    """The content of a run's rank_results.json, its directory as ``directory``.

    Raises FileNotFoundError or ValueError with one sentence.
    """
    directory = Path(path)
    file = directory / "rank_results.json" if directory.is_dir() else directory
    if not file.exists():
        raise FileNotFoundError(
            f"{path} holds no rank_results.json; give the output directory of a run with --do_eval."
        )
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["metric"], results["splits"], results["task"], results["method"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no result of a run ({error!r}); run the evaluation again.") from None
    return results | {"directory": str(file.parent)}


def split_of(results: dict, split: str | None) -> str:
    """The split to speak of: the one named, else the first. Raises ValueError for one that is not there."""
    if split is not None and split not in results["splits"]:
        raise ValueError(f"The run has no split {split!r}; choose one of {', '.join(results['splits'])}.")
    return split or next(iter(results["splits"]))


def label(results: dict) -> str:
    """How a run's method is called in a legend, with a scaling rule that is not the usual one."""
    usual = "alpha/r" if results.get("full_rank_share") else "alpha/b"
    scaling = results.get("scaling")
    name = results["method"].replace("at r_max", f"at rank {results['max_rank']}")
    return name if scaling in (None, usual) else f"{name}, {scaling}"


def scores_of(results: dict, split: str) -> tuple[list[int], list[float]]:
    """Ranks and main scores (0-1); a null is nan."""
    rows = results["splits"][split]
    values = [row[results["metric"]] for row in rows]
    return [row["rank"] for row in rows], [math.nan if v is None else v for v in values]


def curves(runs: list[dict]) -> list[Curve]:
    """One curve for each task, split, method and setting; runs that differ in nothing but the seed are averaged."""
    groups = defaultdict(list)
    for results in {
        Path(results["directory"]).resolve() if "directory" in results else id(results): results for results in runs
    }.values():
        for split in results["splits"]:
            ranks, values = scores_of(results, split)
            settings = tuple((name, results.get(name)) for name in SETTINGS)
            groups[results["task"], split, label(results), results["metric"], tuple(ranks), settings].append(values)
    found = []
    settings_of = defaultdict(list)
    for task, split, method, *_, settings in groups:
        settings_of[task, split, method].append(dict(settings))
    for (task, split, method, metric, ranks, settings), values in groups.items():
        # Methods of one name that differ in a setting are told apart by it.
        rivals = settings_of[task, split, method]
        differing = [f"{n.split('_name')[0]} {v}" for n, v in settings if len({str(s[n]) for s in rivals}) > 1]
        method = ", ".join([method, *differing])
        values = 100 * np.array(values)
        n = len(values)
        errors = tuple((values.std(0, ddof=1) / math.sqrt(n)).tolist()) if n > 1 else None
        found.append(Curve(task, split, method, metric, ranks, tuple(values.mean(0).tolist()), errors, n))
    return found


def runs_to_csv(runs: list[dict]) -> str:
    """One line for each run, split and rank: the main score, 0-1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "task", "method", "seed", "split", "rank", "metric", "score"])
    for results in runs:
        start = [results["directory"], results["task"], label(results), results.get("seed")]
        for split, rows in results["splits"].items():
            writer.writerows([*start, split, row["rank"], results["metric"], row[results["metric"]]] for row in rows)
    return text.getvalue()


def averages(found: list[Curve]) -> list[Curve]:
    """The mean over tasks of each method's curve (a task's first split), for methods with the same tasks and ranks.

    Empty unless there are two tasks or more. The error is that of a mean of independent means.
    """
    first = {}
    for curve in found:
        first.setdefault((curve.task, curve.method), curve)
    tasks = {curve.task for curve in found}
    result = []
    for method in dict.fromkeys(curve.method for curve in found):
        own = [curve for curve in first.values() if curve.method == method]
        if len(tasks) < 2 or len(own) < len(tasks) or len({curve.ranks for curve in own}) > 1:
            continue
        means = np.mean([curve.means for curve in own], axis=0)
        errors = None
        if all(curve.errors for curve in own):
            errors = tuple((np.sqrt(np.sum(np.square([c.errors for c in own]), axis=0)) / len(own)).tolist())
        name = f"average of {len(own)} tasks"
        result.append(
            Curve(name, "", method, "score", own[0].ranks, tuple(means.tolist()), errors, min(c.seeds for c in own))
        )
    return result


def choose(
    results: dict, split: str | None = None, within: float | str = "1se", max_parameters: int | None = None
) -> dict:
    """The choice of a rank for a run: see ``report.select_rank``; with the split it speaks of.

    ``max_parameters`` leaves only ranks whose adapter is no larger. Raises ValueError if none is left, and
    FileNotFoundError if "1se" needs predictions that are not there.
    """
    split = split_of(results, split)
    ranks, values = scores_of(results, split)
    rows = results["splits"][split]
    fits = [k for k, row in enumerate(rows) if max_parameters is None or row["adapter_parameters"] <= max_parameters]
    if not fits:
        smallest = min(row["adapter_parameters"] for row in rows)
        raise ValueError(f"No rank has {max_parameters:,} parameters or fewer; the smallest has {smallest:,}.")
    resampled = None
    if within == "1se":
        file = Path(results["directory"]) / f"predictions_{split}.npz"
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there, and 1se resamples it; give a margin such as --within 0.5.")
        with np.load(file) as arrays:
            predictions, labels = decide(arrays["logits"]), arrays["labels"]
        metric, parts = results["metric"], tuple(results.get("metrics", ()))
        resampled = bootstrap(predictions[:, fits], labels, lambda p, y: score(metric, p, y, parts))
    chosen = select_rank([ranks[k] for k in fits], [values[k] for k in fits], resampled, within)
    return chosen | {"split": split, "metric": results["metric"]}
