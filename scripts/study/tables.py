"""The study's page and curves, from results/study/runs.jsonl."""

from collections import Counter
from pathlib import Path

from loralib.files import write_atomically, write_text
from loralib.report.curves import Curve
from loralib.report.plots import plot_curves
from loralib.report.tables import markdown_table

from ..pages import page
from .averages import average_table, beside_the_sweep, headline, task_by_task
from .cells import TRIED_RATE, area, usual_records
from .held_out import lead_table, rate_table, tried_table
from .methods import CUTS, DEFAULT, SHOWN
from .naming import HEAD, NAMES, called, order, with_error
from .shown import AVERAGED, scores
from .wide import language_tables, rank_tables, target_tables

# What the picture shows, and how it calls it.
DRAWN = {
    "sweep": "LoRA, a training for each rank",
    DEFAULT: "DyLoRA (our default)",
    "cut-svd": "LoRA r=8, reduced by SVD",
    "released": "DyLoRA as released",
    "step": "DyLoRA, a rank per step",
    "matryoshka-mean": "fixed gate, mean",
}
RUNS = "    python -m scripts.study runs --encoder encoder --data glue --rate 1e-3 --methods"
PAPER = (
    "The paper reports, for RoBERTa-base on eight GLUE tasks, an average of 84.22 at rank 1 and 85.44 at rank 8 for "
    "one DyLoRA, against 54.90 and 85.27 for a LoRA trained at rank 8 and cut; and 83.30 / 84.47 (rank 1 / 8) for "
    "uniform non-frozen sampling against 81.61 / 83.31 for frozen (arXiv 2210.07558). Encoder, data and budget differ "
    "from ours, so only the order of methods can be compared."
)


def task_table(found: dict, task: str) -> list[str]:
    rows = []
    for method in order(m for t, m in found if t == task):
        curves = list(beside_the_sweep(found, method, task).values())
        cells = [with_error([curve[b] for curve in curves]) for b in SHOWN]
        rows.append([called(method), *cells, with_error([area(curve) for curve in curves]), str(len(curves))])
    return [f"### {NAMES[task]}", "", markdown_table([*HEAD, "AURAC", "seeds"], rows, "l"), ""]


def to_curves(found: dict) -> list[Curve]:
    """What the picture shows: the main methods on each task, at the ranks that the sweep has."""
    drawn = []
    for task in AVERAGED:
        for method, name in DRAWN.items():
            if by_seed := beside_the_sweep(found, method, task):
                values = [[curve[b] for b in SHOWN] for curve in by_seed.values()]
                drawn.append(Curve.over_seeds(NAMES[task], "", name, "score", SHOWN, values, name))
    return drawn


def averages_to_curves(found: dict) -> list[Curve]:
    """The main methods that were run on every task of AVERAGED, the mean over these."""
    drawn = []
    for method, name in DRAWN.items():
        if by_seed := beside_the_sweep(found, method):
            values = [[curve[b] for b in SHOWN] for curve in by_seed.values()]
            title = f"mean of {len(AVERAGED)} GLUE tasks"
            drawn.append(Curve.over_seeds(title, "", name, "score", SHOWN, values, name))
    return drawn


def where(records: list[dict]) -> str:
    """How many trainings ran on what."""
    trained = [r for r in records if r["method"] not in CUTS]
    counts = Counter(r.get("device", "cpu") for r in trained)
    on = [f"{counts[name]} on one {name} (fp32, products in TF32)" for name in sorted(counts) if name != "cpu"]
    on += [f"{counts['cpu']} on a processor core each (bf16 autocast where it has bf16 products, else fp32)"]
    return f"Of the trainings, {' and '.join(on)}; lines of runs.jsonl name both, but for older ones of a processor."


def write_tables(directory: Path, records: list[dict], budgets: dict) -> None:
    """README.md and curves.png from the records."""
    everything, records = records, usual_records(records)
    found = scores(records)
    lines = [
        "# Does one DyLoRA run match a LoRA sweep?",
        "",
        "Made by the commands below. MiniLM-L6 (22 M parameters) in RoBERTa's shape, query and value adapted, r_max 8, "
        "alpha 16, batch 32, AdamW, linear decay, warm-up 0.06, weight decay 0.1. Mean ± standard error over seeds, "
        "those that the sweep has; a row that has none of these is over its own and compares with no other. AURAC over "
        "ranks 1, 2, 4, 8. Every method has the same encoder, data, order and number of steps. Of MNLI, QNLI and QQP "
        "the training sets are parts, as many examples as their titles say.",
        "",
        where(everything),
        "",
        "    bash -c '. scripts/env.sh benchmark' && source .venv/bin/activate",
        "    python -m transformers_dylora.minilm encoder",
        "    python -m scripts.study rates --encoder encoder --data glue      # glue: a directory of the tasks",
        "    python -m scripts.study leads --encoder encoder --data glue",
        f"{RUNS} lora-8 lora-4 lora-2 lora-1 mixed-0.8",
        f"{RUNS} lora-8 mixed-0.8 --seeds 3 4",
        "    python -m scripts.study wide --encoder encoder --data glue",
        "    python -m scripts.study language --model SmolLM2-135M-Instruct --data glue     # glue holds webnlg too",
        "    python -m scripts.study tables",
        "    python -m scripts.study cell cola mixed-0.8 0 --rate 1e-3 --encoder encoder --data glue      # one again",
        "",
    ]
    if found:
        lines += [
            "## Is one training as good as one for each rank?",
            "",
            *headline(found, records),
            f"## Average of {len(AVERAGED)} tasks",
            "",
            "Methods that were run on all of them, each training with the same number of steps. Strength is the "
            "factor of the update, a rule in the rank b where it differs; `- sweep` is the paired difference from the "
            "sweep, with its 95 percent t-interval over seeds, and the means are over the seeds that the sweep has.",
            "",
            *average_table(found, records),
            *task_by_task(found),
            "![curves](curves.png)",
            "",
            "## By task",
            "",
        ]
        for task in [task for task in NAMES if any(t == task for t, _ in found)]:
            lines += task_table(found, task)
        if drawn := to_curves(found):
            for kind in ("png", "svg"):
                write_atomically(
                    directory / f"curves.{kind}", lambda file, kind=kind: plot_curves(drawn, file, kind=kind)
                )
    lines += [*rank_tables(everything), *target_tables(everything), *language_tables(everything)]
    lines += lead_table(records)
    lines += [
        "## Learning rates",
        "",
        "AURAC on a held-out tenth of CoLA's and of SST-2's training data, seeds 0 and 1 (`python -m scripts.study "
        "rates`); never on validation. Rates are a factor of two apart, and a grid goes on while its best mean is at "
        'an edge. "open": which rates are still to be measured; until then the runs above are at the rate that their '
        "table names.",
        "",
        *rate_table(records),
    ]
    if tried := tried_table(records):
        lines += [
            "## First tries",
            "",
            f"AURAC on a held-out tenth of train at rate {TRIED_RATE:g}, seed by seed. The leads above began here.",
            "",
            *tried,
        ]
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
