"""The study's pictures: score by rank, of the main methods."""

from collections import defaultdict
from pathlib import Path

from loralib.files import write_atomically
from loralib.report.curves import Curve
from loralib.report.plots import plot_curves

from .averages import averaged, beside
from .methods import DEFAULT, SHOWN
from .naming import NAMES
from .shown import AVERAGED, Found

# What the picture shows, and how it calls it.
DRAWN = {
    "sweep": "LoRA for each rank, at chosen rates",
    DEFAULT: "DyLoRA (our default)",
    "cut-svd": "LoRA r=8, reduced by SVD",
    "plain-sweep": "LoRA for each rank, at DyLoRA's rate",
    "released": "DyLoRA as released",
    "step": "DyLoRA, a rank per step",
    "matryoshka-mean": "fixed gate, mean",
}
MEANS = ("sweep", DEFAULT, "cut-svd")  # in the picture of averages


def draw(found: Found, directory: Path) -> None:
    """curves.png and curves.svg, if there is anything to draw."""
    drawn = to_curves(found)
    for kind in ("png", "svg") if drawn else ():
        write_atomically(directory / f"curves.{kind}", lambda file, kind=kind: plot_curves(drawn, file, kind=kind))


def to_curves(found: Found) -> list[Curve]:
    """The main methods on each task, of the seeds that the sweep has."""
    drawn = []
    for task in AVERAGED:
        for method, name in DRAWN.items():
            if by_seed := beside(found, "sweep", method, task):
                values = [[curve[b] for b in SHOWN] for curve in by_seed.values()]
                drawn.append(Curve.over_seeds(NAMES[task], "", name, "score", SHOWN, values, name))
    return drawn


def not_drawn(found: Found) -> list[str]:
    """A sentence that names what the picture lacks."""
    tasks_without = defaultdict(list)
    for task in AVERAGED:
        if names := tuple(name for method, name in DRAWN.items() if (task, method) not in found):
            tasks_without[names].append(NAMES[task].split(",")[0])
    told = [f"{' and '.join(tasks)} without {', '.join(names)}" for names, tasks in tasks_without.items()]
    return [f"The picture has {'; '.join(told)}: these were not run there.", ""] if told else []


def averages_to_curves(found: Found) -> list[Curve]:
    """MEANS, of the seeds that all of them have: the mean over AVERAGED, and beside it that without the first task."""
    drawn = []
    for tasks, title in (
        (AVERAGED, f"mean of {len(AVERAGED)} GLUE tasks"),
        (AVERAGED[1:], f"mean of the {len(AVERAGED) - 1} without CoLA"),
    ):
        runs = {DRAWN[method]: averaged(found, method, tasks) for method in MEANS}
        for name, by_seed in runs.items():
            if seeds := sorted(set.intersection(*map(set, runs.values()))):
                values = [[by_seed[seed][b] for b in SHOWN] for seed in seeds]
                drawn.append(Curve.over_seeds(title, "", name, "score", SHOWN, values, name))
    return drawn
