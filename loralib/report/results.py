"""The result of a run, read and written in one place: ``rank_results.json`` and its tables.

What the files hold is in ``docs/reference/output-directory.md``. Scores are 0-1 (a correlation -1-1) here and in
the file, 0-100 in tables. A score that is not defined or infinite is nan here and null in the file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..checks import check_int

FILE = "rank_results.json"
LAST = ("loss", "samples", "adapter_parameters")  # what a row holds beside the scores
LOWER = ("loss", "perplexity")  # the less the better
USUAL_SHARE = 0.8  # RankSchedule's default, here without torch


@dataclass(frozen=True)
class RankRow:
    """One rank on one split: its scores by name, its mean loss (None: there is none), how many examples, how many
    numbers the adapter has at that rank."""

    rank: int
    scores: dict[str, float]
    loss: float | None
    samples: int
    adapter_parameters: int

    def __post_init__(self):
        object.__setattr__(self, "scores", {name: _finite(value) for name, value in self.scores.items()})
        object.__setattr__(self, "loss", None if self.loss is None else _finite(self.loss))

    def value(self, name: str):
        """A column's value."""
        return getattr(self, name) if name in ("rank", *LAST) else self.scores[name]

    def to_json(self) -> dict[str, Any]:
        loss = {} if self.loss is None else {"loss": _null(self.loss)}
        scores = {name: _null(value) for name, value in self.scores.items()}
        counts = {"samples": self.samples, "adapter_parameters": self.adapter_parameters}
        return {"rank": self.rank, **scores, **loss, **counts}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> RankRow:
        for name in ("rank", "samples", "adapter_parameters"):
            check_int(name, row.get(name), 0, math.inf, "an int of 0 or more is wanted")
        scores = {name: _number(name, value) for name, value in row.items() if name not in ("rank", *LAST)}
        loss = _number("loss", row["loss"]) if "loss" in row else None
        return cls(row["rank"], scores, loss, row["samples"], row["adapter_parameters"])


@dataclass(frozen=True)
class Choice:
    """The rank that was chosen on a split, and why. ``standard_error``: of the difference to the best rank."""

    rank: int
    rule: str
    score: float = math.nan
    standard_error: float | None = None
    split: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "rule": self.rule,
            "score": _null(self.score),
            "standard_error": None if self.standard_error is None else _null(self.standard_error),
            "split": self.split,
        }


