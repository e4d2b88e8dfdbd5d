"""The study's first page: what came of it, what was compared, and what is not shown."""

from collections import Counter

import numpy as np

from .averages import average_tables, beside_each, interval, paired, task_by_task
from .cells import BUDGETS
from .curves import not_drawn
from .headline import failures, headline, mended
from .held_out import BAR
from .language_tables import validation_tables
from .methods import ALPHA, CUTS, DEFAULT, METHODS, R_MAX, SHOWN
from .naming import OF_SWEEP
from .shown import AVERAGED, PROCESSOR, Found, device_of
from .tried import TRIED

ABOVE = tuple(b for b in SHOWN if b > 1)
SETUP = [
    "- **Model**: MiniLM-L6 (22 M parameters) in RoBERTa's shape; query and value adapted, r_max 8, strength (the "
    "factor of the update) 2.",
    "- **Tasks**: CoLA, 10,000 examples of SST-2, 13,393 of MNLI, 8,999 of QNLI and of QQP, for few epochs. So scores "
    "are low: CoLA's Matthews correlation is near 20, MNLI's accuracy near 63. RTE stays at chance with so small an "
    "encoder and is left out (its lines are in runs.jsonl).",
    "- **The same for all**: encoder, data, order, number of steps, AdamW, batch 32, linear decay, warm-up 0.06, "
    "weight decay 0.1.",
    "- **DyLoRA (our default)**: a LoRA of rank 8 for 0.8 of the steps; then its components are put in order by "
    "their singular values, and the rest trains ranks mixed: a third of the examples at rank 1, the others through the "
    "mean of the gates of ranks 1, 2, 4 and 8. DyLoRA as the paper trains it, one rank drawn for each step from the "
    "first on, scored less on each task that it ran on, in the mean of the ranks ([all tables](tables.md)).",
    "- **DyLoRA, halving**: ordered after 0.3 of the steps; then half of an update's examples at rank 8, a quarter at "
    "rank 1, an eighth each at ranks 2 and 4, and component k's column of B moves 8/k times as far in a step.",
    "- **The sweep**: a LoRA trained for rank 1, another for rank 2, .. : four trainings. Chosen, or **plain**: all at "
    f"DyLoRA's rate, with alpha {ALPHA}.",
    "- **Reduced by SVD**: of one LoRA of rank 8 the largest singular values of each layer's update.",
    "- **Tuning**: learning rates, and the sweep's strengths (at ranks 1, 2 and 4 two to choose from), are chosen on "
    "held-out tenths of the training sets of CoLA and SST-2, two seeds each, rates a factor of two apart, none with "
    "its best at the edge of its grid ([how they were chosen](choosing.md)).",
    "- **±**: half of a 95 percent t-interval over seeds, paired where it is a difference. Seeds change the head's and "
    "the adapter's start, the order of the data and the ranks drawn; each task has one validation set.",
]
PAPER = (
    "- **The paper's figures**: for RoBERTa-base on eight GLUE tasks an average of 84.22 at rank 1 and 85.44 at rank 8 "
    "for one DyLoRA, against 54.90 and 85.27 for a LoRA trained at rank 8 and cut; and 83.30 / 84.47 (rank 1 / 8) for "
    "uniform non-frozen sampling against 81.61 / 83.31 for frozen (arXiv 2210.07558). Encoder, data and budget differ "
    "from ours: only the order of methods can be compared, and the distance from frozen to non-frozen is larger here."
)
RUNS = "    python -m scripts.study runs --encoder encoder --data glue --methods"
COMMANDS = [
    "    bash -c '. scripts/env.sh benchmark' && source .venv/bin/activate",
    "    python -m transformers_dylora.minilm encoder",
    "    python -m scripts.study rates --encoder encoder --data glue      # glue: a directory of the tasks",
    "    python -m scripts.study leads --encoder encoder --data glue",
    f"{RUNS} lora-1 lora-2-strength-2 lora-4-strength-2 lora-8 mixed-0.8 halving --seeds 0 1 2 3 4",
    f"{RUNS} lora-1 lora-2 lora-4 --rate 1e-3",
    f"{RUNS} matryoshka-1 matryoshka-1/r 'matryoshka-1/sqrt(r)' --seeds 3 4",
    f"{RUNS} squeeze-1 squeeze-2 squeeze-4 --rate 1e-3 --seeds 3 4",
    "    python -m scripts.study wide --encoder encoder --data glue",
    "    python -m scripts.study language --model SmolLM2-135M-Instruct --data glue     # glue holds webnlg too",
    "    python -m scripts.study tables",
    "    python -m scripts.study cell cola mixed-0.8 0 --rate 1e-3 --encoder encoder --data glue      # one again",
]


