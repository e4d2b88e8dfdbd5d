"""The study's first page: what came of it, what was compared, and what is not shown."""

from .averages import average_tables, beside_each, interval, paired, task_by_task, with_most_seeds
from .cells import BUDGETS
from .curves import not_drawn
from .fitted import fitted_tables, in_short
from .headline import failures, headline, mended
from .held_out import BAR
from .language_tables import validation_tables
from .methods import ALPHA, DEFAULT, METHODS, R_MAX, SHOWN
from .naming import OF_SWEEP
from .shown import AVERAGED, Found
from .tried import TRIED

ABOVE = tuple(b for b in SHOWN if b > 1)
HALVING = "halving"
ADVICE = [
    "*Take it* where one training is to serve small ranks too, rank 1 above all, on tasks like these. *LoRA and "
    "`dylora squeeze --strengths`* do as well where rank 1 is never used, and better at ranks 4 and 8 of a language "
    "model. Take r_max no larger than you need.",
    "",
]
SETUP = [
    "- **Model and tasks**: MiniLM-L6 (22 M parameters) in RoBERTa's shape, query and value adapted, r_max 8; CoLA, "
    "10,000 examples of SST-2, 13,393 of MNLI, 8,999 of QNLI and of QQP, for few epochs. So scores are low: CoLA's "
    "Matthews correlation is near 20, MNLI's accuracy near 63. RTE stays at chance with so small an encoder and is "
    "left out (its lines are in runs.jsonl).",
    "- **The same for all**: encoder, data, order, number of steps, AdamW, batch 32, linear decay, warm-up 0.06, "
    "weight decay 0.1. Not the machine and its precision: pairs share the kind of device alone.",
    "- **DyLoRA (our default)**: a LoRA of rank 8 for 0.8 of the steps; then its components are put in order by their "
    "singular values, and the rest trains ranks mixed: a third of the examples at rank 1, the others with the "
    "adapters of ranks 1, 2, 4 and 8 averaged. This is not the paper's training, which draws one rank for each step "
    "from the first on: that scored less in the mean of the ranks (`DyLoRA, per step` and `as released` "
    "[below](#beside-every-peer), at rates chosen as for all).",
    "- **DyLoRA, halving**: ordered after 0.3 of the steps; then half of an update's examples at rank 8, a quarter at "
    "rank 1, an eighth each at ranks 2 and 4, and component k's column of B moves 8/k times as far in a step.",
    "- **The sweep**: a LoRA trained for rank 1, another for rank 2, .. : four trainings. Chosen: each at its own "
    f"strength (factor of the update) and rate. **Plain**: all with alpha {ALPHA}, at DyLoRA's rate.",
    "- **Reduced by SVD**: one LoRA of rank 8, of which each layer keeps the largest singular values.",
    "- **Tuning**: learning rates, and the sweep's strengths (at ranks 1, 2 and 4 two to choose from), are chosen on "
    "held-out tenths of the training sets of CoLA and SST-2, two seeds each, rates a factor of two apart, none of "
    "these with its best at the edge of its grid ([how they were chosen](choosing.md)).",
    "- **±**: half of a 95 percent t-interval over seeds, paired where it is a difference (of the language model one "
    "standard error). Seeds change the head's and the adapter's start, the order of the data and the ranks drawn; "
    "each task has one validation set.",
]
PEERS = (
    "What the names mean stands with [all tables](tables.md). MatryoshkaLoRA's authors trained language models of 1 "
    "and 8 billion parameters; a classifier as small as this one may be far from what suits their settings. AdaLoRA's "
    "trained CoLA for 25 epochs, here it is 4: two seeds of it tell no more than that it is no better in the mean."
)
RUNS = "    python -m scripts.study runs --encoder encoder --data glue --methods \\\n       "
COMMANDS = [
    "    bash -c '. scripts/env.sh benchmark' && source .venv/bin/activate",
    "    python -m transformers_dylora.minilm encoder",
    "    python -m scripts.study rates --encoder encoder --data glue      # glue: a directory of the tasks",
    "    python -m scripts.study leads --encoder encoder --data glue",
    f"{RUNS} lora-1 lora-2-strength-2 lora-4-strength-2 lora-8 mixed-0.8 halving --seeds 0 1 2 3 4",
    f"{RUNS} lora-1 lora-2 lora-4 --rate 1e-3",
    f"{RUNS} released step step-geometric example matryoshka-mean ordered mixed --rate 1e-3",
    f"{RUNS} matryoshka-1 matryoshka-1/r 'matryoshka-1/sqrt(r)' --seeds 3 4",
    f"{RUNS} squeeze-1 squeeze-2 squeeze-4 --rate 1e-3 --seeds 3 4",
    f"{RUNS} adalora-1 adalora-2 adalora-4 adalora-8 --seeds 3 4",
    f"{RUNS} matryoshka-sum --rate 5e-4",
    "    python -m scripts.study rates --encoder encoder --data glue --r-max 16      # and 64",
    "    python -m scripts.study wide --encoder encoder --data glue",
    "    python -m scripts.study wide --encoder encoder --data glue --methods halving",
    "    python -m scripts.study language --model SmolLM2-135M-Instruct --data glue     # glue holds webnlg too",
    "    python -m scripts.study language --model SmolLM2-135M-Instruct --data glue --methods halving halving-0 \\\n"
    "        --rate 2e-3",
    "    python -m scripts.study tables",
    "    python -m scripts.study cell cola mixed-0.8 0 --rate 1e-3 --encoder encoder --data glue      # one again",
]


