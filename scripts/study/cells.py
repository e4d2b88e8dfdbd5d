"""The study's runs as cells: which there are, which are done, which learning rate each method takes."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from loralib.report.choice import aurac

from .methods import ALPHA, DEFAULT, R_MAX, SWEEP, Method, shown_up_to
from .tried import named


@dataclass(frozen=True)
class Budget:
    """What a task gets: training epochs, and the fixed subsets of its data (None: all of it)."""

    epochs: float
    max_length: int = 128
    train: int | None = None
    validation: int | None = None
    batch: int = 32


BUDGETS = {
    "cola": Budget(epochs=4),
    "rte": Budget(epochs=4),
    "sst2": Budget(epochs=2, train=10_000),
    "mnli": Budget(epochs=2, validation=3_000),
    "qnli": Budget(epochs=2, validation=3_000),
    "qqp": Budget(epochs=2, validation=3_000),
}
# A language model's: entries of WebNLG, of which the last are held out where rates are chosen.
LANGUAGE = {"webnlg": Budget(epochs=1, train=1_500, validation=200, batch=8)}
# Where a method's rates start; as long as its best is at an end, the next rate beyond is measured too (a factor of 2).
RATES = (5e-4, 1e-3, 2e-3)
LIMITS = (1e-5, 1e-1)
# What a rate is chosen on: tasks with signal, two seeds each.
Runs = tuple[tuple[str, int], ...]  # of a task and a seed
RATE_RUNS: Runs = tuple((task, seed) for task in ("cola", "sst2") for seed in (0, 1))
LANGUAGE_RATE_RUNS = (("webnlg", 0),)
# What leads are tried on, at one rate: tasks on which no rate was chosen, two seeds.
LEAD_RUNS = tuple((task, seed) for seed in (0, 1) for task in ("mnli", "qqp", "qnli"))
TRIED_RATE = 1e-3
USUAL_TARGETS = "query,value"
ALL_LINEAR = "all-linear"
# r_max and targets as people use them: two tasks each, and at larger r_max the methods whose rates are searched.
WIDE_TASKS = "cola", "sst2"
WIDE_SEEDS = {16: (0, 1), 64: (0,)}  # of each r_max
WIDE_RANKS = tuple(WIDE_SEEDS)
WIDE_METHODS = ("lora-8", DEFAULT, "halving")


@dataclass(frozen=True)
class Cell:
    """One training run. ``split`` "held_out": train on nine tenths of train, measure on the last tenth (a language
    model: on as many entries more).

    ``r_max`` and ``targets``: what is adapted. A method that is written down for r_max 8 is scaled (``Method.at``).
    """

    task: str
    method: str
    seed: int
    rate: float
    split: str = "validation"
    r_max: int = R_MAX
    targets: str = USUAL_TARGETS

    def done(self, records: list[dict]) -> bool:
        return any(all(record[k] == v for k, v in vars(self).items()) for record in records)

    @property
    def usual(self) -> bool:
        """Whether it belongs to the main tables."""
        return self.r_max == R_MAX and self.targets == USUAL_TARGETS and self.task in BUDGETS

    @property
    def is_lead(self) -> bool:
        """Whether variants are tried on it."""
        place = self.usual and self.split == "held_out" and self.rate == TRIED_RATE
        return place and (self.task, self.seed) in LEAD_RUNS

    @property
    def budget(self) -> Budget:
        return {**BUDGETS, **LANGUAGE}[self.task]

    @property
    def trained(self) -> Method:
        return named(self.method).at(self.r_max)

    @property
    def is_trunk(self) -> bool:
        """Whether it is the plain training at r_max, from which others go on and which is cut afterwards."""
        return self.method == "lora-8"

    @property
    def goes_on(self) -> bool:
        """Whether its first part is that training."""
        method = self.trained
        plain = bool(method.schedule.full_rank_share) and not method.skew and not method.lengths
        return plain and (method.r, method.strength) == (self.r_max, ALPHA / R_MAX)


def read_records(file: Path) -> list[dict]:
    """The lines of the file; one that says nothing of r_max or targets has the usual ones."""
    if not file.exists():
        return []
    usual = {"r_max": R_MAX, "targets": USUAL_TARGETS}
    return [usual | json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def usual_records(records: list[dict]) -> list[dict]:
    """Those of the main tables."""
    return at(records)


def at(records: list[dict], r_max: int = R_MAX, targets: str = USUAL_TARGETS) -> list[dict]:
    """Those of one r_max and choice of layers, on GLUE."""
    return [r for r in records if r["task"] in BUDGETS and (r["r_max"], r["targets"]) == (r_max, targets)]


def area(scores: dict) -> float:
    """AURAC over those of ranks 1, 2, 4, 8, .. that were measured; ``scores`` by rank, an int or, as in a file,
    text."""
    own = {b: scores[b] for b in sorted(scores, key=int) if int(b) in shown_up_to(max(map(int, scores)))}
    return aurac([int(b) for b in own], list(own.values()))


def held_out_scores(records: list[dict], runs: Runs | None = None) -> dict[str, dict[float, float]]:
    """{method: {rate: AURAC, the mean over ``runs`` (default RATE_RUNS)}}, of the rates that were measured on all of
    them. A loss counts with its sign turned: higher is better. Of runs of one cell on several devices the first line
    counts."""
    scores = {
        (record["method"], record["rate"], record["task"], record["seed"]): area(record["scores"])
        * (-1 if record.get("metric") == "loss" else 1)
        for record in reversed(records)
        if record["split"] == "held_out"
    }
    found: dict[str, dict[float, float]] = {}
    for method, rate in sorted({key[:2] for key in scores}):
        own = [scores.get((method, rate, task, seed), math.nan) for task, seed in runs or RATE_RUNS]
        if not math.isnan(sum(own)):
            found.setdefault(method, {})[rate] = sum(own) / len(own)
    return found


def chosen_rates(records: list[dict], runs: Runs | None = None) -> dict[str, float]:
    """Each method's best rate on the held-out tenths, once its grid is closed: ``next_rates`` has nothing to add."""
    return {
        method: max(by_rate, key=by_rate.__getitem__)
        for method, by_rate in held_out_scores(records, runs).items()
        if not next_rates(by_rate)
    }


