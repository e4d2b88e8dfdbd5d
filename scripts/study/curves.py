"""The study's pictures: score by rank, of the main methods."""

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
    "plain-sweep": "LoRA for each rank, at DyLoRA's rate",
    DEFAULT: "DyLoRA (our default)",
    "cut-svd": "LoRA r=8, reduced by SVD",
    "released": "DyLoRA as released",
    "step": "DyLoRA, a rank per step",
    "matryoshka-mean": "fixed gate, mean",
}
MEANS = ("sweep", DEFAULT, "cut-svd")  # in the picture of averages


def draw(found: Found, directory: Path) -> bool:
    """curves.png and curves.svg; whether there was anything to draw."""
    drawn = to_curves(found)
    for kind in ("png", "svg") if drawn else ():
        write_atomically(directory / f"curves.{kind}", lambda file, kind=kind: plot_curves(drawn, file, kind=kind))
    return bool(drawn)


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
    lacking = {task: [name for method, name in DRAWN.items() if (task, method) not in found] for task in AVERAGED}
    sentences = [
        f"{NAMES[task].split(',')[0]} has no run of: {'; '.join(names)}." for task, names in lacking.items() if names
    ]
    return [" ".join(sentences), ""] if sentences else []


def averages_to_curves(found: Found) -> list[Curve]:
    """MEANS, the mean over AVERAGED, of the seeds that all of them have."""
    runs = {DRAWN[method]: averaged(found, method) for method in MEANS}
    seeds = sorted(set.intersection(*map(set, runs.values())))
    title = f"mean of {len(AVERAGED)} GLUE tasks"
    return [
        Curve.over_seeds(title, "", name, "score", SHOWN, [[by_seed[s][b] for b in SHOWN] for s in seeds], name)
        for name, by_seed in runs.items()
        if seeds
    ]
