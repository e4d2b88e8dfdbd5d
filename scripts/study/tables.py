"""The study's page and curves, from results/study/runs.jsonl."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from loralib.files import write_atomically, write_text
from loralib.report.curves import Curve
from loralib.report.plots import plot_curves
from loralib.report.tables import markdown_table

from ..pages import page
from .averages import average_tables, averaged, beside, headline, peer_on, task_by_task, with_most_seeds
from .cells import RATE_RUNS, TRIED_RATE, area, usual_records
from .held_out import BAR, lead_table, rate_table, tried_table
from .language_tables import language_tables
from .methods import ALPHA, CUTS, DEFAULT, METHODS, R_MAX, SHOWN
from .naming import HEAD, NAMES, called, order, spans, with_error
from .shown import AVERAGED, PROCESSOR, Found, by_row, device_of, scores_by_device
from .wide import rank_tables, target_tables

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
RUNS = "    python -m scripts.study runs --encoder encoder --data glue --rate 1e-3 --methods"
PAPER = (
    "The paper reports, for RoBERTa-base on eight GLUE tasks, an average of 84.22 at rank 1 and 85.44 at rank 8 for "
    "one DyLoRA, against 54.90 and 85.27 for a LoRA trained at rank 8 and cut; and 83.30 / 84.47 (rank 1 / 8) for "
    "uniform non-frozen sampling against 81.61 / 83.31 for frozen (arXiv 2210.07558). Encoder, data and budget differ "
    "from ours, so only the order of methods can be compared."
)


def task_tables(founds: dict[str, Found], task: str, records: list[dict]) -> list[str]:
    """Every row that was measured on the task, a table for each device."""
    rates = defaultdict(set)
    for record, row, _ in by_row(records):
        rates[row, record["task"], device_of(record)].add(record["rate"])
    lines = []
    for device, found in founds.items():
        rows = []
        for method in order(m for t, m in found if t == task):
            runs = beside(found, peer_on(founds, device), method, task)
            cells = [with_error([curve[b] for curve in runs.values()]) for b in SHOWN]
            cells.append(with_error([area(curve) for curve in runs.values()]))
            at = ", ".join(f"{rate:g}" for rate in sorted(rates[method, task, device]))
            rows.append([called(method), *cells, spans(runs), at])
        if rows:
            head = [*HEAD, "AURAC", "seeds", "rate"]
            lines += [f"### {NAMES[task]}, on: {device}", "", markdown_table(head, rows, "l"), ""]
    return lines


def to_curves(found: Found) -> list[Curve]:
    """What the picture shows: the main methods on each task, of the seeds that the sweep has."""
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
    """The main methods that were run on every task of AVERAGED, the mean over these, of the seeds that all of them
    have."""
    runs = {name: averaged(found, method) for method, name in DRAWN.items()}
    runs = {name: by_seed for name, by_seed in runs.items() if by_seed}
    seeds = set.intersection(*map(set, runs.values())) if runs else set()
    title = f"mean of {len(AVERAGED)} GLUE tasks"
    return [
        Curve.over_seeds(title, "", name, "score", SHOWN, [[by_seed[s][b] for b in SHOWN] for s in sorted(seeds)], name)
        for name, by_seed in runs.items()
        if seeds
    ]


def where(records: list[dict]) -> str:
    """How many trainings ran on what."""
    trained = [r for r in records if r["method"] not in CUTS]
    counts = Counter(map(device_of, trained))
    on = [f"{counts[name]} on one {name} (fp32, products in TF32)" for name in sorted(counts) if name != PROCESSOR]
    on += [f"{counts[PROCESSOR]} on a core each of a processor (fp32, or bf16 autocast where it has bf16 products)"]
    unnamed = sum("precision" not in r for r in trained)
    return f"Of the trainings, {' and '.join(on)}; {unnamed} lines of runs.jsonl, of processors, do not say which."


def shared(records: list[dict]) -> list[str]:
    """A sentence: how many of the default's runs went on from a LoRA's, device by device; nothing if none did."""
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation"]
    on, went_on = (Counter(map(device_of, runs)) for runs in (own, [r for r in own if "from" in r]))
    told = ", ".join(f"{went_on[name]} of {on[name]} on {name}" for name in sorted(on))
    return [
        "A run of the default goes on from the LoRA of rank 8 with the same seed where its checkpoint was kept, and so "
        f"shares {METHODS[DEFAULT].schedule.full_rank_share:g} of the training with it: {told}.",
        "",
    ] * bool(sum(went_on.values()))


def between(records: list[dict]) -> list[str]:
    """A sentence: the default at all ranks, of the runs that measured them all."""
    everything = [str(b) for b in range(1, R_MAX + 1)]
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation" and r["task"] in AVERAGED]
    own = [r["scores"] for r in own if set(everything) <= set(r["scores"])]
    means = ", ".join(f"{np.mean([run[b] for run in own]):.1f}" for b in everything) if own else ""
    return [
        f"Ranks between those of the tables: {len(own)} runs of the default on validation were measured at all of 1 to "
        f"{R_MAX}, in the mean {means}.",
        "",
    ] * bool(own)


def searched_on(records: list[dict]) -> str:
    """A sentence: which devices the searches for rates ran on."""
    kept = [r for r in records if r["split"] == "held_out" and (r["task"], r["seed"]) in RATE_RUNS]
    on = Counter(device_of(r) for r in kept if r["method"] in METHODS)
    return f"Of these runs {', '.join(f'{n} are on {name}' for name, n in sorted(on.items()))}." if on else ""


WORDS = [
    "- **±**: in tables of averages the half width of a 95 percent t-interval over seeds; by task and among the "
    "leads one standard error, with three seeds a quarter of that.",
    "- **the sweep**: a LoRA trained at rank 1, another at rank 2, .. : four trainings, each at the learning rate and "
    "strength that were best for its rank on held-out parts of the training sets of CoLA and SST-2. **the plain "
    f"sweep**: the same, all at DyLoRA's rate and with alpha {ALPHA}. All other rows give every rank by one training.",
    "- **r_max**: the highest rank, which an adapter is made for. **component**: a row of A with its column of B; a "
    "layer has r_max of them, and rank b uses b.",
    "- **strength**: the factor of the update B A x, alpha / r in plain LoRA; a rule in the rank b where it differs. "
    "**alpha/b**: alpha over the rank in use; **alpha/r**: alpha over r_max, the same at every rank.",
    "- **cut**: the first b components as they were trained, in no order.",
    "- **reduced by SVD**: of each layer's update the b largest singular values, as PEFT's `convert_to_lora` keeps "
    "them. **PARA**: those above one threshold over all layers, at rank b as many in all as b in each layer. "
    "**energy**: of each layer those that "
    "make up one share of its squared singular values. **Fisher**: the components that the loss depends on most, over "
    "all layers.",
    "- **fixed gate**: one gate for all updates, the sum or mean of several ranks' gates, at settings of ours. "
    "**MatryoshkaLoRA**: the sum over ranks 1, 2, 4 and 8 at its authors' settings (arXiv 2605.07850): no alpha, "
    "lora_A drawn with a bound of 1/sqrt(r), and of each rank r in the sum the scale 1, 1/r or 1/sqrt(r). They trained "
    "language models of 1 and 8 billion parameters; a classifier as small as this one may be far from what these suit.",
    "- **mean**: the plain mean of ranks 1, 2, 4 and 8.",
    "- **AURAC**: the area under score over rank at ranks 1, 2, 4, 8, divided by the span: rank 1 counts 7 percent, "
    "rank 8 29, rank 4 43. Of a row with one rank it is the score there.",
    "- **held out**: a tenth of the training data, never trained on; rates and strengths are chosen there.",
    "- **ordered**: from some step on the components are the singular pairs of their update, largest first. **mixed**: "
    "a third of the examples then run at rank 1, the others through the mean of the gates of ranks 1, 2, 4, 8. **half "
    "of the examples there**: the others then at rank 1 (a quarter) and ranks 2 and 4 (an eighth each). **first "
    "components faster**: component k's column of B moves 8/k times as far in a step.",
    "- **LoRA-Squeeze**: arXiv 2602.10993, which trains on after the reduction. `dylora squeeze` reduces alone.",
]

FIRST_TRIES = [
    "# First tries of the study",
    "",
    f"AURAC on a held-out tenth of train at rate {TRIED_RATE:g}, seed by seed; of the LoRA of rank 8 its score there. "
    "RTE is one seed and near chance. They led to what [the study](README.md) compares.",
    "",
]

COMMANDS = [
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
]


def main_tables(founds: dict[str, Found], records: list[dict]) -> list[str]:
    """The answer, and the averages that it comes from: beside the sweep, and beside the plainest peer."""
    lines = ["## Is one training as good as one for each rank?", "", *headline(founds, records)]
    lines += ["## Words", "", *WORDS, ""]
    for peer in ("sweep", BAR):
        for device in with_most_seeds(founds, peer):
            if tables := average_tables(founds[device], records, peer):
                lines += [f"## Average of {len(AVERAGED)} tasks, beside {called(peer)}, on: {device}", "", *tables]
    for name, found in founds.items():
        lines += task_by_task(found, name)
    lines += [*shared(records), *between(records)]
    return [*lines, "![curves](curves.png)", "", *not_drawn(next(iter(founds.values())))]


def write_tables(directory: Path, records: list[dict], budgets: dict) -> None:
    """README.md, tries.md and curves.png from the records."""
    everything, records = records, usual_records(records)
    founds = scores_by_device(records)
    lines = [
        "# Does one DyLoRA run match a LoRA sweep?",
        "",
        "MiniLM-L6 (22 M parameters) in RoBERTa's shape, query and value adapted, r_max 8, alpha 16, batch 32, AdamW, "
        "linear decay, warm-up 0.06, weight decay 0.1. Every method has the same encoder, data, order and number of "
        "steps. Of MNLI, QNLI and QQP the training sets are parts, as many examples as their titles say. RTE, from "
        "scratch with so small an encoder, stays at chance, between 48 and 54, and is left out (its lines are in "
        "runs.jsonl). The commands stand at the end.",
        "",
        where(everything),
        "",
    ]
    if founds:
        lines += main_tables(founds, records)
        lines += [
            "## By task",
            "",
            "Mean ± standard error over the seeds that stand in the row; only rows of the same seeds compare. They are "
            "those that the sweep has on the device, or where it has few, the LoRA reduced by SVD.",
            "",
        ]
        first = next(iter(founds.values()))
        for task in AVERAGED:
            lines += task_tables(founds, task, records)
        if drawn := to_curves(first):
            for kind in ("png", "svg"):
                write_atomically(
                    directory / f"curves.{kind}", lambda file, kind=kind: plot_curves(drawn, file, kind=kind)
                )
    lines += [*rank_tables(everything), *target_tables(everything), *language_tables(everything)]
    lines += lead_table(records)
    tasks = " / ".join(f"{NAMES[task].split(' ')[0].rstrip(',')}'s seeds 0, 1" for task in ("cola", "sst2"))
    lines += [
        "## Learning rates",
        "",
        "AURAC on a held-out tenth of CoLA's and of SST-2's training data, seeds 0 and 1 (`python -m scripts.study "
        f"rates`); never on validation. A cell holds {tasks}. Rates are a factor of two apart, and a grid goes on "
        'while its best mean is at an edge. "open": which rates are still to be measured; until then the runs above '
        "are at the rate that their table names. The mean of four runs decides, and one that collapsed (0.0) decides "
        "too: without it LoRA of rank 8 would take 0.002. What is chosen on these two tasks counts for all. In "
        "the last column the best mean stands beside its rate. " + searched_on(records),
        "",
        *rate_table(records),
    ]
    if tried := tried_table(records):
        write_text(directory / "tries.md", page([*FIRST_TRIES, *tried]))
        lines += ["What was tried first, on two tasks, has [a page of its own](tries.md).", ""]
    budget = ", ".join(
        f"{task} {b.epochs} epochs" + (f" of {b.train:,} examples" if b.train else "")
        + (f", the first {b.validation:,} of validation" if b.validation else "")
        for task, b in budgets.items()
    )  # fmt: skip
    limits = (
        f"One small encoder; budgets: {budget}. Seeds change the head's and the adapter's start, the order of the data "
        f"and the ranks drawn; the validation set is one. No task is new to the default: it was chosen among some 40 "
        "variants on held-out parts of the training data of all these tasks and of RTE. Scores on validation data did "
        "not choose it, but those of an earlier default, ordered half-way, were known when 0.8 was chosen, and those "
        "of half of the examples at r_max, ordered at 0.3, were among the reasons to keep it. The "
        "mean over tasks is of Matthews correlations (CoLA), accuracies, and for QQP the mean of accuracy and F1. "
        f"{PAPER}"
    )
    lines += ["## Limits", "", limits, "", "## All of it again", "", *COMMANDS, ""]
    write_text(directory / "README.md", page(lines))
