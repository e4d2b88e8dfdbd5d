"""Tables, curves and cost of the study, from results/study/runs.jsonl."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from loralib.files import write_atomically, write_text
from loralib.report.choice import aurac, mean_and_error
from loralib.report.curves import Curve
from loralib.report.plots import plot_curves
from loralib.report.tables import markdown_table

from ..pages import page
from .cells import LEAD_RUNS, TRIED_RATE, chosen_strengths
from .methods import CUTS, DEFAULT, METHODS, SWEEP, TRIED

SHOWN = tuple(SWEEP)
OF_SWEEP = {name: r for r, names in SWEEP.items() for name in names}
HEAD = ["method", *(f"r={b}" for b in SHOWN)]
NAMES = {"cola": "CoLA (Matthews)", "rte": "RTE (accuracy)", "sst2": "SST-2, 10,000 examples (accuracy)",
         "mnli": "MNLI, 13,393 examples (accuracy)", "qnli": "QNLI, 8,999 examples (accuracy)",
         "qqp": "QQP, 8,999 examples (mean of accuracy and F1)"}  # fmt: skip
# The tasks that averages are over. RTE, from scratch with so small an encoder, stays at chance and adds noise alone.
AVERAGED = ("cola", "sst2", "mnli", "qnli", "qqp")
# What leads are held against: the plainest peer that gives every rank.
BAR = "cut-svd"
LEAD_TASKS = tuple(dict.fromkeys(task for task, _ in LEAD_RUNS))
# What the picture shows, and how it calls it.
DRAWN = {
    "sweep": "LoRA, a training for each rank",
    DEFAULT: "DyLoRA (our default)",
    "cut-svd": "LoRA r=8, reduced by SVD",
    "released": "DyLoRA as released",
    "step": "DyLoRA, a rank per step",
    "matryoshka-mean": "fixed gate, mean",
}
PAPER = (
    "The paper reports, for RoBERTa-base on eight GLUE tasks, an average of 84.22 at rank 1 and 85.44 at rank 8 for "
    "one DyLoRA, against 54.90 and 85.27 for a LoRA trained at rank 8 and cut; and 83.30 / 84.47 (rank 1 / 8) for "
    "uniform non-frozen sampling against 81.61 / 83.31 for frozen (arXiv 2210.07558). Encoder, data and budget differ "
    "from ours, so only the order of methods can be compared."
)


def title(method: str) -> str:
    return {**METHODS, **CUTS, **TRIED}[method].title


def scores(records: list[dict], split: str = "validation") -> dict[tuple[str, str], dict[int, dict[int, float]]]:
    """{(task, method): {seed: {rank: score}}}; the sweep's four runs of a seed, each at the strength that is chosen for
    its rank, are one method, "sweep"."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    chosen = {r: names[0] for r, names in SWEEP.items()} | chosen_strengths(records)
    for record in records:
        method = record["method"]
        if record["split"] != split or (method in OF_SWEEP and method != chosen[OF_SWEEP[method]]):
            continue
        method = "sweep" if method in OF_SWEEP else method
        for b, value in record["scores"].items():
            found[record["task"], method][record["seed"]][int(b)] = value
    for key in [key for key in found if key[1] == "sweep"]:  # seeds whose four runs are there
        found[key] = {seed: curve for seed, curve in found[key].items() if len(curve) == len(SWEEP)}
    return {key: dict(by_seed) for key, by_seed in found.items() if by_seed}