@dataclass(frozen=True)
class RankResults:
    """What a run found: every rank's row on every split, and how it was made.

    ``metric`` is the main score, ``metrics`` those it is the mean of; the settings are None where they are not known.
    """

    task: str
    method: str
    metric: str
    splits: dict[str, list[RankRow]]
    aurac: dict[str, float] = field(default_factory=dict)
    selected_rank: Choice | None = None
    selected_rank_reason: str | None = None  # why there is none
    metrics: tuple[str, ...] = ()
    model_name_or_path: str | None = None
    seed: int | None = None
    sampling: str | None = None
    distribution: str | None = None
    full_rank_share: float | None = None
    frozen: bool | None = None
    paced: bool | None = None
    fitted: bool | None = None  # whether strengths of each rank's own were learnt after the training
    r_min: int | None = None
    scaling: str | None = None
    max_rank: int | None = None
    lora_alpha: float | None = None
    command: str | None = None
    adapter: str | None = None  # a hash of the weights that were measured
    data: dict[str, str] = field(default_factory=dict)  # by split, a hash of its examples
    versions: dict[str, str] = field(default_factory=dict)
    directory: str | None = None  # where it was read from; not in the file

    def __post_init__(self):
        object.__setattr__(self, "aurac", {split: _finite(value) for split, value in self.aurac.items()})

    def split(self, name: str | None = None) -> str:
        """The split to speak of: the one named, else the first. Raises ValueError for one that is not there."""
        if name is not None and name not in self.splits:
            raise ValueError(f"The run has no split {name!r}; choose one of {', '.join(self.splits)}.")
        return name or next(iter(self.splits))

    def curve(self, split: str) -> tuple[list[int], list[float]]:
        """The ranks and their main scores on a split."""
        rows = self.splits[split]
        return [row.rank for row in rows], [row.value(self.metric) for row in rows]

    def factor(self, name: str) -> int:
        """What tables multiply a score by: 100, but for losses and for scores that are on another scale already."""
        values = [row.value(name) for rows in self.splits.values() for row in rows]
        return 1 if name in LOWER or any(abs(value) > 1 for value in values if value is not None) else 100

    def short_name(self) -> str:
        """What a legend calls the method: "DyLoRA" where it is the default's, else with what differs; ``method`` tells
        all."""
        if self.sampling is None:
            return self.method
        if self.sampling == "fixed":
            return f"LoRA r={self.max_rank}" + (", own strengths" if self.fitted else "")
        if self.sampling == "matryoshka":
            return "fixed gate"
        as_released = self.sampling == "step" and self.frozen and self.distribution in (None, "uniform")
        if as_released and not (self.full_rank_share or self.paced or (self.r_min or 1) > 1):
            return "DyLoRA as released"
        parts = ["per step"] if self.sampling == "step" else []
        usual = "mixed" if self.sampling == "example" and self.full_rank_share and not self.frozen else "uniform"
        parts += [self.distribution] if self.distribution not in (None, usual) else []
        share = self.full_rank_share
        parts += ["not ordered"] if not share else [f"ordered at {100 * share:g} %"] if share != USUAL_SHARE else []
        parts += ["frozen"] if self.frozen else []
        parts += ["paced"] if self.paced else []
        parts += ["own strengths"] if self.fitted else []
        parts += [f"from rank {self.r_min}"] if (self.r_min or 1) > 1 else []
        return ", ".join(["DyLoRA", *parts])

    @property
    def sign(self) -> int:
        """-1 where less of the main score is better, else 1."""
        return -1 if self.metric in LOWER else 1

    def to_json(self) -> dict[str, Any]:
        """The content of ``rank_results.json``."""
        settings = (
            *(
                "seed",
                "sampling",
                "distribution",
                "full_rank_share",
                "frozen",
                "paced",
                "r_min",
                "scaling",
                "max_rank",
                "lora_alpha",
            ),
            *("command", "versions", "metric"),
        )
        return {
            "task": self.task,
            "model_name_or_path": self.model_name_or_path,
            "method": self.method,
            **{name: getattr(self, name) for name in settings},
            "metrics": list(self.metrics),
            "splits": {name: [row.to_json() for row in rows] for name, rows in self.splits.items()},
            "aurac": {name: _null(value) for name, value in self.aurac.items()},
            **({"fitted": True} if self.fitted else {}),
            **({"data": self.data} if self.data else {}),
            **({"adapter": self.adapter} if self.adapter else {}),
            "selected_rank": None if self.selected_rank is None else self.selected_rank.to_json(),
            **({"selected_rank_reason": self.selected_rank_reason} if self.selected_rank_reason else {}),
        }

    @classmethod
    def from_json(cls, content: Any, directory: str | None = None) -> RankResults:
        """The way back. Raises ValueError that says what is missing or wrong."""
        if not isinstance(content, dict):
            raise ValueError("it holds no table")
        missing = [name for name in ("task", "method", "metric", "splits") if name not in content]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}")
        if not isinstance(content["splits"], dict) or not content["splits"]:
            raise ValueError("it has no splits")
        if not isinstance(content.get("data") or {}, dict):
            raise ValueError("its data are no table")
        splits = {}
        for name, rows in content["splits"].items():
            if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"its split {name!r} has no rows")
            of_ranks = [RankRow.from_json(row) for row in rows]
            ranks = [row.rank for row in of_ranks]
            if ranks != sorted(set(ranks)):
                raise ValueError(f"the ranks of its split {name!r} do not rise: {ranks}")
            if any(
                row.scores.keys() != of_ranks[0].scores.keys()
                or (row.loss is None if content["metric"] == "loss" else content["metric"] not in row.scores)
                for row in of_ranks
            ):
                raise ValueError(f"its split {name!r} lacks {content['metric']!r} at some rank")
            splits[name] = of_ranks
        chosen = content.get("selected_rank")
        if chosen is not None:
            kept = {name: chosen.get(name) for name in ("rank", "rule", "standard_error", "split")}
            chosen = Choice(**{**kept, "score": _number("score", chosen.get("score"))})
        given = {"splits", "selected_rank", "metrics", "aurac", "directory", "data"}
        plain = {f.name: content[f.name] for f in fields(cls) if f.name in content and f.name not in given}
        return cls(
            **plain,
            splits=splits,
            selected_rank=chosen,
            metrics=tuple(content.get("metrics") or ()),
            aurac={name: _number("aurac", value) for name, value in (content.get("aurac") or {}).items()},
            data=content.get("data") or {},
            directory=directory,
        )

    @classmethod
    def read(cls, path: str | Path) -> RankResults:
        """The result in a run's output directory (or the file itself).

        Raises FileNotFoundError or ValueError with one sentence.
        """
        directory = Path(path)
        file = directory / FILE if directory.is_dir() else directory
        if not file.exists():
            raise FileNotFoundError(f"{path} holds no {FILE}; give the output directory of a run with --do_eval.")
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")), str(file.parent))
        except (ValueError, TypeError, AttributeError) as error:  # JSON's own and Unicode's errors are ValueErrors
            raise ValueError(f"{file} is no result of a run ({error}); run the evaluation again.") from None


def _null(value: float) -> float | None:
    """JSON has no nan and no infinity: null instead."""
    return float(value) if math.isfinite(value) else None


def _finite(value: float) -> float:
    """Nan for an infinite number, of which tables, curves and JSON make nothing."""
    return value if math.isfinite(value) else math.nan


def _number(name: str, value) -> float:
    """A finite number; null is nan."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}; a finite number or null is wanted")
    return float(value)
