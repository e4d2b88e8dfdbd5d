"""One self-contained HTML page with the curves and the tables of some runs; it opens offline."""

import html
import json
from dataclasses import asdict
from importlib.resources import files
from string import Template

from .curves import Curve
from .results import RankResults
from .tables import columns, table_rows, title


def page(runs: list[RankResults], curves: list[Curve]) -> str:
    """The page's text. The curves are drawn by its own script from the data in it."""
    tables = []
    for results in runs:
        for split in results.splits:
            head = "".join(f"<th>{html.escape(name)}</th>" for name in columns(results))
            body = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
                for row in table_rows(results, split)
            )
            heading = html.escape(f"{title(results, split)}, seed {results.seed}")
            tables.append(f"<h2>{heading}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    # A tag or a comment within the data would end, or swallow, the script that holds it.
    data = json.dumps([asdict(curve) for curve in curves]).replace("NaN", "null").replace("<", "\\u003c")
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        data=data, tables="\n".join(tables)
    )
