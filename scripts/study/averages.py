"""Means over tasks, and their differences paired by seed, with intervals."""

from collections import defaultdict

import numpy as np
from scipy import stats

from loralib.report.choice import mean_and_error
from loralib.report.tables import markdown_table

from .held_out import BAR
from .methods import ALPHA, DEFAULT, R_MAX, SHOWN
from .naming import HEAD, NAMES, called, order, strength_of
from .shown import AVERAGED, Found, by_row, not_yet_run, roundings, sweep_methods

RANKS = {**{f"rank {b}": (b,) for b in SHOWN}, "mean of the ranks": SHOWN}
EXCLUDED = "✓"


def averaged(found: Found, method: str) -> dict[int, dict[int, float]]:
    """{seed: {rank: the mean over AVERAGED}} for seeds that every task has."""
    runs = [found.get((task, method), {}) for task in AVERAGED]
    seeds = set.intersection(*(set(by_seed) for by_seed in runs))
    return {seed: {b: float(np.mean([run[seed][b] for run in runs])) for b in SHOWN} for seed in sorted(seeds)}


def beside(found: Found, peer: str, method: str, task: str | None = None) -> dict[int, dict[int, float]]:
    """{seed: {rank: score}} on the task (default: the mean over AVERAGED), of the seeds that the peer has too, so that
    rows compare; all where it has none of them."""
    own, theirs = (found.get((task, name), {}) if task else averaged(found, name) for name in (method, peer))
    return {seed: own[seed] for seed in own if seed in theirs} or own


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
            values = [paired(found, peer, ranks, method) for ranks in RANKS.values()]
            apart.append([called(method), *map(interval, values), str(len(both))])
        if set(of_peer) <= set(own):
            curves = [[own[seed][b] for b in SHOWN] for seed in of_peer]
            # Of squeeze the first 0.8 of the steps are shared.
            trainings = {"sweep": "4", "plain-sweep": "4", "adalora": "4", "squeeze": "1.6"}.get(method, "1")
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


def task_by_task(found: Found, device: str, method: str = DEFAULT, peer: str = BAR) -> list[str]:
    """Where the difference from the plainest peer comes from: one row a task, and the mean of all but the first."""
    rows = []
    for name, tasks in [*((NAMES[task], [task]) for task in AVERAGED), ("all but the first", AVERAGED[1:])]:
        runs = [(found.get((task, method), {}), found.get((task, peer), {})) for task in tasks]
        seeds = sorted(set.intersection(*(set(ours) & set(theirs) for ours, theirs in runs)))
        if seeds:
            apart = [[np.mean([o[s][b] - t[s][b] for o, t in runs]) for s in seeds] for b in SHOWN]
            rows.append([name, *map(interval, apart), str(len(seeds))])
    head = [f"our default minus {called(peer)}, on {device}", *HEAD[1:], "seeds"]
    return [markdown_table(head, rows, "l"), ""] if len(rows) > 1 else []


def with_most_seeds(founds: dict[str, Found], peer: str, method: str = DEFAULT) -> list[str]:
    """The devices on which most seeds of both are there."""
    counts = {name: len(paired(found, peer, SHOWN, method)) for name, found in founds.items()}
    return [name for name, count in counts.items() if count == max(counts.values())]


def peer_on(founds: dict[str, Found], device: str) -> str:
    """What rows of a device are held against: the sweep where most of it is, elsewhere the plainest peer."""
    return "sweep" if device in with_most_seeds(founds, "sweep") else BAR


def headline(founds: dict[str, Found], records: list[dict], method: str = DEFAULT) -> list[str]:
    """The question of the page, and what came of it: the paired differences of ``method`` from the sweep, and from the
    plainest peer that gives every rank, device by device. Nothing before there are two seeds."""
    peers = {
        "sweep": "a LoRA for each rank, chosen rate and strength",
        "plain-sweep": f"a LoRA for each rank, DyLoRA's rate, alpha {ALPHA}",
        BAR: f"a LoRA of rank {R_MAX}, reduced by SVD",
    }
    on = {(peer, device): len(paired(found, peer, SHOWN, method)) for peer in peers for device, found in founds.items()}
    columns = [
        (
            f"minus {peers[peer]} ({seeds} seeds, {device})",
            [paired(founds[device], peer, ranks, method) for ranks in RANKS.values()],
        )
        for (peer, device), seeds in on.items()
        if seeds > 1
    ]
    device = with_most_seeds(founds, "sweep", method)[0] if founds else ""
    if on.get(("sweep", device), 0) < 2:
        return []
    rows = [[name, *(_judged(apart[i]) for _, apart in columns)] for i, name in enumerate(RANKS)]
    both = averaged(founds[device], "sweep").keys() & averaged(founds[device], method).keys()
    compared = [record for record in records if record["seed"] in both or record["split"] != "validation"]
    return [
        "<!-- --8<-- [start:headline] -->",
        f"Points of the mean over {len(AVERAGED)} tasks: the paired difference of each seed, then its mean over seeds "
        f"with a 95 percent t-interval. {EXCLUDED}: a loss of 1 point is excluded, the interval's lower end is above "
        "-1. Pairs share the seed, the data and the kind of device. Intervals are over seeds alone: each task has one "
        "validation set. Rates and strengths were chosen on held-out parts of the training sets of CoLA and SST-2.",
        "",
        markdown_table(["one DyLoRA training at", *(head for head, _ in columns)], rows, "l"),
        "",
        *failed(founds[device]),
        *roundings(compared, device, {"sweep": "the sweep's", method: "DyLoRA's"}),
        *not_yet_run(records),
        "<!-- --8<-- [end:headline] -->",
        "",
    ]


def failed(found: Found) -> list[str]:
    """A sentence that names runs of the sweep with less than half of the plain sweep's score."""
    told = [
        f"{NAMES[task].split(' ')[0].rstrip(',')}, rank {b}, seed {seed} ({score:.1f}, at DyLoRA's rate {plain:.1f})"
        for task in AVERAGED
        for seed, curve in sorted(found.get((task, "sweep"), {}).items())
        for b, score in curve.items()
        if score < (plain := found.get((task, "plain-sweep"), {}).get(seed, {}).get(b, 0)) / 2
    ]
    return [f"At the rate chosen on held-out data a LoRA failed on validation in: {'; '.join(told)}.", ""] * bool(told)


def _judged(apart: list[float]) -> str:
    mean, error = mean_and_error(apart)
    low = mean - stats.t.ppf(0.975, len(apart) - 1) * error
    return interval(apart) + (f" {EXCLUDED}" if low > -1 else "")
