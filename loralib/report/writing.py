"""What a report leaves on disk."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from ..files import write_atomically, write_text
from .curves import Curve, averages, curves, runs_to_csv, summary_rows
from .page import page
from .results import FILE, RankResults
from .tables import markdown_table, to_csv, to_markdown

PICTURES = ("png", "svg", "pdf")


# What is made of a run's weights and predictions.
TABLES = (
    *("rank_results.*", "rank_curve.*", "report.html"),
    *("eval_*r*_results.json", "test_results_*_r*.txt", "predictions_*.npz"),
)


def remove_tables(directory: str | Path) -> None:
    """Remove what was made of the weights that were in a run's directory: test predictions, and where there is a table
    all that goes with it."""
    directory, patterns = Path(directory), ["test_results_*_r*.txt"]
    with contextlib.suppress(FileNotFoundError, ValueError):
        patterns += [f"predictions_{split}.npz" for split in RankResults.read(directory).splits]
        patterns += [pattern for pattern in TABLES if not pattern.startswith("predictions")]
    for file in (file for pattern in patterns for file in directory.glob(pattern)):
        file.unlink(missing_ok=True)


def write_run(results: RankResults, directory: str | Path) -> None:
    """Write rank_results.json, .csv, .md and rank_curve.png of one run into ``directory``.

    Where ``directory`` holds the run's predictions already, the curve has their interval.
    """
    from .plots import plot_curves  # matplotlib takes a while to import: only where something is drawn

    directory = Path(directory)
    write_text(directory / FILE, json.dumps(results.to_json(), indent=2) + "\n")
    write_text(directory / "rank_results.csv", to_csv(results))
    write_text(directory / "rank_results.md", to_markdown(results))
    found = curves([replace(results, directory=str(directory))])
    write_atomically(directory / "rank_curve.png", lambda file: plot_curves(found, file, results.selected_rank, "png"))


def write_report(runs: list[RankResults], directory: str | Path) -> list[Curve]:
    """Write rank_results.md and .csv, rank_curve.png, .svg and .pdf and report.html of some runs; returns their
    curves."""
    from .plots import plot_curves

    directory = Path(directory)
    of_all = curves(runs)
    of_all += averages(of_all)
    markdown = "\n".join(to_markdown(results) for results in runs)
    if len(runs) == 1:
        table, selected = to_csv(runs[0]), runs[0].selected_rank
    else:
        table, selected = runs_to_csv(runs), None
        markdown = f"# All runs\n\n{markdown_table(*summary_rows(of_all), align='ll')}\n\n{markdown}"
    write_text(directory / "rank_results.md", markdown)
    write_text(directory / "rank_results.csv", table)
    for kind in PICTURES:
        write_atomically(
            directory / f"rank_curve.{kind}", lambda file, kind=kind: plot_curves(of_all, file, selected, kind)
        )
    write_text(directory / "report.html", page(runs, of_all))
    return of_all
