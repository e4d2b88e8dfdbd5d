"""Tables beside the main ones: larger r_max, all linear layers, and a language model."""

from collections import Counter, defaultdict
from dataclasses import dataclass

from loralib.report.tables import markdown_table

from . import cells
from .cells import ALL_LINEAR, LANGUAGE_RATE_RUNS, TRIED_RATE, WIDE_TASKS
from .held_out import BAR
from .methods import DEFAULT, R_MAX, SWEEP, shown_up_to
from .naming import NAMES, ROWS, title, with_error
from .shown import device_of
from .tried import TRIED

SHOWN_ROWS = ("sweep", BAR, DEFAULT)
Curves = dict[str, dict[int, dict[int, float]]]  # {row: {seed: {rank: score}}}


@dataclass(frozen=True)
class Kept:
    """Which runs a table shows: those of one task, r_max, choice of layers, split and, by method, rate."""

    task: str
    targets: str
    rates: dict[str, float]
    r_max: int = R_MAX
    split: str = "validation"

    def runs(self, records: list[dict], method: str, r_max: int) -> list[dict]:
        wanted = {"task": self.task, "targets": self.targets, "split": self.split, "method": method, "r_max": r_max}
        rate = self.rates.get("lora-8" if method == BAR else method, TRIED_RATE)
        return [r for r in records if r["rate"] == rate and all(r[key] == value for key, value in wanted.items())]


def curves_of(records: list[dict], kept: Kept, sweep: dict[int, str]) -> Curves:
    """The rows of a table, of the device on which the default ran. The sweep's run at a rank above 8 is the plain
    training at that r_max."""
    found: Curves = defaultdict(lambda: defaultdict(dict))
    devices = Counter(map(device_of, kept.runs(records, DEFAULT, kept.r_max)))
    records = [r for r in records if devices and device_of(r) == devices.most_common(1)[0][0]]
    for b in shown_up_to(kept.r_max):
        for r in kept.runs(records, sweep[b], R_MAX) if b in sweep else kept.runs(records, "lora-8", b):
            found["sweep"][r["seed"]][b] = r["scores"][str(b)]
    for method in (BAR, DEFAULT):
        for r in kept.runs(records, method, kept.r_max):
            found[method][r["seed"]] = {int(b): score for b, score in r["scores"].items()}
    return found


def curve_table(found: Curves, ranks: tuple[int, ...], digits: int, r_max: int = R_MAX) -> list[str]:
    """Mean ± standard error over the seeds that the default has, and the paired differences of the default."""
    seeds = sorted(found[DEFAULT])
    rows = []
    for row in SHOWN_ROWS:
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
    sweep = {r: names[0] for r, names in SWEEP.items() if r < R_MAX}
    lines = []
    for r_max in cells.WIDE_RANKS:
        for task in WIDE_TASKS:
            kept = Kept(task, cells.USUAL_TARGETS, {}, r_max)
            found = curves_of(records, kept, sweep)
            if not found[DEFAULT]:
                continue
            ranks = shown_up_to(r_max)
            lines += [f"### r_max {r_max}, {NAMES[task]}", "", *curve_table(found, ranks, 1, r_max)]
            for ours, plain in zip(*(kept.runs(records, name, r_max) for name in (DEFAULT, "lora-8")), strict=False):
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
        f"Rate {TRIED_RATE:g}, strength 2 (the sweep below rank 8: 16/r), seed 0 alone. No rate was "
        "searched at these r_max.",
        "",
        *lines,
    ]


def target_tables(records: list[dict]) -> list[str]:
    """The default with all linear layers adapted."""
    lines, seeds = [], set()
    for task in WIDE_TASKS:
        found = curves_of(records, Kept(task, ALL_LINEAR, {}), {r: names[0] for r, names in SWEEP.items()})
        if found[DEFAULT]:
            seeds |= set(found[DEFAULT])
            lines += [f"### {NAMES[task]}", "", *curve_table(found, shown_up_to(R_MAX), 1)]
    if not lines:
        return []
    about = f"r_max {R_MAX}, rate {TRIED_RATE:g}, {len(seeds)} seeds; strength 2, of the sweep 16/r."
    return ["## All linear layers", "", about, "", *lines]


