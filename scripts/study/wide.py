"""Tables beside the main ones: larger r_max, and all linear layers."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from loralib.report.tables import markdown_table

from . import cells
from .cells import ALL_LINEAR, TRIED_RATE, WIDE_TASKS
from .held_out import BAR
from .methods import CUTS, DEFAULT, PLAIN_SWEEP, R_MAX, shown_up_to
from .naming import NAMES, OF_SWEEP, ROWS, order, spans, title, with_error
from .shown import device_of

SHOWN_ROWS = ("sweep", BAR, DEFAULT)
Curves = dict[str, dict[int, dict[int, float]]]  # {row: {seed: {rank: score}}}


@dataclass(frozen=True)
class Kept:
    """Which runs a table shows: those of one task, r_max, choice of layers, split and rate.

    ``rates``: {method: {r_max: rate}}; any other is TRIED_RATE.
    """

    task: str
    targets: str
    rates: dict[str, dict[int, float]]
    r_max: int = R_MAX
    split: str = "validation"

    def runs(self, records: list[dict], method: str, r_max: int) -> list[dict]:
        wanted = {"task": self.task, "targets": self.targets, "split": self.split, "method": method, "r_max": r_max}
        rate = self.rates.get(CUTS[method].of if method in CUTS else method, {}).get(r_max, TRIED_RATE)
        return [r for r in records if r["rate"] == rate and all(r[key] == value for key, value in wanted.items())]


def in_one_place(records: list[dict], kept: Kept, place_of: Callable[[dict], object] = device_of) -> list[dict]:
    """Those of the device (or whatever ``place_of`` tells of a run) on which most of the default's runs are."""
    places = Counter(map(place_of, kept.runs(records, DEFAULT, kept.r_max)))
    return [r for r in records if places and place_of(r) == places.most_common(1)[0][0]]


def curves_of(records: list[dict], kept: Kept, sweep: dict[int, str]) -> Curves:
    """The rows of a table, with whatever else ran there. The sweep's run at a rank above 8 is the plain training at
    that r_max. Of several runs of one cell the first line counts."""
    found: Curves = defaultdict(lambda: defaultdict(dict))
    records = records[::-1]
    for b in shown_up_to(kept.r_max):
        for r in kept.runs(records, sweep[b], R_MAX) if b in sweep else kept.runs(records, "lora-8", b):
            found["sweep"][r["seed"]][b] = r["scores"][str(b)]
    place = {"task": kept.task, "targets": kept.targets, "split": kept.split, "r_max": kept.r_max}
    here = {r["method"] for r in records if all(r[key] == value for key, value in place.items())}
    for method in order(here - set(OF_SWEEP)):
        for r in kept.runs(records, method, kept.r_max):
            found[method][r["seed"]] = {int(b): score for b, score in r["scores"].items()}
    return found


def curve_table(
    found: Curves, ranks: tuple[int, ...], digits: int, r_max: int = R_MAX, others: bool = True
) -> list[str]:
    """Mean ± standard error over the seeds that the default has, and the paired differences of the default. ``others``:
    rows beside these three."""
    seeds = sorted(found[DEFAULT])
    rows = []
    for row in [*SHOWN_ROWS, *(row for row in found if row not in SHOWN_ROWS)] if others else SHOWN_ROWS:
        curves = [found[row].get(seed, {}) for seed in seeds]
        values = [with_error([c[b] for c in curves if b in c], digits) for b in ranks]
        rows.append([ROWS.get(row) or title(row, r_max), *values])
    for row, name in (("sweep", "the default minus the sweep"), (BAR, "the default minus SVD")):
        both = [(found[DEFAULT][seed], found[row].get(seed, {})) for seed in seeds]
        values = [with_error([ours[b] - c[b] for ours, c in both if b in c], digits, "+") for b in ranks]
        rows.append([name, *values])
    return [markdown_table(["", *(f"r={b}" for b in ranks)], rows, "l"), ""]


def rank_tables(records: list[dict]) -> list[str]:
    """The default at larger r_max."""
    lines, rates = [], rates_by_r_max(records)
    for r_max in cells.WIDE_RANKS:
        for task in WIDE_TASKS:
            kept = Kept(task, cells.USUAL_TARGETS, rates, r_max)
            found = curves_of(in_one_place(records, kept), kept, PLAIN_SWEEP)
            if not found[DEFAULT]:
                continue
            ranks = shown_up_to(r_max)
            seeds = f"seed{'s' * (len(found[DEFAULT]) > 1)} {spans(found[DEFAULT])}"
            lines += [f"### r_max {r_max}, {NAMES[task]}, {seeds}", "", *curve_table(found, ranks, 1, r_max)]
            both = zip(*(kept.runs(records, name, r_max) for name in (DEFAULT, "lora-8")), strict=False)
            for ours, plain in islice(both, 1):
                ratio = ours["evaluation_seconds"] / plain["evaluation_seconds"]
                lines += [
                    f"Measuring {len(ranks)} ranks took {ratio:.1f} times as long as measuring one (once each).",
                    "",
                ]
    if not lines:
        return []
    return [
        "## Larger r_max",
        "",
        f"Strength 2 (the sweep below rank 8: 16/r); of two seeds mean ± one standard error. {told_rates(rates)}",
        "",
        *lines,
    ]


def rates_by_r_max(records: list[dict]) -> dict[str, dict[int, float]]:
    """{method: {r_max: the chosen rate}} of larger r_max."""
    found: dict = defaultdict(dict)
    for r_max in cells.WIDE_RANKS:
        for method, rate in cells.chosen_rates(cells.at(records, r_max)).items():
            if method not in CUTS:
                found[method][r_max] = rate
    return found


def told_rates(rates: dict[str, dict[int, float]]) -> str:
    """The rates of a table's rows, as sentences."""
    told = []
    for r_max in cells.WIDE_RANKS:
        own = [f"{title(name, r_max)}: {rates[name][r_max]:g}" for name in order(rates) if r_max in rates[name]]
        told += [f"at r_max {r_max} {'; '.join(own)}"] if own else []
    if not told:
        return f"Rate {TRIED_RATE:g}; none was searched at these r_max."
    how = "[as those of r_max 8](choosing.md#larger-r_max)"
    return f"Rates, chosen {how}, {', '.join(told)}. All else at {TRIED_RATE:g}."


def target_tables(records: list[dict]) -> list[str]:
    """The default with all linear layers adapted."""
    lines, seeds = [], set()
    for task in WIDE_TASKS:
        kept = Kept(task, ALL_LINEAR, {})
        found = curves_of(in_one_place(records, kept), kept, PLAIN_SWEEP)
        if found[DEFAULT]:
            seeds |= set(found[DEFAULT])
            lines += [f"### {NAMES[task]}", "", *curve_table(found, shown_up_to(R_MAX), 1)]
    if not lines:
        return []
    about = (
        f"r_max {R_MAX}, rate {TRIED_RATE:g}, {len(seeds)} seeds, mean ± one standard error; strength 2, of the sweep "
        "16/r."
    )
    return ["## All linear layers", "", about, "", *lines]