def front_page(founds: dict[str, Found], records: list[dict], everything: list[dict]) -> list[str]:
    """``records``: those of the main tables; ``everything``: wider ones and the language model's too."""
    lines = ["# Does one DyLoRA run match a LoRA sweep?", ""]
    if told := verdict(founds):
        lines += [*told, *in_short(records), "", *ADVICE]
    if founds:
        lines += ["## Is one training as good as one for each rank?", "", *headline(founds, records)]
    lines += ["## What was compared", "", *SETUP, ""]
    if founds:
        first = next(iter(founds))
        rows = ("sweep", BAR, DEFAULT, HALVING)
        if tables := average_tables(founds[first], records, "sweep", rows):
            lines += [f"## Scores: mean of {len(AVERAGED)} tasks, on: {first}", "", *tables[:2]]
        lines += ["![curves](curves.png)", "", *not_drawn(founds[first])]
        lines += ["## Where the difference comes from", "", *task_by_task(founds[first], first, "sweep")]
        device = with_most_seeds(founds, BAR)[-1]
        lines += task_by_task(founds[device], device, BAR)
    lines += validation_tables(everything)
    if founds:
        lines += fitted_tables(records, everything)
        lines += ["## Beside every peer", "", PEERS, "", *beside_each(founds)]
    again = (
        "A run that has its line in runs.jsonl is not repeated; `--results DIR` begins anew. `cell` runs one again "
        "whatever is there, and on the same type of processor comes to the same number."
    )
    return [*lines, "## Limits", "", *limits(everything), "", "## Reproduce", "", again, "", *COMMANDS]


def verdict(founds: dict[str, Found]) -> list[str]:
    """The answer in a few sentences, with the figures that they rest on."""
    found = next(iter(founds.values()), {})
    pairs = {peer: len(paired(found, peer, SHOWN)) for peer in ("sweep", "plain-sweep", BAR)}
    if min(pairs.values()) < 2 or not failures(found):
        return []
    rest, device = AVERAGED[1:], with_most_seeds(founds, BAR)[-1]
    other = founds[device]
    elsewhere = f" on {next(iter(founds))}, {interval(paired(other, BAR, (1,)))} on {device}" if other != found else ""

    def of_sweep(ranks, tasks=AVERAGED, found=found):
        return interval(paired(found, "sweep", ranks, tasks=tasks))

    plain = interval(paired(found, "plain-sweep", SHOWN))
    return [
        "- **Beside a LoRA for each rank**, four trainings at chosen rates, one DyLoRA training is level in the mean "
        f"of the ranks: {of_sweep(SHOWN)}, a loss of one point is excluded. All of it comes from CoLA, where LoRAs of "
        f"rank 1 failed: {of_sweep(SHOWN, found=mended(found))} with these replaced, {of_sweep(SHOWN, rest)} without "
        f"CoLA. At rank 1 it is not excluded ({of_sweep((1,))}). Beside LoRAs at DyLoRA's own rate "
        f"{pairs['plain-sweep']} seeds show {plain}, which cannot tell.",
        f"- **Beside one LoRA of rank {R_MAX} that is reduced by SVD**, one training too, it is better at rank 1 "
        f"({interval(paired(found, BAR, (1,)))}{elsewhere}). Above, the gain is CoLA's alone: without it "
        f"{interval(paired(other, BAR, ABOVE, tasks=rest))} in the mean of ranks 2, 4 and 8, on {device}.",
        "- **On a language model** it is not level: LoRAs for each rank have lower losses, and so has one LoRA "
        "reduced by SVD at ranks 4 and 8 (at 1 and 2 it has higher ones).",
        "- **With all linear layers adapted** (CoLA and SST-2, two seeds) it is within two points of the sweep, and "
        "on CoLA one to six above the reduced LoRA ([all tables](tables.md#all-linear-layers)).",
        "- **From a larger r_max** its low ranks fall short of LoRAs of these ranks on CoLA, as those of such a LoRA "
        "reduced by SVD do: at r_max 16 rank 1 (two seeds), at 64 ranks 1 to 8 (one seed, no rate searched there; "
        "[all tables](tables.md#larger-r_max)).",
    ]


def limits(everything: list[dict]) -> list[str]:
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
        "by several points between seeds: there no loss of that size is excluded. Verdicts are not corrected for "
        "multiple tests, and all those of rank 8 use the same LoRA runs.",
        "- **Chosen rates hang on few runs.** At 0.002 one of four held-out runs of rank 8 collapsed; otherwise that "
        "rate would have been chosen. Rank 1's was chosen by half a point, and at it two runs failed.",
        "- The mean over tasks is of CoLA's Matthews correlation, accuracies, and for QQP the mean of accuracy and F1.",
        "- Which runs were on which machine, and what the paper reports, [stands with all tables](tables.md#the-runs).",
    ]
