"""The study's question, and what came of it: one table."""

from scipy import stats

from loralib.report.choice import mean_and_error
from loralib.report.tables import markdown_table

from .averages import RANKS, averaged, interval, paired, with_most_seeds
from .held_out import BAR
from .methods import ALPHA, DEFAULT, R_MAX, SHOWN
from .naming import NAMES, called, spans
from .shown import AVERAGED, Found, not_yet_run, roundings

EXCLUDED = "✓"


def headline(founds: dict[str, Found], records: list[dict], method: str = DEFAULT) -> list[str]:
    """The question of the page, and what came of it: the paired differences of ``method`` from the sweep, and from the
    plainest peer that gives every rank, device by device. Nothing before there are two seeds."""
    peers = {
        "sweep": "a LoRA for each rank, chosen rate and strength",
        "plain-sweep": f"a LoRA for each rank, DyLoRA's rate, alpha {ALPHA}",
        BAR: f"a LoRA of rank {R_MAX}, reduced by SVD",
    }
    on = {(peer, device): len(paired(found, peer, SHOWN, method)) for peer in peers for device, found in founds.items()}
    device = with_most_seeds(founds, "sweep", method)[0] if founds else ""
    if on.get(("sweep", device), 0) < 2:
        return []
    columns = [
        (f"minus {peers[peer]} ({seeds} seeds, {place})", judged_rows(founds[place], peer, method))
        for (peer, place), seeds in on.items()
        if seeds > 1
    ]
    both = averaged(founds[device], "sweep").keys() & averaged(founds[device], method).keys()
    compared = [record for record in records if record["seed"] in both or record["split"] != "validation"]
    return [
        "<!-- --8<-- [start:headline] -->",
        f"Points of the mean over {len(AVERAGED)} tasks: the paired difference of each seed, then its mean over seeds "
        f"with a 95 percent t-interval. {EXCLUDED}: a loss of 1 point is excluded, the interval's lower end is above "
        "-1. Pairs share the seed, the data and the kind of device. Intervals are over seeds alone: each task has one "
        "validation set. Rates and strengths were chosen on held-out parts of the training sets of CoLA and SST-2, the "
        "default's schedule among many on those of all five tasks.",
        "",
        judged_table("one DyLoRA training at", columns),
        "",
        *failed(founds[device]),
        *roundings(compared, device, {"sweep": "the sweep's", method: "DyLoRA's"}),
        *not_yet_run(records),
        "<!-- --8<-- [end:headline] -->",
        "",
    ]


def judged_rows(found: Found, peer: str, method: str = DEFAULT) -> dict[str, str]:
    """The headline's cells beside one peer: at each rank, in the mean of the ranks, there without the first task, and
    where runs of the peer failed, with others in their place."""
    cells = {name: judged(paired(found, peer, ranks, method)) for name, ranks in RANKS.items()}
    cells["mean, without CoLA"] = judged(paired(found, peer, SHOWN, method, AVERAGED[1:]))
    if peer == "sweep" and (failed_at := {f"rank {b}" for _, _, b in failures(found)}):
        for name in [*(name for name in RANKS if name in failed_at), "mean of the ranks"]:
            cells[f"{name}, failed LoRAs replaced"] = judged(paired(mended(found), peer, RANKS[name], method))
    return cells


def judged_beside(found: Found, method: str, peers: dict[str, str]) -> list[str]:
    """The same for any method, on one device; ``peers``: what to call each."""
    columns = [
        (f"minus {name} ({len(seeds)} seeds)", judged_rows(found, peer, method))
        for peer, name in peers.items()
        if len(seeds := paired(found, peer, SHOWN, method)) > 1
    ]
    if not columns:
        return []
    return [judged_table(called(method), columns), ""]


def judged_table(head: str, columns: list[tuple[str, dict[str, str]]]) -> str:
    """Columns of ``judged_rows``, each under its name; empty where a column has no such row."""
    names = dict.fromkeys(name for _, cells in columns for name in cells)
    rows = [[name, *(cells.get(name, "") for _, cells in columns)] for name in names]
    return markdown_table([head, *(name for name, _ in columns)], rows, "l")


def failures(found: Found) -> list[tuple[str, int, int]]:
    """(task, seed, rank) of the sweep's runs with less than half of the plain sweep's score; only seeds that it has can
    be judged."""
    return [
        (task, seed, b)
        for task in AVERAGED
        for seed, curve in sorted(found.get((task, "sweep"), {}).items())
        for b, score in curve.items()
        if score < found.get((task, "plain-sweep"), {}).get(seed, {}).get(b, 0) / 2
    ]


def mended(found: Found) -> Found:
    """The same with the plain sweep's run in the place of each that failed."""
    again = {key: {seed: dict(curve) for seed, curve in by_seed.items()} for key, by_seed in found.items()}
    for task, seed, b in failures(found):
        again[task, "sweep"][seed][b] = found[task, "plain-sweep"][seed][b]
    return again


def failed(found: Found) -> list[str]:
    """Sentences that name the sweep's runs that failed."""
    told = [
        f"{NAMES[task].split(' ')[0].rstrip(',')}, rank {b}, seed {seed} ({found[task, 'sweep'][seed][b]:.1f}, at "
        f"DyLoRA's rate {found[task, 'plain-sweep'][seed][b]:.1f})"
        for task, seed, b in failures(found)
    ]
    judged_on = spans(averaged(found, "plain-sweep"))
    return [
        f"At the rate chosen on held-out data a LoRA failed on validation in: {'; '.join(told)}. Failed: under half of "
        f"its score at DyLoRA's rate, at which the seeds {judged_on} were run; the last rows take those runs instead.",
        "",
    ] * bool(told)


def judged(apart: list[float]) -> str:
    mean, error = mean_and_error(apart)
    low = mean - stats.t.ppf(0.975, len(apart) - 1) * error
    return interval(apart, 2) + (f" {EXCLUDED}" if low > -1 else "")
