"""Means over tasks, and their differences paired by seed, with intervals."""

from collections import defaultdict

import numpy as np
from scipy import stats

from loralib.report.choice import mean_and_error
from loralib.report.tables import markdown_table

from .held_out import BAR
from .methods import ALPHA, DEFAULT, R_MAX, SHOWN
from .naming import HEAD, NAMES, called, order, strength_of
from .shown import AVERAGED, Found, by_row, not_yet_run, roundings, scores_by_device, sweep_methods


def averaged(found: Found, method: str) -> dict[int, dict[int, float]]:
    """{seed: {rank: the mean over AVERAGED}} for seeds that every task has."""
    runs = [found.get((task, method), {}) for task in AVERAGED]
    seeds = set.intersection(*(set(by_seed) for by_seed in runs))
    return {seed: {b: float(np.mean([run[seed][b] for run in runs])) for b in SHOWN} for seed in sorted(seeds)}


def beside_the_sweep(found: Found, method: str, task: str | None = None) -> dict[int, dict[int, float]]:
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


def paired(found: Found, peer: str, ranks, method: str = DEFAULT) -> list[float]:
    """Seed by seed, ``method`` minus the peer: the mean over AVERAGED and over the ranks."""
    ours, theirs = averaged(found, method), averaged(found, peer)
    both = sorted(set(ours) & set(theirs))
    return [float(np.mean([ours[s][b] - theirs[s][b] for b in ranks])) for s in both]


def average_tables(found: Found, records: list[dict], peer: str) -> list[str]:
    """On one device: the mean over tasks, of the seeds that the peer has, and below it the paired differences from the
    peer with their intervals. Nothing where the peer has no seed of all tasks."""
    chosen, rates = sweep_methods(records), defaultdict(set)
    for record, row, _ in by_row(records):
        rates[row].add(record["rate"])
    of_peer, means, apart = averaged(found, peer), [], []
    if not of_peer:
        return []
    for method in order({m for _, m in found}):
        own = averaged(found, method)
        if method != peer and (both := sorted(set(own) & set(of_peer))):
            values = [paired(found, peer, ranks, method) for ranks in (*([b] for b in SHOWN), SHOWN)]
            apart.append([called(method), *map(interval, values), str(len(both))])
        if set(of_peer) <= set(own):
            curves = [[own[seed][b] for b in SHOWN] for seed in of_peer]
            # Of squeeze the first 0.8 of the steps are shared.
            trainings = {"sweep": "4", "adalora": "4", "squeeze": "1.6"}.get(method, "1")
            own_rates = ", ".join(f"{rate:g}" for rate in sorted(rates[method]))
            cells = [f"{value:.1f}" for value in (*np.mean(curves, axis=0), np.mean(curves))]
            means.append([called(method), trainings, strength_of(method, chosen), own_rates, *cells])
    seeds = len(of_peer)
    return [
        markdown_table([f"{seeds} seeds", "trainings", "strength", "rate", *HEAD[1:], "mean"], means, "l"),
        "",
        markdown_table([f"minus {called(peer)}", *HEAD[1:], "mean", "seeds"], apart, "l"),
        "",
    ]


def task_by_task(found: Found, method: str = DEFAULT, peer: str = BAR) -> list[str]:
    """Where the difference from the plainest peer comes from: one row a task, and the mean of all but the first."""
    rows = []
    for name, tasks in [*((NAMES[task], [task]) for task in AVERAGED), ("all but the first", AVERAGED[1:])]:
        runs = [(found.get((task, method), {}), found.get((task, peer), {})) for task in tasks]
        seeds = sorted(set.intersection(*(set(ours) & set(theirs) for ours, theirs in runs)))
        if seeds:
            apart = [[np.mean([o[s][b] - t[s][b] for o, t in runs]) for s in seeds] for b in SHOWN]
            rows.append([name, *map(interval, apart), str(len(seeds))])
    head = [f"our default minus {called(peer)}", *HEAD[1:], "seeds"]
    return [markdown_table(head, rows, "l"), ""] if len(rows) > 1 else []


