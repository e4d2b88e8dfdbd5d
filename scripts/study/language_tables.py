"""Tables of the language model; lower is better."""

from loralib.report.tables import markdown_table

from . import cells
from .cells import ALL_LINEAR, LANGUAGE_RATE_RUNS
from .held_out import BAR
from .methods import DEFAULT, PLAIN_SWEEP, R_MAX, SWEEP, shown_up_to
from .naming import title
from .shown import computed_in, device_of
from .wide import Curves, Kept, curve_table, curves_of, in_one_place

# Other strengths than 16/r, each with the method at that.
BASE = {name: plain for plain, *others in SWEEP.values() for name in others}
RANKS = shown_up_to(R_MAX)


ABOUT = (
    "SmolLM2-135M-Instruct on WebNLG, all linear layers, 1,500 training entries, once, batch 8; the loss of the "
    "completions' tokens, lower is better. The sweep is at strength 16/r, all else at 2; each method at its own "
    "rate, chosen on 200 entries of train that were held out, seed 0 ([the rates](choosing.md#the-language-model))"
)


def of_language(records: list[dict]) -> tuple[str, list[dict], dict[str, dict[float, float]]]:
    """The task, its runs, and what was found at which rate on what was held out."""
    (task,) = cells.LANGUAGE
    own = [r for r in records if r["task"] == task]
    return task, own, cells.held_out_scores(own, LANGUAGE_RATE_RUNS)


def rates_of(held_out: dict[str, dict[float, float]]) -> dict[str, float]:
    return {method: max(by_rate, key=by_rate.__getitem__) for method, by_rate in held_out.items()}


def at_r_max(rates: dict[str, float]) -> dict[str, dict[int, float]]:
    return {method: {R_MAX: rate} for method, rate in rates.items()}


def validation_tables(records: list[dict]) -> list[str]:
    """The language model on validation."""
    task, own, held_out = of_language(records)
    kept = Kept(task, ALL_LINEAR, at_r_max(rates_of(held_out)))
    found = curves_of(in_one_place(own, kept, computed_in), kept, PLAIN_SWEEP)
    if not found[DEFAULT]:
        return []
    seeds = sorted(found[DEFAULT])
    of_seeds = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return [
        "## A language model",
        "",
        f"{ABOUT}{without_search(found, held_out)}.",
        "",
        f"On 200 entries of validation, {of_seeds}, mean ± one standard error:",
        "",
        *curve_table(found, RANKS, 4),
    ]


def without_search(found: Curves, held_out: dict[str, dict[float, float]]) -> str:
    """Which of a table's methods had no choice of rates, as words to end a sentence with."""
    single = [(title(row), *held_out[row]) for row in found if len(held_out.get(row, {})) == 1]
    told = [f"{name} at {rate:g}" for name, rate in single]
    return f"; not so {' and '.join(told)}, the only rate tried" if told else ""


def held_out_tables(records: list[dict]) -> list[str]:
    """What was held out: the default beside its peers, what else was tried, and the rates."""
    task, own, held_out = of_language(records)
    if not own:
        return []
    rates = rates_of(held_out)
    kept = Kept(task, ALL_LINEAR, at_r_max(rates), split="held_out")
    found = curves_of(own, kept, PLAIN_SWEEP)
    devices = sorted({device_of(r) for name in (*PLAIN_SWEEP.values(), DEFAULT) for r in kept.runs(own, name, R_MAX)})
    return [
        "## The language model",
        "",
        "The loss on 200 training entries that were not trained on, seed 0; lower is better.",
        "",
        *rate_table(held_out),
        *([f"Each at its best rate ({', '.join(devices)}):", ""] if found[DEFAULT] else []),
        *(curve_table(found, RANKS, 4, others=False) if found[DEFAULT] else []),
        *variant_tables([r for r in own if r["split"] == "held_out"], rates),
    ]


def variant_tables(records: list[dict], rates: dict[str, float]) -> list[str]:
    """What else was tried, at each of its rates, beside the default and the plainest peer at theirs; apart by what they
    were computed in, which moves a loss as much as a variant does."""
    of_sweep = {name for names in SWEEP.values() for name in names}
    lines = []
    for place in dict.fromkeys(map(computed_in, records)):
        own = [r for r in records if computed_in(r) == place]
        peers = [r for name in (BAR, DEFAULT) for r in own if r["method"] == name and r["rate"] == rates.get(name)]
        tried = [r for r in own if r["method"] not in {BAR, DEFAULT, *of_sweep}]
        rows = [
            [title(r["method"]), f"{r['rate']:g}", *(f"{r['scores'][str(b)]:.4f}" for b in RANKS)]
            for r in peers + tried
        ]
        if tried:
            head = [f"tried, on: {', '.join(filter(None, place))}", "rate", *(f"r={b}" for b in RANKS)]
            lines += [markdown_table(head, rows, "l"), ""]
    return lines


def rate_table(held_out: dict[str, dict[float, float]]) -> list[str]:
    """How the rates are chosen."""
    rates = sorted({rate for by_rate in held_out.values() for rate in by_rate})
    rows = []
    for method, by_rate in held_out.items():
        if method in {DEFAULT, BAR, *PLAIN_SWEEP.values(), *BASE}:
            values = [f"{-by_rate[rate]:.4f}" if rate in by_rate else "" for rate in rates]
            rows.append([title(method), *values, chosen(method, held_out)])
    head = ["loss (over several ranks: AURAC)", *(f"{rate:g}" for rate in rates), "chosen"]
    return [markdown_table(head, rows, "l"), ""]


def chosen(method: str, held_out: dict[str, dict[float, float]]) -> str:
    """The rate that a method takes, what is to be measured before it is known, or why it was left."""
    own, base = held_out[method], held_out.get(BASE.get(method, ""), {})
    common = own.keys() & base.keys()
    if common and all(own[rate] < base[rate] for rate in common):
        return "left: above strength 16/r at each"
    beyond = ", ".join(f"{rate:g}" for rate in cells.next_rates(own))
    best = max(own, key=own.__getitem__)
    return f"{best:g}" + (f" (open: {beyond})" if beyond else "")
