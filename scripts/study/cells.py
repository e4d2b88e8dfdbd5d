"""The study's runs as cells: which there are, which are done, which learning rate each method takes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from loralib.report.choice import aurac

from .methods import SHOWN, SWEEP


@dataclass(frozen=True)
class Budget:
    """What a task gets: training epochs, and the fixed subsets of its data (None: all of it)."""

    epochs: float
    max_length: int = 128
    train: int | None = None
    validation: int | None = None


BUDGETS = {
    "cola": Budget(epochs=4),
    "rte": Budget(epochs=4),
    "sst2": Budget(epochs=2, train=10_000),
    "mnli": Budget(epochs=2, validation=3_000),
    "qnli": Budget(epochs=2, validation=3_000),
    "qqp": Budget(epochs=2, validation=3_000),
}
BATCH = 32
# Where a method's rates start; as long as its best is at an end, the next rate beyond is measured too (a factor of 2).
RATES = (5e-4, 1e-3, 2e-3)
LIMITS = (1e-5, 1e-1)
# What a rate is chosen on: tasks with signal, two seeds each.
RATE_RUNS = tuple((task, seed) for task in ("cola", "sst2") for seed in (0, 1))
# What leads are tried on, at one rate: tasks on which no rate was chosen, two seeds.
LEAD_RUNS = tuple((task, seed) for seed in (0, 1) for task in ("mnli", "qqp", "qnli"))
TRIED_RATE = 1e-3


@dataclass(frozen=True)
class Cell:
    """One training run. ``split`` "held_out": train on nine tenths of train, measure on the last tenth."""

    task: str
    method: str
    seed: int
    rate: float
    split: str = "validation"

    def done(self, records: list[dict]) -> bool:
        return any(all(record[k] == v for k, v in vars(self).items()) for record in records)


def read_records(file: Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def area(scores: dict) -> float:
    """AURAC over those of ranks 1, 2, 4 and 8 that were measured; ``scores`` by rank, an int or, as in a file, text."""
    own = {int(b): value for b, value in scores.items() if int(b) in SHOWN}
    return aurac(list(own), list(own.values()))


def held_out_scores(records: list[dict]) -> dict[str, dict[float, float]]:
    """{method: {rate: AURAC, the mean over RATE_RUNS}}, of the rates that were measured on all of them."""
    scores = {
        (record["method"], record["rate"], record["task"], record["seed"]): area(record["scores"])
        for record in records
        if record["split"] == "held_out"
    }
    found: dict[str, dict[float, float]] = {}
    for method, rate in sorted({key[:2] for key in scores}):
        own = [scores.get((method, rate, task, seed), math.nan) for task, seed in RATE_RUNS]
        if not math.isnan(sum(own)):
            found.setdefault(method, {})[rate] = sum(own) / len(own)
    return found


def chosen_rates(records: list[dict]) -> dict[str, float]:
    """Each method's best rate on the held-out tenths, once its grid is closed: ``next_rates`` has nothing to add."""
    return {
        method: max(by_rate, key=by_rate.__getitem__)
        for method, by_rate in held_out_scores(records).items()
        if not next_rates(by_rate)
    }


def next_rates(by_rate: dict[float, float]) -> list[float]:
    """The rates that are missing: those of RATES, then the one beyond the best while the best is at an end."""
    if missing := [rate for rate in RATES if rate not in by_rate]:
        return missing
    best = max(by_rate, key=by_rate.__getitem__)
    beyond = best / 2 if best == min(by_rate) else best * 2 if best == max(by_rate) else None
    return [beyond] if beyond and LIMITS[0] <= beyond <= LIMITS[1] else []


def chosen_strengths(records: list[dict]) -> dict[int, str]:
    """The sweep's method at each rank: the better of its strengths, each at its own best rate."""
    scores, rates = held_out_scores(records), chosen_rates(records)
    return {
        r: max(names, key=lambda name: scores[name][rates[name]])
        for r, names in SWEEP.items()
        if all(name in rates for name in names)
    }


def rate_cells(methods: list[str], records: list[dict]) -> list[Cell]:
    """What has to be measured next so that each method's rate can be chosen; none once all grids are closed."""
    scores = held_out_scores(records)
    cells = [
        Cell(task, name, seed, rate, "held_out")
        for name in methods
        for rate in next_rates(scores.get(name, {}))
        for task, seed in RATE_RUNS
    ]
    return [cell for cell in cells if not cell.done(records)]


def lead_cells(methods: list[str]) -> list[Cell]:
    return [Cell(task, name, seed, TRIED_RATE, "held_out") for task, seed in LEAD_RUNS for name in methods]


def run_cells(tasks: list[str], methods: list[str], seeds: list[int], rates: dict[str, float]) -> list[Cell]:
    """Seed by seed, so that a whole table stands early."""
    return [Cell(task, name, seed, rates[name]) for seed in seeds for task in tasks for name in methods]