def next_rates(by_rate: dict[float, float]) -> list[float]:
    """The rates that are missing: those of RATES, then the one beyond the best while the best is at an end. None are
    once the best has both its neighbours."""
    best = max(by_rate, key=by_rate.__getitem__, default=0.0)
    if best / 2 in by_rate and best * 2 in by_rate:
        return []
    if missing := [rate for rate in RATES if rate not in by_rate]:
        return missing
    beyond = best / 2 if best == min(by_rate) else best * 2 if best == max(by_rate) else None
    return [beyond] if beyond and LIMITS[0] <= beyond <= LIMITS[1] else []


def chosen_strengths(records: list[dict], runs: Runs | None = None) -> dict[int, str]:
    """The sweep's method at each rank: the better of its strengths, each at its own best rate."""
    scores, rates = held_out_scores(records, runs), chosen_rates(records, runs)
    return {
        r: max(names, key=lambda name: scores[name][rates[name]])
        for r, names in SWEEP.items()
        if all(name in rates for name in names)
    }


def rate_cells(
    methods: list[str],
    records: list[dict],
    runs: Runs | None = None,
    targets: str = USUAL_TARGETS,
    r_max: int = R_MAX,
) -> list[Cell]:
    """What has to be measured next so that each method's rate can be chosen; none once all grids are closed."""
    scores = held_out_scores([r for r in records if (r["r_max"], r["targets"]) == (r_max, targets)], runs)
    cells = [
        Cell(task, name, seed, rate, "held_out", r_max, targets)
        for name in methods
        for rate in next_rates(scores.get(name, {}))
        for task, seed in runs or RATE_RUNS
    ]
    return [cell for cell in cells if not cell.done(records)]


def lead_cells(methods: list[str]) -> list[Cell]:
    return [Cell(task, name, seed, TRIED_RATE, "held_out") for task, seed in LEAD_RUNS for name in methods]


def wide_rates(records: list[dict], r_max: int) -> dict[str, float]:
    """Each method's rate at a larger r_max: the chosen one, else TRIED_RATE."""
    return defaultdict(lambda: TRIED_RATE, chosen_rates(at(records, r_max)))


def wide_cells(records: list[dict], methods: list[str] | None = None) -> list[Cell]:
    """``methods`` (default: our default, beside plain LoRA of rank r_max, cut by SVD) at larger r_max, at the rates
    that ``records`` choose; and with all linear layers (by default beside the sweep too), two seeds."""
    sweep = [] if methods else [names[0] for r, names in sorted(SWEEP.items()) if r < R_MAX]
    methods = methods or ["lora-8", DEFAULT]
    cells = [
        Cell(task, name, seed, wide_rates(records, r_max)[name], r_max=r_max)
        for r_max, seeds in WIDE_SEEDS.items()
        for seed in seeds
        for task in WIDE_TASKS
        for name in methods
    ]
    return cells + [
        Cell(task, name, seed, TRIED_RATE, targets=ALL_LINEAR)
        for seed in (0, 1)
        for task in WIDE_TASKS
        for name in [*methods, *sweep]
    ]


def run_cells(
    tasks: list[str], methods: list[str], seeds: list[int], rates: dict[str, float], targets: str = USUAL_TARGETS
) -> list[Cell]:
    """Seed by seed, so that a whole table stands early."""
    return [
        Cell(task, name, seed, rates[name], targets=targets) for seed in seeds for task in tasks for name in methods
    ]
