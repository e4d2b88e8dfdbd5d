"""Means over tasks, and their differences paired by seed, with intervals."""

from collections import defaultdict

import numpy as np
from scipy import stats

from loralib.report.choice import mean_and_error
from loralib.report.tables import markdown_table

from .held_out import BAR
from .methods import DEFAULT, R_MAX, SHOWN
from .naming import HEAD, called, order, strength_of
from .shown import AVERAGED, at_their_rates, not_yet_run, rows_of, sweep_methods


def averaged(found: dict, method: str) -> dict[int, dict[int, float]]:
    """{seed: {rank: the mean over AVERAGED}} for seeds that every task has."""
    runs = [found.get((task, method), {}) for task in AVERAGED]
    seeds = set.intersection(*(set(by_seed) for by_seed in runs))
    return {seed: {b: float(np.mean([run[seed][b] for run in runs])) for b in SHOWN} for seed in sorted(seeds)}


def beside_the_sweep(found: dict, method: str, task: str | None = None) -> dict[int, dict[int, float]]:
    """{seed: {rank: score}} on the task (default: the mean over AVERAGED), of the seeds that the sweep has too, so that
    rows compare; all where it has none of them."""
    own, sweep = (found.get((task, name), {}) if task else averaged(found, name) for name in (method, "sweep"))
    return {seed: own[seed] for seed in own if seed in sweep} or own


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 percent t-interval over seeds."""
    mean, error = mean_and_error(values)
    if error is None:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.1f}"


def paired(found: dict, peer: str, ranks, method: str = DEFAULT) -> list[float]:
    """Seed by seed, ``method`` minus the peer: the mean over AVERAGED and over the ranks."""
    ours, theirs = averaged(found, method), averaged(found, peer)
    both = sorted(set(ours) & set(theirs))
    return [float(np.mean([ours[s][b] - theirs[s][b] for b in ranks])) for s in both]


def average_table(found: dict, records: list[dict]) -> list[str]:
    """The mean over tasks, and its difference from the sweep's, paired by seed, with its interval."""
    chosen, rates = sweep_methods(records), defaultdict(set)
    for r in at_their_rates(records):
        for row, _ in rows_of(r, records):
            rates[row].add(r["rate"])
    rows = []
    for method in order({m for _, m in found}):
        by_seed = beside_the_sweep(found, method)
        if not by_seed:
            continue
        cells = [f"{np.mean([curve[b] for curve in by_seed.values()]):.1f}" for b in SHOWN]
        cells.append(f"{np.mean([[curve[b] for b in SHOWN] for curve in by_seed.values()]):.1f}")
        apart = [paired(found, "sweep", ranks, method) for ranks in (*([b] for b in SHOWN), SHOWN)]
        beside = [interval(values) if values and method != "sweep" else "" for values in apart]
        # Of squeeze the first 0.8 of the steps are shared.
        trainings = {"sweep": "4", "adalora": "4", "squeeze": "1.6"}.get(method, "1")
        own_rates = ", ".join(f"{rate:g}" for rate in sorted(rates[method]))
        settings = [trainings, strength_of(method, chosen), own_rates]
        rows.append([called(method), *settings, *cells, str(len(by_seed)), *beside])
    beside = [f"- sweep, {name}" for name in (*(f"r={b}" for b in SHOWN), "mean")]
    head = ["method", "trainings", "strength", "rate", *HEAD[1:], "mean", "seeds", *beside]
    return [markdown_table(head, rows, "l"), "", *not_yet_run(records)]


def headline(found: dict, method: str = DEFAULT) -> list[str]:
    """The question of the page, and what came of it: the paired differences of ``method`` from the sweep, and from the
    plainest peer that gives every rank."""
    peers = {"sweep": "minus a LoRA trained for that rank", BAR: f"minus LoRA of rank {R_MAX}, reduced by SVD"}
    seeds = {peer: len(paired(found, peer, SHOWN, method)) for peer in peers}
    peers = {peer: f"{words} ({seeds[peer]} seeds)" for peer, words in peers.items() if seeds[peer] > 1}
    if "sweep" not in peers:
        return []
    rows = []
    for name, ranks in [*((f"rank {b}", [b]) for b in SHOWN), ("mean of the ranks", SHOWN)]:
        row = [name]
        for peer in peers:
            apart = paired(found, peer, ranks, method)
            mean, error = mean_and_error(apart)
            low = mean - stats.t.ppf(0.975, len(apart) - 1) * error
            row += [interval(apart), "yes" if low > -1 else "no"]
        rows.append(row)
    head = ["one DyLoRA training at", *(text for words in peers.values() for text in (words, "no worse"))]
    return [
        "<!-- --8<-- [start:headline] -->",
        f"Mean over {len(AVERAGED)} tasks for each seed, then the paired difference over seeds with its 95 percent "
        't-interval, in points. "No worse" means that the interval\'s lower end is above -1 point.',
        "",
        markdown_table(head, rows, "l" + "rl" * len(peers)),
        "<!-- --8<-- [end:headline] -->",
        "",
    ]