def front_page(founds: dict[str, Found], records: list[dict], everything: list[dict]) -> list[str]:
    """``records``: those of the main tables; ``everything``: wider ones and the language model's too."""
    lines = ["# Does one DyLoRA run match a LoRA sweep?", ""]
    if founds:
        lines += verdict(founds)
    lines += ["## What was compared", "", *SETUP, ""]
    if founds:
        first = next(iter(founds))
        if tables := average_tables(founds[first], records, "sweep"):
            lines += [f"## Scores: mean of {len(AVERAGED)} tasks, on: {first}", "", *tables[:2]]
        lines += ["![curves](curves.png)", "", *not_drawn(founds[first])]
        lines += ["## Is one training as good as one for each rank?", "", *headline(founds, records)]
        lines += ["## Where the difference comes from", ""]
        lines += task_by_task(founds[first], first, "sweep")
        for device, found in founds.items():
            lines += task_by_task(found, device, BAR)
        lines += ["## Beside every peer", "", *beside_each(founds)]
    lines += [*validation_tables(everything), "## What is not shown", "", *limits(records, everything), ""]
    again = (
        "A run that has its line in runs.jsonl is not repeated; `--results DIR` begins anew. `cell` runs one again "
        "whatever is there, and on the same type of processor comes to the same number."
    )
    return [*lines, "## All of it again", "", again, "", *COMMANDS]


def verdict(founds: dict[str, Found]) -> list[str]:
    """The answer in a few sentences, with the figures that they rest on."""
    found = next(iter(founds.values()))
    if len(paired(found, "sweep", SHOWN)) < 2 or len(paired(found, BAR, SHOWN)) < 2:
        return []
    rest = AVERAGED[1:]
    whole, without = interval(paired(found, "sweep", SHOWN)), interval(paired(found, "sweep", SHOWN, tasks=rest))
    replaced = f", with other runs in their place {interval(paired(mended(found), 'sweep', SHOWN))}"
    at_1, above = interval(paired(found, BAR, (1,))), interval(paired(found, BAR, ABOVE, tasks=rest), 2)
    return [
        f"- **Beside a LoRA for each rank**, four trainings, one DyLoRA training is level: {whole} points in the mean "
        f"of the ranks. That is CoLA's: on the other tasks it is {without}"
        + (f"; on CoLA LoRAs of rank 1 failed{replaced}" if failures(found) else "")
        + ".",
        f"- **Beside one LoRA of rank {R_MAX} that is reduced by SVD afterwards**, one training too, it is better at "
        f"rank 1 ({at_1}) and level above (without CoLA {above} in the mean of ranks 2, 4 and 8).",
        "- **On a language model** it is not level: a LoRA for each rank has lower losses (below).",
        "- **From an r_max of 16 or 64** its low ranks fall short of LoRAs of these ranks on CoLA, as those of such a "
        "LoRA reduced by SVD do; no learning rate was searched there ([all tables](tables.md#larger-r_max)).",
        "",
    ]


