"""The per-rank table: Markdown, CSV and the terminal's."""

import csv
import io
import math
from collections.abc import Iterable, Sequence

from .results import LAST, RankResults


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table. ``align``: a letter for each column, "l" or "r"; columns beyond it are aligned right."""
    rule = ["---" if align[i : i + 1] == "l" else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def columns(results: RankResults) -> list[str]:
    """The table's columns: rank, the scores with the main one first, loss, samples, parameters."""
    first = next(iter(results.splits.values()))[0]
    others = [name for name in first.scores if name != results.metric]
    last = [name for name in LAST if name != results.metric and (name != "loss" or first.loss is not None)]
    return ["rank", results.metric, *others, *last]


def cell(value, name: str, factor: int = 100) -> str:
    """A value as tables show it; scores are on the 0-100 scale (``RankResults.factor``)."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "nan"
    if isinstance(value, int):
        return f"{value:,}" if name == "adapter_parameters" else str(value)
    return f"{value:.4f}" if name == "loss" else f"{factor * value:.2f}"


def table_rows(results: RankResults, split: str) -> list[list[str]]:
    """The cells of a split's table as text."""
    factors = {name: 1 if name in ("rank", *LAST) else results.factor(name) for name in columns(results)}
    return [[cell(row.value(name), name, factors[name]) for name in factors] for row in results.splits[split]]


def title(results: RankResults, split: str) -> str:
    return f"{results.task}, {split}: {results.method}"


def summary(results: RankResults, split: str) -> str:
    """AURAC and, on the split that it was chosen on, the selected rank."""
    line = f"AURAC {cell(results.aurac[split], results.metric, results.factor(results.metric))}"
    selected = results.selected_rank
    if selected and selected.split == split:
        line += f"; selected rank {selected.rank}: {selected.rule}"
    elif results.selected_rank_reason and split == results.split():
        line += f"; no rank is selected: {results.selected_rank_reason}"
    return line


def to_markdown(results: RankResults) -> str:
    parts = [f"# Quality at every rank: {results.task}\n"]
    for split in results.splits:
        table = markdown_table(columns(results), table_rows(results, split))
        parts.append(f"**{title(results, split)}**\n\n{table}\n\n{summary(results, split)}.\n")
    if any(results.factor(name) > 1 for name in columns(results) if name not in ("rank", *LAST)):
        parts.append("Scores are on the 0-100 scale.\n")
    if results.command:
        parts.append(f"Made by\n\n    {results.command}\n")
    return "\n".join(parts)


def to_csv(results: RankResults) -> str:
    """A line for each split and rank; scores 0-1, empty where there is none."""
    rows = [
        [split, *(row.value(name) for name in columns(results))]
        for split, of_ranks in results.splits.items()
        for row in of_ranks
    ]
    return csv_text(["split", *columns(results)], rows)


def csv_text(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """CSV; nan is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([None if isinstance(value, float) and math.isnan(value) else value for value in row])
    return text.getvalue()


def print_table(results: RankResults, console=None) -> None:
    """The tables in the terminal; the best rank is bold, the selected one marked."""
    from rich.console import Console

    console = console or Console()
    for split, rows in results.splits.items():
        scores = [-math.inf if math.isnan(value) else results.sign * value for value in results.curve(split)[1]]
        cells = table_rows(results, split)
        selected = results.selected_rank
        for row, texts in zip(rows, cells, strict=True):
            if selected and (selected.rank, selected.split) == (row.rank, split):
                texts[0] = f"→ {texts[0]}"
        styles = ["bold" if value == max(scores) else None for value in scores]
        print_grid(title(results, split), columns(results), cells, console=console, styles=styles)
        _say(console, summary(results, split) + "\n")


def print_grid(
    heading: str, head: Sequence[str], rows: Sequence[Sequence[str]], left=(), console=None, styles=()
) -> None:
    """A table in the terminal, no wider than it: numbers stay whole, words wrap, and columns that have no room go into
    a table of their own beneath, with the names repeated.

    ``left``: the places of the columns of names; all others are numbers. ``styles``: of the rows.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    _say(console, heading)
    # A word of a head is whole, too; a cell has a space and a line beside it.
    head = [name.replace("_", " ") for name in head]
    width = [max(map(len, [*name.split(), *(row[i] for row in rows)]), default=1) + 3 for i, name in enumerate(head)]
    names = [i for i in range(len(head)) if i in left]
    numbers = [i for i in range(len(head)) if i not in left]
    room = console.width - 1 - sum(min(width[i], 26) for i in names)
    while numbers:
        count = 1
        while count < len(numbers) and sum(width[i] for i in numbers[: count + 1]) <= room:
            count += 1
        shown, numbers = sorted(names + numbers[:count]), numbers[count:]
        table = Table()
        for i in shown:
            whole = {"min_width": width[i] - 3, "justify": "right"} if i not in left else {"overflow": "fold"}
            table.add_column(head[i], **whole)
        for k, row in enumerate(rows):
            table.add_row(*(row[i] for i in shown), style=styles[k] if styles else None)
        console.print(table, markup=False)


def _say(console, words: str) -> None:
    """Text as it is, wrapped at the terminal's width."""
    from rich.text import Text

    console.print(Text(words))
