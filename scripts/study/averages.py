"""Means over tasks, and their differences paired by seed, with intervals."""

from collections import defaultdict

import numpy as np
from scipy import stats

from loralib.report.choice import mean_and_error
from loralib.report.tables import markdown_table

from .held_out import BAR
from .methods import CUTS, DEFAULT, SHOWN
from .naming import HEAD, NAMES, called, order, strength_of
from .shown import AVERAGED, Found, by_row, sweep_methods

RANKS = {**{f"rank {b}": (b,) for b in SHOWN}, "mean of the ranks": SHOWN}


def averaged(found: Found, method: str, tasks: tuple[str, ...] = AVERAGED) -> dict[int, dict[int, float]]:
    """{seed: {rank: the mean over the tasks}} for seeds that every task has."""
    runs = [found.get((task, method), {}) for task in tasks]
    seeds = set.intersection(*(set(by_seed) for by_seed in runs))
    return {seed: {b: float(np.mean([run[seed][b] for run in runs])) for b in SHOWN} for seed in sorted(seeds)}


def beside(found: Found, peer: str, method: str, task: str | None = None) -> dict[int, dict[int, float]]:
    """{seed: {rank: score}} on the task (default: the mean over AVERAGED), of the seeds that the peer has too, so that
    rows compare; all where it has none of them."""
    own, theirs = (found.get((task, name), {}) if task else averaged(found, name) for name in (method, peer))
    return {seed: own[seed] for seed in own if seed in theirs} or own


def interval(values: list[float], digits: int = 1) -> str:
    """Mean and half width of the 95 percent t-interval over seeds."""
    mean, error = mean_and_error(values)
    if error is None:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ± {stats.t.ppf(0.975, len(values) - 1) * error:.{digits}f}"


def paired(found: Found, peer: str, ranks, method: str = DEFAULT, tasks: tuple[str, ...] = AVERAGED) -> list[float]:
    """Seed by seed, ``method`` minus the peer: the mean over the tasks and over the ranks."""
    ours, theirs = averaged(found, method, tasks), averaged(found, peer, tasks)
    both = sorted(set(ours) & set(theirs))
    return [float(np.mean([ours[s][b] - theirs[s][b] for b in ranks])) for s in both]


def trainings(row: str) -> str:
    """How many trainings give the row. Of LoRA-Squeeze the first 0.8 of the steps are shared; fitting strengths takes a
    tenth of the updates, about."""
    fitted = row in CUTS and CUTS[row].by == "strengths"
    return {"sweep": "4", "plain-sweep": "4", "adalora": "4", "squeeze": "1.6"}.get(row, "1.1" if fitted else "1")


def average_tables(found: Found, records: list[dict], peer: str, rows: tuple[str, ...] = ()) -> list[str]:
    """On one device: the mean over tasks, of the seeds that the peer has, and below it the paired differences from the
    peer with their intervals. Nothing where the peer has no seed of all tasks. ``rows``: those to show; default: all.
    """
    chosen, rates = sweep_methods(records), defaultdict(dict)
    for record, row, ranks in by_row(records):
        rates[row] |= dict.fromkeys(ranks, f"{record['rate']:g}")
    of_peer, means, apart = averaged(found, peer), [], []
    if not of_peer:
        return []
    for method in order({m for _, m in found if not rows or m in rows}):
        own = averaged(found, method)
        if method != peer and (both := sorted(set(own) & set(of_peer))):
            values = [paired(found, peer, ranks, method) for ranks in RANKS.values()]
            apart.append([called(method), *map(interval, values), str(len(both))])
        if set(of_peer) <= set(own):
            curves = [[own[seed][b] for b in SHOWN] for seed in of_peer]
            by_rank = [rates[method][b] for b in SHOWN]
            own_rates = by_rank[0] if len(set(by_rank)) == 1 else ", ".join(by_rank)
            cells = [f"{value:.1f}" for value in (*np.mean(curves, axis=0), np.mean(curves))]
            means.append([called(method), trainings(method), strength_of(method, chosen), own_rates, *cells])
    seeds = len(of_peer)
    return [
        markdown_table([f"{seeds} seeds", "trainings", "strength", "rate", *HEAD[1:], "mean"], means, "l"),
        "",
        markdown_table([f"minus {called(peer)}", *HEAD[1:], "mean", "seeds"], apart, "l"),
        "",
    ]


def task_by_task(found: Found, device: str, peer: str, method: str = DEFAULT) -> list[str]:
    """Where the difference from a peer comes from: one row a task, and the mean of all but the first."""
    rows = []
    for name, tasks in [*((NAMES[task], (task,)) for task in AVERAGED), ("without CoLA", AVERAGED[1:])]:
        if seeds := paired(found, peer, SHOWN, method, tasks):
            apart = [paired(found, peer, ranks, method, tasks) for ranks in RANKS.values()]
            rows.append([name, *map(interval, apart), str(len(seeds))])
    head = [f"{called(method)} minus {called(peer)}, on {device}", *HEAD[1:], "mean", "seeds"]
    return [markdown_table(head, rows, "l"), ""] if len(rows) > 1 else []


def with_most_seeds(founds: dict[str, Found], peer: str, method: str = DEFAULT) -> list[str]:
    """The devices on which most seeds of both are there."""
    counts = {name: len(paired(found, peer, SHOWN, method)) for name, found in founds.items()}
    return [name for name, count in counts.items() if count == max(counts.values())]


def peer_on(founds: dict[str, Found], device: str) -> str:
    """What rows of a device are held against: the sweep where most of it is, elsewhere the plainest peer."""
    return "sweep" if device in with_most_seeds(founds, "sweep") else BAR


def beside_each(founds: dict[str, Found], method: str = DEFAULT) -> list[str]:
    """``method`` minus every other row, on the device with the most pairs."""
    rows = []
    for peer in order({name for found in founds.values() for _, name in found} - {method}):
        device = with_most_seeds(founds, peer, method)[0]
        found = founds[device]
        if pairs := paired(found, peer, SHOWN, method):
            apart = [paired(found, peer, ranks, method) for ranks in RANKS.values()]
            apart.append(paired(found, peer, SHOWN, method, AVERAGED[1:]))
            cells = [interval(each) for each in apart]
            rows.append([called(peer), trainings(peer), *cells, str(len(pairs)), device])
    head = [f"{called(method)} minus", "trainings", *HEAD[1:], "mean", "mean without CoLA", "seeds", "on"]
    return [markdown_table(head, rows, "l"), ""] if rows else []