def language_tables(records: list[dict]) -> list[str]:
    """The loss of a language model; lower is better."""
    (task,) = cells.LANGUAGE
    own = [r for r in records if r["task"] == task]
    rates = cells.chosen_rates(own, LANGUAGE_RATE_RUNS)
    sweep = {r: names[0] for r, names in SWEEP.items()} | cells.chosen_strengths(own, LANGUAGE_RATE_RUNS)
    found = curves_of(own, Kept(task, ALL_LINEAR, rates), sweep)
    measured, searched = [], language_rates(own)
    if found[DEFAULT]:
        used = {row: sorted({f"{rates.get(name, TRIED_RATE):g}" for name in names}) for row, names in
                {"sweep": sweep.values(), "SVD": ["lora-8"], "default": [DEFAULT]}.items()}  # fmt: skip
        at = "; ".join(f"{row} {', '.join(names)}" for row, names in used.items())
        measured = [f"On 200 entries of validation; rates: {at}.", "", *curve_table(found, shown_up_to(R_MAX), 4)]
    if not measured and not searched:
        return []
    measured = measured or language_so_far(own, task)
    return [
        "## A language model",
        "",
        "SmolLM2-135M-Instruct on WebNLG, all linear layers, 1,500 training entries, once, batch 8; the loss of the "
        "completions' tokens, lower is better.",
        "",
        *measured,
        *searched,
    ]


def language_so_far(records: list[dict], task: str) -> list[str]:
    """All at the highest rate that the default was tried at, on the entries that rates are chosen on."""
    tried = [r["rate"] for r in records if r["method"] == DEFAULT]
    if not tried:
        return ["Rates are still being searched, and nothing is compared yet.", ""]
    names = [name for names in SWEEP.values() for name in names]
    kept = Kept(task, ALL_LINEAR, dict.fromkeys((DEFAULT, *names), max(tried)), split="held_out")
    found = curves_of(records, kept, {r: names[0] for r, names in SWEEP.items()})
    return [
        f"Rates are still being searched, and nothing is compared on validation yet. All at rate {max(tried):g} (the "
        "sweep at strength 16/r), seed 0, on 200 entries of train that were not trained on:",
        "",
        *curve_table(found, shown_up_to(R_MAX), 4),
        *variant_table([r for r in records if r["rate"] == max(tried) and r["split"] == "held_out"]),
    ]


def variant_table(records: list[dict]) -> list[str]:
    """What else was tried, as it is."""
    rows = [
        [title(r["method"]), *(f"{r['scores'][str(b)]:.4f}" for b in shown_up_to(R_MAX))]
        for r in records
        if r["method"] in TRIED
    ]
    head = ["variants of the default there", *(f"r={b}" for b in shown_up_to(R_MAX))]
    return [markdown_table(head, rows, "l"), ""] if rows else []


def language_rates(records: list[dict]) -> list[str]:
    """How the language model's rates are chosen."""
    scores, chosen = cells.held_out_scores(records, LANGUAGE_RATE_RUNS), cells.chosen_rates(records, LANGUAGE_RATE_RUNS)
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    rows = []
    for method, by_rate in scores.items():
        if method in {DEFAULT, BAR, *(name for names in SWEEP.values() for name in names)}:
            values = [f"{-by_rate[rate]:.4f}" if rate in by_rate else "" for rate in rates]
            beyond = ", ".join(f"{rate:g}" for rate in cells.next_rates(by_rate))
            rows.append([title(method), *values, f"{chosen[method]:g}" if method in chosen else f"open: {beyond}"])
    if not rows:
        return []
    head = ["loss (over several ranks: AURAC)", *(f"{rate:g}" for rate in rates), "chosen"]
    return ["Its rates, on the 200 entries of train that were not trained on:", "", markdown_table(head, rows, "l"), ""]
