"""Which runs the tables show: each method's at its rate, the sweep's at its strengths, and the rows that they give."""

from collections import Counter, defaultdict

from .cells import chosen_rates, chosen_strengths
from .methods import ADALORA, CUTS, DEFAULT, SQUEEZE, SWEEP
from .naming import OF_SWEEP, ROWS, called

PROCESSOR = "cpu"
# The tasks that averages are over. RTE, from scratch with so small an encoder, stays at chance and adds noise alone.
AVERAGED = ("cola", "sst2", "mnli", "qnli", "qqp")


Found = dict[tuple[str, str], dict[int, dict[int, float]]]  # {(task, row): {seed: {rank: score}}}


def device_of(record: dict) -> str:
    """What a run computed on; older lines, all of processors, do not say it."""
    return record.get("device", PROCESSOR)


def computed_in(record: dict) -> tuple[str, str | None]:
    """What a run's rounding depends on: the device and the precision; older lines do not say the latter."""
    return device_of(record), record.get("precision")


def scores_by_device(records: list[dict]) -> dict[str, Found]:
    """What was measured, apart by device, since a run's rounding there moves a score as another seed does; the sweep's
    device first. A row is a method, or one of ROWS."""
    shown = by_row(records)
    sweep = Counter(device_of(record) for record, row, _ in shown if row == "sweep" and record["method"] != "lora-8")
    devices = sorted({device_of(record) for record, _, _ in shown}, key=lambda name: (-sweep[name], name))
    return {name: scores([each for each in shown if device_of(each[0]) == name]) for name in devices}


def scores(shown: list[tuple[dict, str, list[int]]]) -> Found:
    """The scores of runs of one device, as ``by_row`` gives them."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for record, row, ranks in shown:
        for b in ranks:
            found[record["task"], row][record["seed"]][b] = record["scores"][str(b)]
    for key in [key for key in found if key[1] in ROWS]:  # seeds whose four runs are there
        found[key] = {seed: curve for seed, curve in found[key].items() if len(curve) == len(SWEEP)}
    return {key: dict(by_seed) for key, by_seed in found.items() if by_seed}


def run_enough(records: list[dict], method: str, rate: float, instead: str | None = None) -> bool:
    """Whether one device has three seeds of it on every task of AVERAGED, or as many runs as at the rate that most runs
    (of ``instead``, if given) have."""
    kept = [r for r in records if r["split"] == "validation" and r["task"] in AVERAGED]
    own = Counter(device_of(r) for r in kept if (r["method"], r["rate"]) == (method, rate))
    others = [r for r in kept if r["method"] == (instead or method) and (r["method"], r["rate"]) != (method, rate)]
    often = Counter((r["rate"], device_of(r)) for r in others)
    return 0 < max(own.values(), default=0) >= min(3 * len(AVERAGED), max(often.values(), default=0))


def sweep_methods(records: list[dict]) -> dict[int, str]:
    """The sweep's method at each rank: at the strength that is chosen, once there are runs of it; until then at
    alpha / r."""
    usual, rates = {r: names[0] for r, names in SWEEP.items()}, chosen_rates(records)
    return usual | {
        r: name
        for r, name in chosen_strengths(records).items()
        if name == usual[r] or run_enough(records, name, rates[name], usual[r])
    }


def by_row(records: list[dict]) -> list[tuple[dict, str, list[int]]]:
    """The runs that tables show, each once for every row that it belongs to, with the ranks that it gives the row."""
    several = {"sweep": sweep_methods(records), "squeeze": SQUEEZE, "adalora": ADALORA}
    found = []
    for record in at_their_rates(records):
        method = record["method"]
        rows = [(row, [r for r, name in by_rank.items() if name == method]) for row, by_rank in several.items()]
        rows = [(row, ranks) for row, ranks in rows if ranks]
        found += [(record, *row) for row in rows or [(method, [int(b) for b in record["scores"]])]]
    return found + plain_sweep(records, found)


def plain_sweep(records: list[dict], shown: list[tuple[dict, str, list[int]]]) -> list[tuple[dict, str, list[int]]]:
    """The same of the sweep at alpha / r and at the default's rate; nothing where that is the sweep that is shown."""
    usual = {names[0]: r for r, names in SWEEP.items()}
    ours = {record["rate"] for record, row, _ in shown if row == DEFAULT}
    settings = {(record["method"], record["rate"]) for record, row, _ in shown if row == "sweep"}
    if len(ours) != 1 or settings <= {(name, rate) for name in usual for rate in ours}:
        return []
    own = [r for r in records if r["split"] == "validation" and r["method"] in usual and r["rate"] in ours]
    return [(record, "plain-sweep", [usual[record["method"]]]) for record in own]


def at_their_rates(records: list[dict]) -> list[dict]:
    """The runs that tables show: each method's at the rate that is chosen, once there are enough, and until then at the
    one that most of its runs have; of the sweep those at one strength for each rank. Of runs of one cell on one device
    the first line counts."""
    once: dict[tuple, dict] = {}
    for r in records:
        if r["split"] == "validation":
            once.setdefault((r["task"], r["method"], r["seed"], r["rate"], device_of(r)), r)
    kept = list(once.values())
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


def _each(counts: Counter, last: str = ", ") -> str:
    """How many of what; ``last`` stands before the last."""
    *first, end = [f"{count} {name}" for name, count in sorted(counts.items())] or [""]
    return ", ".join(first) + last * bool(first) + end


def roundings(records: list[dict], device: str, rows: dict[str, str]) -> list[str]:
    """A sentence: in which precision the runs of some rows (what to call each) were on a device. Nothing where that is
    one for all."""
    found = {name: Counter() for name in rows.values()}
    for record, row, _ in by_row(records):
        if row in rows and device_of(record) == device and record["task"] in AVERAGED:
            found[rows[row]][record.get("precision", "of a precision that was not recorded")] += 1
    if len(set().union(*found.values())) < 2:
        return []
    told = "; ".join(f"of {name} {counts.total()} runs {_each(counts, ' and ')}" for name, counts in found.items())
    return [
        f"Not all runs on {device} are of one machine, and a score moves with its rounding as with a seed: {told}.",
        "",
    ]


def not_yet_run(records: list[dict]) -> list[str]:
    """What was chosen on held-out parts of train and is not what the table shows, for want of runs."""
    runs: dict[tuple[str, float], Counter] = defaultdict(Counter)
    for r in records:
        if r["split"] == "validation" and r["task"] in AVERAGED:
            runs[r["method"], r["rate"]][device_of(r)] += 1
    whole = 3 * len(AVERAGED)
    shown_at = {r["method"]: r["rate"] for r in at_their_rates(records)}
    best, sweep = chosen_strengths(records), sweep_methods(records)
    wanted = {sweep[r] for r, name in best.items() if name == sweep[r]} | set(best.values())
    late = [
        f"{called(name)} at rate {rate:g} (runs so far: {_each(runs[name, rate]) or 'none'})"
        for name, rate in chosen_rates(records).items()
        if shown_at.get(name) != rate and (name in wanted or (name not in OF_SWEEP and name in shown_at))
    ]
    if not late:
        return []
    return [
        f"Not yet at its own best rate or strength: {'; '.join(late)}. A choice counts from {whole} runs on one device "
        "on, three seeds of every task.",
        "",
    ]