def with_most_seeds(founds: dict[str, Found], peer: str, method: str = DEFAULT) -> str:
    """The device on which most seeds of both are there."""
    return max(founds, key=lambda name: len(paired(founds[name], peer, SHOWN, method)))


def with_the_sweep_at_our_rate(records: list[dict], device: str, method: str = DEFAULT) -> list[str]:
    """A sentence: the same differences with every LoRA of the sweep at the rate of ``method`` and at alpha / r. Nothing
    where that is what the tables show, or where fewer than two seeds have it."""
    rates = {row: {record["rate"] for record, name, _ in by_row(records) if name == row} for row in ("sweep", method)}
    if rates["sweep"] == rates[method] or len(rates[method]) != 1:
        return []
    (rate,) = rates[method]
    # Without the searches nothing is chosen, and the sweep is what it usually is.
    alike = [record for record in records if record["split"] == "validation" and record["rate"] == rate]
    found = scores_by_device(alike)[device]
    apart = [paired(found, "sweep", ranks, method) for ranks in (*([b] for b in SHOWN), SHOWN)]
    if len(apart[0]) < 2:
        return []
    *of_ranks, mean = map(interval, apart)
    return [
        f"With every LoRA of the sweep at rate {rate:g}, that of DyLoRA, and alpha {ALPHA:g} the differences are "
        f"{', '.join(of_ranks)} at ranks {', '.join(map(str, SHOWN))}, and {mean} in the mean.",
        "",
    ]


def headline(founds: dict[str, Found], records: list[dict], method: str = DEFAULT) -> list[str]:
    """The question of the page, and what came of it: the paired differences of ``method`` from the sweep, and from the
    plainest peer that gives every rank, each on one device. Nothing before there are two seeds."""
    peers = {"sweep": "a LoRA trained for that rank", BAR: f"LoRA of rank {R_MAX}, reduced by SVD"}
    on = {peer: with_most_seeds(founds, peer, method) for peer in peers} if founds else {}
    seeds = {peer: len(paired(founds[on[peer]], peer, SHOWN, method)) for peer in on}
    peers = {peer: f"minus {peers[peer]} ({n} seeds, {on[peer]})" for peer, n in seeds.items() if n > 1}
    if "sweep" not in peers:
        return []
    rows = []
    for name, ranks in [*((f"rank {b}", [b]) for b in SHOWN), ("mean of the ranks", SHOWN)]:
        row = [name]
        for peer in peers:
            apart = paired(founds[on[peer]], peer, ranks, method)
            mean, error = mean_and_error(apart)
            low = mean - stats.t.ppf(0.975, len(apart) - 1) * error
            row += [interval(apart), "excluded" if low > -1 else "not excluded"]
        rows.append(row)
    both = averaged(founds[on["sweep"]], "sweep").keys() & averaged(founds[on["sweep"]], method).keys()
    compared = [record for record in records if record["seed"] in both or record["split"] != "validation"]
    head = ["one DyLoRA training at", *(text for words in peers.values() for text in (words, "a loss of 1 point is"))]
    return [
        "<!-- --8<-- [start:headline] -->",
        f"Mean over {len(AVERAGED)} tasks for each seed, then the paired difference over seeds with its 95 percent "
        "t-interval, in points. A loss of 1 point is excluded where the interval's lower end is above -1. Pairs share "
        "the seed, the data and the kind of device. Intervals are over seeds alone: each task has one validation set.",
        "",
        markdown_table(head, rows, "l" + "rl" * len(peers)),
        "",
        *with_the_sweep_at_our_rate(records, on["sweep"], method),
        *roundings(compared, on["sweep"], {"sweep": "the sweep's", method: "DyLoRA's"}),
        *not_yet_run(records),
        "<!-- --8<-- [end:headline] -->",
        "",
    ]
