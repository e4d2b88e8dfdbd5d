"""Tables, curves and cost of the study, from results/study/runs.jsonl."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from loralib.files import write_atomically, write_text
from loralib.report.choice import mean_and_error
from loralib.report.curves import Curve
from loralib.report.plots import plot_curves
from loralib.report.tables import markdown_table

from ..pages import page
from .cells import TRIED_RATE, area, chosen_rates, chosen_strengths, usual_records
from .held_out import lead_table, rate_table, tried_table
from .methods import ADALORA, CUTS, DEFAULT, SHOWN, SQUEEZE, SWEEP
from .naming import HEAD, NAMES, OF_SWEEP, ROWS, called, order, strength_of
from .wide import language_tables, rank_tables, target_tables

# The tasks that averages are over. RTE, from scratch with so small an encoder, stays at chance and adds noise alone.
AVERAGED = ("cola", "sst2", "mnli", "qnli", "qqp")
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


def scores(records: list[dict], split: str = "validation") -> dict[tuple[str, str], dict[int, dict[int, float]]]:
    """{(task, row): {seed: {rank: score}}}; a row is a method, or one of ROWS."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for record in at_their_rates(records, split):
        for row, ranks in rows_of(record, records):
            for b in ranks:
                found[record["task"], row][record["seed"]][b] = record["scores"][str(b)]
    for key in [key for key in found if key[1] in ROWS]:  # seeds whose four runs are there
        found[key] = {seed: curve for seed, curve in found[key].items() if len(curve) == len(SWEEP)}
    return {key: dict(by_seed) for key, by_seed in found.items() if by_seed}


def run_enough(records: list[dict], method: str, rate: float, instead: str | None = None) -> bool:
    """Whether there are two seeds of it on every task of AVERAGED, or as many runs as at the rate that most runs (of
    ``instead``, if given) have."""
    kept = [r for r in records if r["split"] == "validation" and r["task"] in AVERAGED]
    own = sum((r["method"], r["rate"]) == (method, rate) for r in kept)
    often = Counter(r["rate"] for r in kept if r["method"] == (instead or method) and r["rate"] != rate)
    return 0 < own >= min(2 * len(AVERAGED), max(often.values(), default=0))


def sweep_methods(records: list[dict]) -> dict[int, str]:
    """The sweep's method at each rank: at the strength that is chosen, once there are runs of it; until then at
    alpha / r."""
    usual, rates = {r: names[0] for r, names in SWEEP.items()}, chosen_rates(records)
    return usual | {
        r: name
        for r, name in chosen_strengths(records).items()
        if name == usual[r] or run_enough(records, name, rates[name], usual[r])
    }


def rows_of(record: dict, records: list[dict]) -> list[tuple[str, list[int]]]:
    """The rows that a run belongs to, and the ranks that it gives them."""
    rows = []
    for row, by_rank in (("sweep", sweep_methods(records)), ("squeeze", SQUEEZE), ("adalora", ADALORA)):
        if ranks := [r for r, name in by_rank.items() if name == record["method"]]:
            rows.append((row, ranks))
    return rows or [(record["method"], [int(b) for b in record["scores"]])]


def at_their_rates(records: list[dict], split: str = "validation") -> list[dict]:
    """The runs that tables show: each method's at the rate that is chosen, once there are enough, and until then at the
    one that most of its runs have; of the sweep those at one strength for each rank."""
    kept = [r for r in records if r["split"] == split]
    sweep, chosen = sweep_methods(records).values(), chosen_rates(records)
    rates = {
        method: Counter(r["rate"] for r in kept if r["method"] == method).most_common(1)[0][0]
        for method in {r["method"] for r in kept}
    }
    rates |= {name: rate for name, rate in chosen.items() if name in rates and run_enough(records, name, rate)}
    rates |= {name: rates[cut.of] for name, cut in CUTS.items() if name in rates and cut.of in rates}
    return [
        r for r in kept if r["rate"] == rates[r["method"]] and (r["method"] not in OF_SWEEP or r["method"] in sweep)
    ]


def shown(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.1f}" if error is None else f"{mean:.1f} ± {error:.1f}"


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


def average_table(found: dict, records: list[dict]) -> list[str]:
    """The mean over tasks, and its difference from the sweep's, paired by seed, with its interval."""
    sweep, chosen = averaged(found, "sweep"), sweep_methods(records)
    rates = defaultdict(set)
    for r in at_their_rates(records):
        for row, _ in rows_of(r, records):
            rates[row].add(r["rate"])
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
        trainings = {"sweep": "4", "adalora": "4", "squeeze": "1.6"}.get(
            method, "1"
        )  # of squeeze the first 0.8 are shared
        own_rates = ", ".join(f"{rate:g}" for rate in sorted(rates[method]))
        settings = [trainings, strength_of(method, chosen), own_rates]
        rows.append([called(method), *settings, *cells, str(len(by_seed)), *beside])
    beside = [f"- sweep, {name}" for name in (*(f"r={b}" for b in SHOWN), "mean")]
    head = ["method", "trainings", "strength", "rate", *HEAD[1:], "mean", "seeds", *beside]
    return [markdown_table(head, rows, "l"), "", *not_yet_run(records)]


def not_yet_run(records: list[dict]) -> list[str]:
    """What was chosen on held-out parts of train and is not what the table shows, for want of runs."""
    shown_at = {r["method"]: r["rate"] for r in at_their_rates(records)}
    best, sweep = chosen_strengths(records), sweep_methods(records)
    wanted = {sweep[r] for r, name in best.items() if name == sweep[r]} | set(best.values())
    late = [
        f"{called(name)} at rate {rate:g}"
        for name, rate in chosen_rates(records).items()
        if shown_at.get(name) != rate and (name in wanted or (name not in OF_SWEEP and name in shown_at))
    ]
    if not late:
        return []
    return [f"Chosen by the rates below, and not yet run: {'; '.join(late)}.", ""]


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


def write_tables(directory: Path, records: list[dict], budgets: dict) -> None:
    """README.md and curves.png from the records."""
    everything, records = records, usual_records(records)
    found = scores(records)
    lines = [
        "# Does one DyLoRA run match a LoRA sweep?",
        "",
        "Made by the commands below. MiniLM-L6 (22 M parameters) in RoBERTa's shape, query and value adapted, r_max 8, "
        "alpha 16, batch 32, AdamW, linear decay, warm-up 0.06, weight decay 0.1, one CPU core a run, bf16 autocast "
        "where the processor has it and else fp32 (each line of runs.jsonl says which). Mean ± standard error over "
        "seeds; AURAC over ranks 1, 2, 4, 8. Every method has the same encoder, data, order and number of steps.",
        "",
        "    bash -c '. scripts/env.sh benchmark' && source .venv/bin/activate",
        "    python -m transformers_dylora.minilm encoder",
        "    python -m scripts.study rates --encoder encoder --data glue      # glue: a directory of the tasks",
        "    python -m scripts.study leads --encoder encoder --data glue",
        "    python -m scripts.study runs --encoder encoder --data glue --rate 1e-3 --methods lora-8 mixed-0.8",
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
            *headline(found),
            f"## Average of {len(AVERAGED)} tasks",
            "",
            "Methods that were run on all of them, each training with the same number of steps. Strength is the "
            "factor of the update, a rule in the rank b where it differs; `- sweep` is the paired difference from the "
            "sweep, with its 95 percent t-interval over seeds.",
            "",
            *average_table(found, records),
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
