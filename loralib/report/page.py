"""One self-contained HTML page with the curves and the tables of some runs; it opens offline."""

import html
import json
from dataclasses import asdict
from importlib.resources import files
from string import Template

from .curves import Curve
from .results import RankResults
from .tables import columns, summary, table_rows, title


def page(runs: list[RankResults], curves: list[Curve]) -> str:
    """The page's text. The curves are drawn by its own script from the data in it."""
    tables = [section(results, split) for results in runs for split in results.splits]
    # A tag or a comment within the data would end, or swallow, the script that holds it.
    drawn = [asdict(curve) | {"spread": curve.spread} for curve in curves]
    data = json.dumps(drawn).replace("NaN", "null").replace("<", "\\u003c")
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        data=data, tables="\n".join(tables)
    )


def section(results: RankResults, split: str) -> str:
    """A split's table, with what was found above and how it was made beneath."""
    selected, rows = results.selected_rank, results.splits[split]
    names = columns(results)
    shown = list(range(len(names)))
    samples = {row.samples for row in rows}
    if len(samples) == 1:  # one number for all rows: told once
        shown = [i for i in shown if names[i] != "samples"]
    count = f"{min(samples):,} examples; " if len(samples) == 1 else ""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button>{html.escape(names[i].replace("_", " "))}</button></th>'
        for i in shown
    )
    body = "".join(
        f"<tr{mark}>" + "".join(f"<td>{html.escape(cells[i])}</td>" for i in shown) + "</tr>"
        for row, cells in zip(rows, table_rows(results, split), strict=True)
        for mark in [' class="selected"' if selected and (selected.rank, selected.split) == (row.rank, split) else ""]
    )
    versions = ", ".join(f"{name} {number}" for name, number in results.versions.items())
    facts = {
        "base model": results.model_name_or_path,
        "seed": results.seed,
        "command": results.command,
        "versions": versions or None,
    }
    told = "".join(
        f"<dt>{name}</dt><dd>{'<code>' if name == 'command' else ''}{html.escape(str(value))}"
        f"{'</code>' if name == 'command' else ''}</dd>"
        for name, value in facts.items()
        if value is not None
    )
    return (
        f"<h2>{html.escape(title(results, split))}</h2>\n<p>{count}{html.escape(summary(results, split))}.</p>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n<dl>{told}</dl>"
    )
