"""The study's runs as cells: which there are, which are done, which learning rate each method takes."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from .methods import SWEEP


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
RATES = (5e-4, 1e-3, 2e-3)
# What a rate is chosen on: tasks and seeds. Two of CoLA, since at 2e-3 some seeds of every method collapse there.
RATE_RUNS = (("rte", 0), ("cola", 0), ("cola", 1))
TRIED_RATE = 1e-3
SWEEP_ENDS = ("lora-1", "lora-8")


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


def chosen_rates(records: list[dict]) -> dict[str, float]:
    """Each method's best rate by AURAC on the held-out tenths, averaged over tasks; only methods measured at all rates.

    The sweep is one method: its rate is the best for the mean of its ends, ``SWEEP_ENDS``.
    """
    scores = {
        (record["method"], record["rate"], record["task"], record["seed"]): record["aurac"]
        for record in records
        if record["split"] == "held_out"
    }
    weight = {task: 1 / sum(t == task for t, _ in RATE_RUNS) for task, _ in RATE_RUNS}
    found = {}
    for method in {key[0] for key in scores}:
        family = SWEEP_ENDS if method in SWEEP_ENDS else (method,)
        own = {
            rate: sum(
                weight[task] * scores.get((name, rate, task, seed), -math.inf)
                for name in family
                for task, seed in RATE_RUNS
            )
            for rate in RATES
        }
        if min(own.values()) > -math.inf:
            found[method] = max(own, key=own.get)
    if SWEEP_ENDS[0] in found:
        found |= dict.fromkeys(SWEEP, found[SWEEP_ENDS[0]])
    return found


def rate_cells(methods: list[str], rates: list[float]) -> list[Cell]:
    own = [name for name in methods if name not in SWEEP or name in SWEEP_ENDS]
    return [Cell(task, name, seed, rate, "held_out") for name in own for rate in rates for task, seed in RATE_RUNS]


def run_cells(tasks: list[str], methods: list[str], seeds: list[int], rates: dict[str, float]) -> list[Cell]:
    """Seed by seed, so that a whole table stands early."""
    return [Cell(task, name, seed, rates[name]) for seed in seeds for task in tasks for name in methods]
