"""The per-rank table, the curve, and the choice of a rank, from what an evaluation of all ranks found.

``results`` is the content of ``rank_results.json``: see the README, "What an output directory holds".
"""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np

COLUMNS_LAST = ("loss", "samples", "adapter_parameters")


def aurac(ranks: list[int], scores: list[float]) -> float:
    """Area under the rank-quality curve: trapezoids over rank, divided by last minus first rank.

    With one rank it is that rank's score. Source: MatryoshkaLoRA, arXiv 2605.07850.
    """
    if len(ranks) == 1:
        return float(scores[0])
    return float(np.trapezoid(scores, ranks) / (ranks[-1] - ranks[0]))


# --- the choice of a rank -----------------------------------------------------------------------------


def select_rank(
    ranks: list[int], scores: list[float], resampled: np.ndarray | None = None, within: float | str = "1se"
) -> dict:
    """The smallest rank that is as good as the best one, and why.

    Args:
        scores: the score of each rank, higher is better; nan never wins.
        resampled: (resamples, ranks), the scores on bootstrap resamples of the evaluation data, the same resample for
            all ranks (see ``bootstrap``); needed by "1se".
        within: "1se" accepts a rank whose score is at most one standard error of its paired difference to the best
            below the best; a number is a margin in points of the 0-100 scale.

    Returns {"rank", "rule", "score", "standard_error"}; the standard error is that of the difference between the chosen
    and the best rank (None with a margin).
    """
    clean = np.nan_to_num(np.asarray(scores, float), nan=-np.inf)
    best = int(clean.argmax())
    if not np.isfinite(clean[best]):
        return {"rank": ranks[-1], "rule": "no rank has a score; r_max", "score": math.nan, "standard_error": None}
    if within == "1se":
        if resampled is None:
            raise ValueError("The rule '1se' needs the evaluation's predictions; give a margin such as within=0.5.")
        margins = np.nanstd(resampled[:, [best]] - resampled, axis=0, ddof=1)
        margins = np.nan_to_num(margins)
        rule = "smallest rank within one standard error of the best"
    else:
        margin = float(within)
        if not margin >= 0:
            raise ValueError(f"within is {within!r}; give '1se' or a margin of 0 or more points.")
        margins = np.full(len(ranks), margin / 100)
        rule = f"smallest rank within {margin:g} points of the best"
    chosen = next(k for k in range(len(ranks)) if clean[best] - clean[k] <= margins[k] + 1e-12)
    return {
        "rank": ranks[chosen],
        "rule": f"{rule} (rank {ranks[best]})",
        "score": float(scores[chosen]),
        "standard_error": float(margins[chosen]) if within == "1se" else None,
    }


def bootstrap(predictions: np.ndarray, labels: np.ndarray, score, resamples: int = 200, seed: int = 0) -> np.ndarray:
    """``score(predictions, labels)`` of every rank on resamples of the examples: (resamples, ranks).

    ``predictions`` is (samples, ranks). All ranks see the same resample, so that their differences are paired.
    """
    draw = np.random.default_rng(seed)
    found = np.empty((resamples, predictions.shape[1]))
    for i in range(resamples):
        chosen = draw.integers(0, len(labels), len(labels))
        found[i] = [score(predictions[chosen, k], labels[chosen]) for k in range(predictions.shape[1])]
    return found


# --- the table ----------------------------------------------------------------------------------------


def columns(results: dict) -> list[str]:
    """The table's columns: rank, the scores with the main one first, loss, samples, parameters."""
    rows = next(iter(results["splits"].values()))
    names = [key for key in rows[0] if key not in ("rank", results["metric"], *COLUMNS_LAST)]
    return ["rank", results["metric"], *names, *(key for key in COLUMNS_LAST if key in rows[0])]


def _cell(value, name: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "nan"
    if isinstance(value, int):
        return f"{value:,}" if name == "adapter_parameters" else str(value)
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f}"


def table_rows(results: dict, split: str) -> list[list[str]]:
    """The cells of a split's table as text; scores are on the 0-100 scale."""
    return [[_cell(row.get(name), name) for name in columns(results)] for row in results["splits"][split]]


def _title(results: dict, split: str) -> str:
    return f"{results['task']}, {split}: {results['method']}"


def _summary(results: dict, split: str) -> str:
    line = f"AURAC {_cell(results['aurac'][split], results['metric'])}"
    selected = results.get("selected_rank")
    if selected and selected["split"] == split:
        line += f"; selected rank {selected['rank']}: {selected['rule']}"
    return line


def to_markdown(results: dict) -> str:
    parts = [f"# Quality at every rank: {results['task']}\n"]
    head = columns(results)
    for split in results["splits"]:
        lines = [head, ["---:"] * len(head), *table_rows(results, split)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"**{_title(results, split)}**\n\n{table}\n\n{_summary(results, split)}.\n")
    parts.append("Scores are on the 0-100 scale.\n")
    if results.get("command"):
        parts.append(f"Made by\n\n    {results['command']}\n")
    return "\n".join(parts)


def to_csv(results: dict) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["split", *columns(results)])
    for split, rows in results["splits"].items():
        writer.writerows([split, *(row.get(name) for name in columns(results))] for row in rows)
    return text.getvalue()


def print_table(results: dict, console=None) -> None:
    """The tables in the terminal; the best rank is bold, the selected one marked."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    head = columns(results)
    for split, rows in results["splits"].items():
        table = Table(title=_title(results, split), caption=_summary(results, split))
        for name in head:
            table.add_column(name, justify="right")
        scores = [_number(row[results["metric"]]) for row in rows]
        selected = results.get("selected_rank") or {}
        for row, cells, value in zip(rows, table_rows(results, split), scores, strict=True):
            if row["rank"] == selected.get("rank") and split == selected.get("split"):
                cells[0] = f"→ {cells[0]}"
            table.add_row(*cells, style="bold" if value == max(scores) else None)
        console.print(table)


def _number(value) -> float:
    """A score that may be null in the file."""
    return -math.inf if value is None or math.isnan(value) else value


# --- files --------------------------------------------------------------------------------------------


def without_nan(value):
    """JSON has no nan: null instead."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if math.isnan(value) else float(value)
    return value


def write_report(results: dict, directory: str | Path) -> None:
    """Write rank_results.json, .csv, .md and rank_curve.png of one run into ``directory``."""
    from ..files import write_atomically, write_text
    from .curves import curves
    from .plots import plot_curves

    directory = Path(directory)
    results = without_nan(results)
    write_text(directory / "rank_results.json", json.dumps(results, indent=2) + "\n")
    write_text(directory / "rank_results.csv", to_csv(results))
    write_text(directory / "rank_results.md", to_markdown(results))
    selected = (results.get("selected_rank") or {}).get("rank")
    write_atomically(directory / "rank_curve.png", lambda file: plot_curves(curves([results]), file, selected, "png"))
