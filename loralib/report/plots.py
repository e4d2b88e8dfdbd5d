"""Rank-quality curves as images."""

import textwrap
from dataclasses import replace
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .curves import Curve

MARKERS = "osD^vPX*"


def _plain(text: str) -> str:
    """Text as it is: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def plot_curves(curves: list[Curve], path: str | Path, selected: int | None = None, kind: str | None = None) -> None:
    """Draw one line per curve, with error bars where it is over seeds; one panel per task.

    ``kind`` is "png", "svg" or "pdf" (default: the ending of ``path``).
    """
    curves = [replace(c, task=_plain(c.task), split=_plain(c.split), method=_plain(c.method)) for c in curves]
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(6 if columns == 1 else 4.2 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, task in zip(panels, tasks, strict=False):
        of_task = [curve for curve in curves if curve.task == task]
        several_splits, several_methods = (len({getattr(c, k) for c in of_task}) > 1 for k in ("split", "method"))
        for i, curve in enumerate(of_task):
            parts = [curve.method] if several_methods else []
            parts += [curve.split] if curve.split and (several_splits or not several_methods) else []
            name = ", ".join(parts) + (f" ({curve.seeds} seeds)" if curve.seeds > 1 else "")
            panel.errorbar(
                curve.ranks,
                curve.means,
                curve.errors,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                capsize=2,
                label=textwrap.fill(name, 40),
            )
        ranks = sorted({b for curve in of_task for b in curve.ranks})
        panel.set_xticks(ranks if len(ranks) <= 16 else ranks[:: len(ranks) // 8])
        if selected is not None:
            panel.axvline(selected, color="0.6", linestyle=":", label=f"selected rank {selected}")
        panel.set_xlabel("rank")
        panel.set_ylabel(of_task[0].metric.replace("_", " "))
        method = of_task[0].method
        title = task if several_methods or not method else f"{task}: {method}"
        panel.set_title(textwrap.fill(title, 62 if columns == 1 else 42), fontsize="medium")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[1]:
            below = {
                "loc": "upper center",
                "bbox_to_anchor": (0.5, 0),
                "borderaxespad": 4,
            }  # many long names would cover the curves
            panel.legend(fontsize="small", **(below if several_methods else {}))
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    # Text stays text in an SVG, and neither format carries the date: the same runs give the same file.
    from matplotlib import rc_context

    kind = kind or Path(path).suffix[1:]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dylora"}):
        figure.savefig(path, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)
