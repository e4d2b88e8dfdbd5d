"""Tables of what was measured on held-out parts of train: how learning rates are chosen, and what was tried."""

from collections import defaultdict

from loralib.report.tables import markdown_table

from .cells import (
    LEAD_RUNS,
    RATE_RUNS,
    TRIED_RATE,
    WIDE_RANKS,
    area,
    at,
    chosen_rates,
    chosen_strengths,
    held_out_scores,
    next_rates,
)
from .methods import DEFAULT, METHODS, R_MAX, SHOWN
from .naming import HEAD, NAMES, OF_SWEEP, order, title, with_error
from .shown import computed_in
from .tried import TRIED

# What leads are held against: the plainest peer that gives every rank.
BAR = "cut-svd"
LEAD_TASKS = tuple(dict.fromkeys(task for task, _ in LEAD_RUNS))


def rate_table(records: list[dict], r_max: int = R_MAX) -> list[str]:
    """How rates are chosen: AURAC on the held-out tenths of RATE_RUNS, seed by seed, and what each method takes.
    ``records``: those of one r_max."""
    cells: dict = defaultdict(list)
    tasks, chosen, scored = (
        list(dict.fromkeys(task for task, _ in RATE_RUNS)),
        chosen_rates(records),
        held_out_scores(records),
    )
    for r in records:
        if r["split"] == "held_out" and (r["task"], r["seed"]) in RATE_RUNS:
            cells[r["method"], r["rate"], r["task"]].append((r["seed"], area(r["scores"])))
    rates = sorted({rate for method, rate, _ in cells if method in METHODS})
    rows, strengths = [], set(chosen_strengths(records).values())
    for method in order({m for m, _, _ in cells} & set(METHODS)):
        row = [title(method, r_max)]
        for rate in rates:
            parts = [", ".join(f"{v:.1f}" for _, v in sorted(cells[method, rate, task])) or "-" for task in tasks]
            row.append(" / ".join(parts) if any(part != "-" for part in parts) else "")
        if best := chosen.get(method):
            taken = f"{best:g}: {scored[method][best]:.1f}" + (
                ", for the sweep" if method in strengths and r_max == R_MAX else ""
            )
        else:
            taken = "open: " + ", ".join(f"{rate:g}" for rate in next_rates(scored.get(method, {})))
        rows.append([*row, taken])
    return [markdown_table(["method", *(f"{rate:g}" for rate in rates), "chosen"], rows, "l"), ""]


def wide_rate_tables(everything: list[dict]) -> list[str]:
    """The same at larger r_max."""
    lines = []
    for r_max in WIDE_RANKS:
        own = [r for r in at(everything, r_max) if r["split"] == "held_out"]
        lines += [f"### r_max {r_max}", "", *rate_table(own, r_max)] if own else []
    about = "As above; AURAC over ranks 1, 2, 4, .. r_max (`python -m scripts.study rates --r-max 16`, or 64)."
    return ["## Larger r_max", "", about, "", *lines] if lines else []


def tried_table(records: list[dict]) -> list[str]:
    """First tries of variants, on the held-out tenths of two tasks at one rate."""
    tasks = ("cola", "rte")
    cells: dict = defaultdict(list)
    for r in records:
        if r["split"] == "held_out" and r["rate"] == TRIED_RATE and r["task"] in tasks:
            cells[r["method"], r["task"]].append((r["seed"], area(r["scores"])))
    rows = [
        [title(method), *(", ".join(f"{value:.1f}" for _, value in sorted(cells[method, task])) for task in tasks)]
        for method in order({m for m, _ in cells} & {"lora-8", DEFAULT, "mixed", "example", *TRIED})
    ]
    if not rows:
        return []
    return [
        "## First tries",
        "",
        f"AURAC on CoLA and RTE at rate {TRIED_RATE:g}, seed by seed; of the LoRA of rank {R_MAX} its score there. RTE "
        "is one seed and near chance.",
        "",
        markdown_table(["method", *(NAMES[task].split(" ")[0] for task in tasks)], rows, "l"),
        "",
    ]


def lead_table(records: list[dict]) -> list[str]:
    """What was tried beside LoRA reduced by SVD, on parts of train on which no rate was chosen."""
    runs, bars = {}, {}
    for r in reversed(records):  # as for rates, the first of several devices counts
        if r["split"] == "held_out" and r["rate"] == TRIED_RATE and (r["task"], r["seed"]) in LEAD_RUNS:
            cell, found = (r["task"], r["seed"]), {int(b): value for b, value in r["scores"].items()}
            runs[*cell, r["method"]] = found, computed_in(r)
            if r["method"] == BAR:
                bars[*cell, computed_in(r)] = found
    rows = []
    for method in order({m for _, _, m in runs} - set(OF_SWEEP) - {BAR}):
        pairs = []
        for cell in LEAD_RUNS:
            found, where = runs.get((*cell, method), ({}, None))
            if bar := bars.get((*cell, where)):
                pairs.append({b: found[b] - bar[b] for b in SHOWN})
        if len(pairs) >= 2:
            apart = [with_error([pair[b] for pair in pairs], 2, "+") for b in SHOWN]
            rows.append([title(method), *apart, str(len(pairs))])
    if not rows:
        return []
    tasks = ", ".join(NAMES[task].split(",")[0] for task in LEAD_TASKS)
    return [
        f"## Leads, beside {title(BAR)}",
        "",
        f"Differences on {tasks}, seeds 0 and 1, at rate {TRIED_RATE:g}: mean ± standard error over the runs that "
        f"there are, {len(LEAD_RUNS)} where all.",
        "",
        markdown_table([*HEAD, "runs"], rows, "l"),
        "",
    ]