def limits(records: list[dict], everything: list[dict]) -> list[str]:
    """What a reader has to know before trusting the page."""
    epochs = ", ".join(f"{task} {BUDGETS[task].epochs}" for task in AVERAGED)
    cut = {task: BUDGETS[task].validation for task in AVERAGED if BUDGETS[task].validation}
    measured = f"of {', '.join(cut)} the first {max(cut.values()):,} validation examples are measured"
    own = {*METHODS, *TRIED} - set(OF_SWEEP) - {name for name, made in METHODS.items() if made.adalora or made.wide_A}
    variants = own & {r["method"] for r in everything if r["split"] == "held_out"}
    return [
        f"- One small encoder, few epochs ({epochs}); {measured}.",
        f"- **No task is new to the default.** It was chosen among {len(variants)} variants on held-out parts of the "
        "training data of all these tasks and of RTE; its peers had rates and strengths to choose. Scores on "
        "validation took part in one choice, that between it and halving, and those of an earlier default, ordered "
        "half-way, were known when 0.8 was chosen.",
        "- **One point**, the loss to exclude, was fixed before the runs, for the mean over tasks. CoLA alone varies "
        "by several points between seeds: there no loss of that size is excluded. Verdicts are not corrected for their "
        "number, and those of rank 8 rest on the same LoRA runs.",
        "- **Chosen rates hang on few runs.** Of LoRA of rank 8 one of four held-out runs collapsed at 0.002, and "
        "without it that rate would be its own; rank 1's was chosen by half a point, and at it two runs failed.",
        "- The mean over tasks is of CoLA's Matthews correlation, accuracies, and for QQP the mean of accuracy and F1.",
        "- MatryoshkaLoRA's authors trained language models of 1 and 8 billion parameters; a classifier as small as "
        "this one may be far from what suits their settings.",
        *[f"- {sentence}" for sentence in (where(everything), shared(records), between(records)) if sentence],
        PAPER,
    ]


def where(records: list[dict]) -> str:
    """How many trainings ran on what."""
    trained = [r for r in records if r["method"] not in CUTS]
    counts = Counter(map(device_of, trained))
    on = [f"{counts[name]} on one {name} (fp32, products in TF32)" for name in sorted(counts) if name != PROCESSOR]
    on += [f"{counts[PROCESSOR]} on a core each of a processor (fp32, or bf16 autocast where it has bf16 products)"]
    unnamed = sum("precision" not in r for r in trained)
    return (
        f"Of the trainings, {' and '.join(on)}; {unnamed} lines of runs.jsonl, of processors, do not say in which "
        f"precision. They are of {len({r.get('commit') for r in trained})} commits, which the lines tell."
    )


def shared(records: list[dict]) -> str:
    """How many of the default's runs went on from a LoRA's, device by device; nothing if none did."""
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation"]
    on, went_on = (Counter(map(device_of, runs)) for runs in (own, [r for r in own if "from" in r]))
    told = ", ".join(f"{went_on[name]} of {on[name]} on {name}" for name in sorted(on))
    return (
        "A run of the default goes on from the LoRA of rank 8 with the same seed where its checkpoint was kept, and so "
        f"shares {METHODS[DEFAULT].schedule.full_rank_share:g} of the training with it: {told}."
    ) * bool(sum(went_on.values()))


def between(records: list[dict]) -> str:
    """The default at all ranks, of the runs that measured them all."""
    ranks = [str(b) for b in range(1, R_MAX + 1)]
    own = [r for r in records if r["method"] == DEFAULT and r["split"] == "validation" and r["task"] in AVERAGED]
    own = [r["scores"] for r in own if set(ranks) <= set(r["scores"])]
    means = ", ".join(f"{np.mean([run[b] for run in own]):.1f}" for b in ranks) if own else ""
    return (
        f"Ranks between those of the tables: {len(own)} runs of the default on validation were measured at all of 1 to "
        f"{R_MAX}, in the mean {means} (not all tasks and seeds, so not to be held against the tables)."
    ) * bool(own)
