"""Rank-quality curves as images, fit for a paper."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from .curves import Curve
from .results import LOWER, Choice

# Okabe and Ito's colours, which colour-blind readers tell apart (without their yellow, too light for a line), and a
# marker for each; from the eighth method on the same again with hollow marks and dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
PANEL = (4.2, 3.4)  # inches; a figure of one panel is wider
SPAN = 8  # standard errors that the y axis shows at least


def plot_curves(curves: list[Curve], path: str | Path, selected: Choice | None = None, kind: str | None = None) -> None:
    """Draw one line per curve and one panel per task.

    Several seeds have bars of one standard error, one seed the band of its bootstrap (95 percent). The y axis spans at
    least eight standard errors, so that noise does not look like structure. Methods keep colour and marker over all
    panels, and stand in one legend outside of them. Ranks that are powers of two stand on a log2 axis.

    Args:
        selected: the rank to mark, and the rule that chose it.
        kind: "png", "svg" or "pdf" (default: the ending of ``path``).
    """
    curves = [replace(c, task=_plain(c.task), split=_plain(c.split), name=_plain(c.name)) for c in curves]
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    names = list(dict.fromkeys(map(_name, curves)))
    columns = min(len(tasks), 3) if len(tasks) != 4 else 2
    rows = -(-len(tasks) // columns)
    size = (6.4, 4.0) if len(tasks) == 1 else (PANEL[0] * columns, PANEL[1] * rows)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dylora", "pdf.fonttype": 42}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, task in zip(grid, tasks, strict=False):
            of_task = [curve for curve in curves if curve.task == task]
            for curve in of_task:
                _draw(panel, curve, names.index(_name(curve)))
            _scale(panel, of_task)
            panel.set_title(textwrap.shorten(task, 60, placeholder=" ..."), fontsize="medium")
        if selected is not None and len(tasks) == 1:
            _mark(grid[0], selected)
        for panel in grid[len(tasks) :]:
            panel.remove()
        _legend(figure, grid[: len(tasks)], curves)
        kind = kind or Path(path).suffix[1:]
        # Text stays text, and no format carries the date: the same runs give the same file.
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(path, dpi=150, format=kind, metadata=dates.get(kind))


def _plain(text: str) -> str:
    """Text as it is: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def _name(curve: Curve) -> str:
    split = "" if curve.split in ("", "validation") else f", {curve.split.replace('_', ' ')}"
    return curve.name + split


def _draw(panel: Axes, curve: Curve, number: int) -> None:
    colour, again = COLOURS[number % len(COLOURS)], number // len(COLOURS) % 2 == 1
    if curve.band is not None:
        low, high = zip(*curve.band, strict=True)
        panel.fill_between(curve.ranks, low, high, color=colour, alpha=0.15, linewidth=0)
    panel.errorbar(
        curve.ranks,
        curve.means,
        curve.errors,
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        markerfacecolor="white" if again else colour,
        linestyle="--" if again else "-",
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
        label=_name(curve),
    )


def _scale(panel: Axes, curves: list[Curve]) -> None:
    """Axes, ticks and labels of a panel."""
    ranks = sorted({b for curve in curves for b in curve.ranks})
    if len(ranks) > 2 and all(b & (b - 1) == 0 and b for b in ranks):
        panel.set_xscale("log", base=2)
    if len(ranks) > 16:
        step = math.ceil(len(ranks) / 8)
        ranks = sorted({ranks[0], *ranks[step - 1 :: step], ranks[-1]})
    panel.xaxis.set_major_locator(FixedLocator(ranks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticks(ranks, list(map(str, ranks)))
    values = [value for curve in curves for value in (*curve.means, *np.ravel(curve.band or ()).tolist())]
    values += [m + s * e for c in curves for m, e in zip(c.means, c.errors or (), strict=False) for s in (-1, 1)]
    ends = np.array([value for value in values if math.isfinite(value)])
    if len(ends):
        low, high = ends.min(), ends.max()
        span = max(high - low, SPAN * max(curve.spread for curve in curves)) or 1.0
        middle = (low + high) / 2
        panel.set_ylim(middle - 0.54 * span, middle + 0.54 * span)
    panel.set_xlabel("rank")
    panel.set_ylabel(curves[0].metric.replace("_", " "))
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def _mark(panel: Axes, selected: Choice) -> None:
    words = f"rank {selected.rank}: {selected.rule}" if selected.rule else f"rank {selected.rank} is selected"
    panel.axvline(selected.rank, color="0.35", linestyle=":", linewidth=1.2, label=textwrap.fill(_plain(words), 60))


def _legend(figure: Figure, panels: list[Axes], curves: list[Curve]) -> None:
    """One legend below all panels, and what bars and bands are."""
    entries: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    entries = dict(
        sorted(entries.items(), key=lambda entry: isinstance(entry[1], Line2D))
    )  # the mark of a rank is last
    seeds = {curve.seeds for curve in curves if curve.errors is not None}
    notes = [f"bars: one standard error over {_counted(seeds)} seeds"] if seeds else []
    bands = {"of the difference to the best" if c.metric in LOWER else "over the examples" for c in curves if c.band}
    notes += [f"band: 95 % interval {' or '.join(sorted(bands))}"] if bands else []
    wide = max(map(len, "\n".join(entries).split("\n")), default=0)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=max(1, min(len(entries), int(figure.get_figwidth() * 11 // (wide + 6)))),
        fontsize="small",
        frameon=False,
        title="; ".join(notes) or None,
        title_fontsize="small",
    )


def _counted(numbers: set[int]) -> str:
    return str(*numbers) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"