def shown(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


def area(curve: dict[int, float]) -> float:
    """AURAC over ranks 1, 2, 4 and 8, which the sweep has too."""
    return aurac(list(SHOWN), [curve[b] for b in SHOWN])


def order(methods) -> list[str]:
    wanted = ["sweep", *CUTS, *METHODS, *TRIED]
    return sorted(methods, key=wanted.index)


def called(method: str) -> str:
    return "LoRA trained at that rank alone (the sweep, 4 runs)" if method == "sweep" else title(method)


def task_table(found: dict, task: str) -> list[str]:
    rows = []
    for method in order(m for t, m in found if t == task):
        curves = list(found[task, method].values())
        cells = [shown([curve[b] for curve in curves]) for b in SHOWN]
        rows.append([called(method), *cells, shown([area(curve) for curve in curves]), str(len(curves))])
    return [f"### {NAMES[task]}", "", markdown_table([*HEAD, "AURAC", "seeds"], rows, "l"), ""]


def averaged(found: dict, method: str) -> dict[int, dict[int, float]]:
    """{seed: {rank: the mean over AVERAGED}} for seeds that every task has."""
    runs = [found.get((task, method), {}) for task in AVERAGED]
    seeds = set.intersection(*(set(by_seed) for by_seed in runs))
    return {seed: {b: float(np.mean([run[seed][b] for run in runs])) for b in SHOWN} for seed in sorted(seeds)}


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 percent t-interval over seeds."""
    mean, error = mean_and_error(values)
    if error is None:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.1f}"


def average_table(found: dict) -> list[str]:
    """The mean over tasks, and its difference from the sweep's, paired by seed, with its interval."""
    sweep = averaged(found, "sweep")
    rows = []
    for method in order({m for _, m in found}):
        by_seed = averaged(found, method)
        if not by_seed:
            continue
        cells = [f"{np.mean([curve[b] for curve in by_seed.values()]):.1f}" for b in SHOWN]
        cells.append(f"{np.mean([[curve[b] for b in SHOWN] for curve in by_seed.values()]):.1f}")
        both = [seed for seed in by_seed if seed in sweep]
        apart = [interval([by_seed[seed][b] - sweep[seed][b] for seed in both]) for b in SHOWN] if both else []
        apart += [interval([np.mean([by_seed[s][b] - sweep[s][b] for b in SHOWN]) for s in both])] if both else []
        beside = [""] * 5 if method == "sweep" else apart
        rows.append([called(method), *cells, str(len(by_seed)), *beside])
    beside = [f"- sweep, {name}" for name in (*(f"r={b}" for b in SHOWN), "mean")]
    return [markdown_table([*HEAD, "mean", "seeds", *beside], rows, "l"), ""]


def rate_table(records: list[dict]) -> list[str]:
    """AURAC on the held-out tenths, by rate: how the rates were chosen, and what was tried."""
    cells: dict = defaultdict(list)
    for record in records:
        if record["split"] == "held_out":
            cells[record["method"], record["task"], record["rate"]].append((record["seed"], record["aurac"]))
    tasks = list(dict.fromkeys(task for _, task, _ in cells))
    rates = sorted({rate for _, _, rate in cells})
    rows = []
    for method in order({m for m, _, _ in cells}):
        of_method = [sorted(cells.get((method, task, rate), [])) for task in tasks for rate in rates]
        rows.append([title(method), *(", ".join(f"{value:.1f}" for _, value in seeds) for seeds in of_method)])
    return [markdown_table(["method", *(f"{task} {rate:g}" for task in tasks for rate in rates)], rows, "l"), ""]


def lead_table(records: list[dict]) -> list[str]:
    """What was tried beside LoRA reduced by SVD, on parts of train on which no rate was chosen."""
    runs = {
        (r["task"], r["seed"], r["method"]): {int(b): value for b, value in r["scores"].items()}
        for r in records
        if r["split"] == "held_out" and r["rate"] == TRIED_RATE and (r["task"], r["seed"]) in LEAD_RUNS
    }
    rows = []
    for method in order({m for _, _, m in runs} - set(OF_SWEEP) - {BAR}):
        both = [cell for cell in LEAD_RUNS if (*cell, method) in runs and (*cell, BAR) in runs]
        if len(both) < 2:
            continue
        apart = [[runs[(*cell, method)][b] - runs[(*cell, BAR)][b] for cell in both] for b in SHOWN]
        rows.append(
            [title(method), *("{:+.2f} ± {:.2f}".format(*mean_and_error(each)) for each in apart), str(len(both))]
        )
    if not rows:
        return []
    tasks = ", ".join(NAMES[task].split(",")[0] for task in LEAD_TASKS)
    return [
        f"## Leads, beside {title(BAR)}",
        "",
        f"Differences on a held-out tenth of train of {tasks}, two seeds each, at rate {TRIED_RATE:g}: mean ± standard "
        "error over these runs.",
        "",
        markdown_table([*HEAD, "runs"], rows, "l"),
        "",
    ]


def cost_table(records: list[dict]) -> list[str]:
    rows = []
    measured = [r for r in records if r["split"] == "validation" and r["method"] not in CUTS]
    for method in order({r["method"] if r["method"] not in OF_SWEEP else "sweep" for r in measured}):
        runs = [r for r in measured if (r["method"] in OF_SWEEP if method == "sweep" else r["method"] == method)]
        n = len({(r["task"], r["seed"]) for r in runs})
        steps, minutes = sum(r["steps"] for r in runs) / n, sum(r["seconds"] for r in runs) / n / 60
        rows.append([called(method), f"{len(runs) / n:.0f} a task and seed", f"{steps:,.0f}", f"{minutes:.1f}"])
    return [markdown_table(["method", "runs", "optimizer steps", "training, minutes"], rows, "l"), ""]


def headline(found: dict, method: str = DEFAULT) -> list[str]:
    """The question of the page, and what came of it: the paired differences of ``method`` from the sweep."""
    ours, sweep = averaged(found, method), averaged(found, "sweep")
    both = sorted(set(ours) & set(sweep))
    if len(both) < 2:
        return []
    rows = []
    for name, ranks in [*((f"rank {b}", [b]) for b in SHOWN), ("mean of the ranks", SHOWN)]:
        apart = [float(np.mean([ours[s][b] - sweep[s][b] for b in ranks])) for s in both]
        mean, error = mean_and_error(apart)
        low = mean - stats.t.ppf(0.975, len(both) - 1) * error
        rows.append([name, interval(apart), "yes" if low > -1 else "no"])
    return [
        "<!-- --8<-- [start:headline] -->",
        f"Mean over {len(AVERAGED)} tasks for each seed, then the paired difference over {len(both)} seeds with its 95 "
        "percent "
        't-interval, in points. "No worse" means that the interval\'s lower end is above -1 point.',
        "",
        markdown_table(["one DyLoRA training at", "minus a LoRA trained for that rank", "no worse"], rows, "lrl"),
        "<!-- --8<-- [end:headline] -->",
        "",
    ]


def to_curves(found: dict) -> list[Curve]:
    """What the picture shows: the main methods on each task, at the ranks that the sweep has."""
    drawn = []
    for task in AVERAGED:
        for method, name in DRAWN.items():
            if by_seed := found.get((task, method)):
                values = [[curve[b] for b in SHOWN] for curve in by_seed.values()]
                drawn.append(Curve.over_seeds(NAMES[task], "", name, "score", SHOWN, values, name))
    return drawn


def averages_to_curves(found: dict) -> list[Curve]:
    """The main methods that were run on every task of AVERAGED, the mean over these."""
    drawn = []
    for method, name in DRAWN.items():
        if by_seed := averaged(found, method):
            values = [[curve[b] for b in SHOWN] for curve in by_seed.values()]
            title = f"mean of {len(AVERAGED)} GLUE tasks"
            drawn.append(Curve.over_seeds(title, "", name, "score", SHOWN, values, name))
    return drawn


def write_tables(directory: Path, records: list[dict], rates: dict[str, float], budgets: dict) -> None:
    """README.md and curves.png from the records."""
    found = scores(records)
    lines = [
        "# Does one DyLoRA run match a LoRA sweep?",
        "",
        "Made by the commands below. MiniLM-L6 (22 M parameters) in RoBERTa's shape, query and value "
        "adapted, r_max 8, alpha 16, batch 32, AdamW, linear decay, warm-up 0.06, weight decay 0.1, bf16 autocast on "
        "one CPU core a run. Mean ± standard error over seeds; AURAC over ranks 1, 2, 4, 8. Every method has the same "
        "encoder, data, order and number of steps.",
        "",
        "    bash -c '. scripts/env.sh benchmark' && source .venv/bin/activate",
        "    python -m transformers_dylora.minilm encoder",
        "    python -m scripts.study rates --encoder encoder --data glue      # glue: a directory of the tasks",
        "    python -m scripts.study leads --encoder encoder --data glue",
        "    python -m scripts.study runs --encoder encoder --data glue",
        "    python -m scripts.study tables",
        "    python -m scripts.study cell cola mixed 0 --encoder encoder --data glue      # one cell again",
        "",
    ]
    if found:
        lines += [
            "## Is one training as good as one for each rank?",
            "",
            *headline(found),
            f"## Average of {len(AVERAGED)} tasks",
            "",
            "Methods that were run on all of them; `- sweep` is the paired difference from the sweep.",
            "",
            *average_table(found),
            "![curves](curves.png)",
            "",
            "## By task",
            "",
        ]
        for task in [task for task in NAMES if any(t == task for t, _ in found)]:
            lines += task_table(found, task)
        lines += ["## Cost", "", *cost_table(records)]
        if drawn := to_curves(found):
            for kind in ("png", "svg"):
                write_atomically(
                    directory / f"curves.{kind}", lambda file, kind=kind: plot_curves(drawn, file, kind=kind)
                )
    lines += lead_table(records)
    lines += ["## Learning rates, and what was tried", "",
              "AURAC on a held-out tenth of train, by task and rate, seed by seed (`python -m scripts.study "
              "rates`); never on validation. Chosen: "
              + ", ".join(f"{name} {rate:g}" for name, rate in sorted(rates.items())) + ".",
              "", *rate_table(records)]  # fmt: skip
    budget = ", ".join(
        f"{task} {b.epochs} epochs" + (f" of {b.train:,} examples" if b.train else "")
        + (f", the first {b.validation:,} of validation" if b.validation else "")
        for task, b in budgets.items()
    )  # fmt: skip
    limits = (
        f"One small encoder; budgets: {budget}. Seeds change the head's and the adapter's start, the order of the data "
        f"and the ranks drawn; the validation set is one. {PAPER}"
    )
    lines += ["## Limits", "", limits, ""]
    write_text(directory / "README.md", page(lines))
