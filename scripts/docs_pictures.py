"""The pictures of the documentation: `python -m scripts.docs_pictures` writes docs/assets."""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loralib.files import write_atomically
from loralib.gate import rank_gate
from loralib.report.plots import COLOURS, plot_curves
from loralib.sampling import RankSampler

from .study.cells import read_records, usual_records
from .study.curves import averages_to_curves
from .study.shown import scores_by_device

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "docs" / "assets"
BLUE, RED, GREEN = COLOURS[:3]


def save(figure: Figure, name: str) -> None:
    FigureCanvasAgg(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dylora"}):
        write_atomically(
            ASSETS / name, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}, facecolor="white")
        )


def gates() -> None:
    """The gates of ranks 1 to 8 at one strength, and a batch in which each example has its own."""
    import torch

    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    batch = torch.tensor([1, 8, 4, 1, 2, 6])
    for panel, ranks, title in (
        (left, torch.arange(1, 9), "the gate of each rank"),
        (right, batch, "a batch: every example its own rank"),
    ):
        gate = rank_gate(ranks, 8, 16, "alpha/r").numpy()
        panel.pcolormesh(gate[::-1] > 0, cmap=_two("#e8ecef", BLUE), edgecolors="white", linewidth=2)
        panel.set_yticks(np.arange(len(ranks)) + 0.5, [f"rank {int(b)}" for b in reversed(ranks)])
        panel.set_xticks(np.arange(8) + 0.5, range(1, 9))
        panel.set_xlabel("component")
        panel.set_title(title, fontsize="medium")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    save(figure, "gate.svg")


def _two(off: str, on: str):
    from matplotlib.colors import ListedColormap

    return ListedColormap([off, on])


def schedule() -> None:
    """A training of fifteen updates of nine examples: what each example runs at."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panel = figure.subplots()
    updates, together, size = 15, 12, 9
    draw = RankSampler(8, distribution="mixed", seed=3)
    for step in range(updates):
        weights = draw(step, size)
        for row in range(size):
            first, low = step < together, bool(weights[row, 0] == 1)
            colour = BLUE if first else RED if low else GREEN
            panel.add_patch(_square(step + 0.06 + (0.3 if not first else 0), row + 0.06, colour))
    middle = together + 0.12
    panel.plot([middle, middle], [-0.3, size + 0.2], color="0.25", linewidth=1.5, linestyle="--")
    panel.text(middle, size + 0.4, "2. ordered", ha="center", fontsize="small")
    panel.text(together / 2, -1.15, "1. together (r_max)", ha="center", color=BLUE)
    panel.text((together + updates) / 2 + 0.3, -1.15, "3. nested", ha="center", color="0.2")
    for x, colour, words in ((0.6, RED, "rank 1"), (0.78, GREEN, "1, 2, 4, 8 at once")):
        panel.add_patch(_square(updates * x, -2.4, colour, 0.5))
        panel.text(updates * x + 0.7, -2.15, words, va="center", fontsize="small")
    panel.set_xlim(-0.9, updates + 0.6)
    panel.set_ylim(-2.7, size + 1)
    panel.text(-0.15, size / 2, "examples of\nan update", ha="right", va="center", fontsize="small", rotation=90)
    panel.annotate(
        "updates", (2.2, -2.15), (0.1, -2.15), va="center", fontsize="small", arrowprops={"arrowstyle": "->"}
    )
    panel.axis("off")
    save(figure, "schedule.svg")


def _square(x: float, y: float, colour: str, size: float = 0.88):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), size * 0.9, size, facecolor=colour, edgecolor="none")


def average() -> None:
    """The study's main methods, mean over its tasks."""
    records = usual_records(read_records(ROOT / "results" / "study" / "runs.jsonl"))
    found = next(iter(scores_by_device(records).values()))  # of the sweep's device
    for kind in ("png", "svg"):
        write_atomically(
            ASSETS / f"average.{kind}", lambda file, kind=kind: plot_curves(averages_to_curves(found), file, kind=kind)
        )


if __name__ == "__main__":
    gates()
    schedule()
    average()
