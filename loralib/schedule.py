"""How ranks are trained, as one value: from the flag to the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Literal, TypeGuard, TypeVar, get_args

import torch
from torch import nn

from .checks import check_int, is_number
from .gate import SCALINGS, check_rank
from .layout import examples_in
from .model import lora_layers, max_rank, scaling_of, set_rank
from .pacing import set_paces, usual_paces
from .sampling import RankSampler
from .setting import Setting
from .sharding import at_rest
from .strengths import forget_strengths

T = TypeVar("T")
Sampling = Literal["example", "step", "matryoshka", "fixed"]
Distribution = Literal["uniform", "geometric", "mixed", "halving"]
Reduce = Literal["sum", "mean"]
FULL_RANK_SHARE = 0.8
# What files always tell of a schedule.
FACTS = ("sampling", "distribution", "r_min", "full_rank_share", "frozen", "paced")


@dataclass(frozen=True)
class RankSchedule:
    """What training does with ranks. A schedule checks itself; ``resolve`` binds it to an adapter and a number of
    steps.

    The default, without any argument, is level with the best that was tried (results/study; at rank 1 "halving" with
    ``full_rank_share=0.3`` is above it): the first 0.8 of the updates train all
    components together, as plain LoRA does; then ``order_components`` sorts them by importance, and from there on a
    third of the examples run at rank 1 and the others through the mean of the gates of ranks 1, 2, 4, .. r_max.

    Args:
        sampling: "example" (each example of an update its own rank or mixture of ranks), "step" (one rank for an
            update, as in the paper), "matryoshka" (one fixed gate, the sum or mean of several ranks'), "fixed" (r_max:
            plain LoRA).
        distribution: how ranks are drawn: "uniform", "geometric", "halving" or "mixed", see ``RankSampler``. None:
            "mixed" where each example has its own rank, components were ordered before and nothing is frozen; else
            "uniform".
        paced: once ranks are drawn, component k learns min(r_max, 8)/k times as fast, and never slower than usual, see
            ``pace_components``. None: where the distribution is "halving" and the scaling "alpha/r".
        p: parameter of the geometric distribution, between 0 and 1.
        r_min: the lowest rank that is trained, 1 or more.
        full_rank_share: the share of the updates, 0 to below 1, that trains all components together before they are
            ordered and ranks are drawn. None: 0.8 where ranks are drawn and the scaling is "alpha/r", else 0, the
            paper's way: components are ordered at one strength, and under another rule low ranks would run at another.
        frozen: update component b alone (paper, eq. 10).
        reduce: "sum" (MatryoshkaLoRA) or "mean" of the gates; "matryoshka" only.
        gate_ranks: the ranks whose gates are combined, default r_min..r_max; "matryoshka" only.
        seed: any int; the same seed draws the same ranks. None: 0, and under a trainer its seed.

    Raises ValueError for a value that is not allowed, or that has no effect beside the others.
    """

    sampling: Sampling = "example"
    distribution: Distribution | None = None
    p: float = 0.15
    r_min: int = 1
    full_rank_share: float | None = None
    frozen: bool = False
    reduce: Reduce | None = None
    gate_ranks: tuple[int, ...] | None = None
    seed: int | None = None
    paced: bool | None = None

    def __post_init__(self):
        for name, kinds in (("sampling", Sampling), ("distribution", Distribution), ("reduce", Reduce)):
            value, allowed = getattr(self, name), get_args(kinds)
            if value not in allowed and (value is not None or name == "sampling"):
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")
        check_int("r_min", self.r_min, 1, float("inf"), "the lowest rank is an int of 1 or more.")
        for name, value in (("frozen", self.frozen), ("paced", self.paced)):
            if not isinstance(value, bool) and (name, value) != ("paced", None):
                raise ValueError(f"{name} is {value!r}; give True or False.")
        if not is_number(self.p) or not 0 < self.p < 1:
            raise ValueError(f"p is {self.p!r}; the geometric distribution needs a number between 0 and 1.")
        if self.frozen and not self.draws:
            raise ValueError(f"frozen training needs drawn ranks; sampling={self.sampling!r} draws none.")
        idle = {
            "paced": bool(self.paced) and not self.draws,
            "distribution": self.distribution is not None and not self.draws,
            "r_min": self.r_min != 1 and self.sampling == "fixed",
            "reduce": self.reduce is not None and self.sampling != "matryoshka",
            "gate_ranks": self.gate_ranks is not None and self.sampling != "matryoshka",
        }
        for name, given in idle.items():
            if given:
                raise ValueError(f"{name} has no effect with sampling={self.sampling!r}; leave it out.")
        if self.gate_ranks is not None and not self.gate_ranks:
            raise ValueError("gate_ranks is empty; name the ranks that train, or leave it out for all of them.")
        share = self.full_rank_share
        if share is not None and (isinstance(share, str) or not 0 <= share < 1 or (share and not self.draws)):
            raise ValueError(
                f"full_rank_share is {share!r} with sampling={self.sampling!r}; give 0 to below 1, and 0 where no "
                "ranks are drawn."
            )
        if self.distribution == "mixed" and (self.frozen or self.sampling == "step"):
            raise ValueError(
                "distribution='mixed' trains several ranks at once, each example its own; it goes with "
                "sampling='example', not frozen."
            )

    @classmethod
    def paper(cls, **changes) -> RankSchedule:
        """DyLoRA as its authors released it: one rank for each update, drawn uniformly, frozen. The paper's scaling is
        ``inject(..., scaling="alpha/b")``; ``paper(frozen=False)`` is the variant that its ablation favours."""
        return cls(**{"sampling": "step", "distribution": "uniform", "full_rank_share": 0.0, "frozen": True, **changes})

    @property
    def draws(self) -> bool:
        """Whether ranks are drawn at all."""
        return self.sampling in ("example", "step")

    def resolve(self, r_max: int, scaling: str = "alpha/r", steps: int | None = None) -> BoundSchedule:
        """The schedule of an adapter of rank ``r_max``, every default settled, for a training of ``steps`` updates.

        Without ``steps`` (it is not known yet) the result can tell its title and facts and no settings. Raises
        ValueError for ranks beyond r_max, and for no number of updates.
        """
        check_int("r_max", r_max, 1, float("inf"), "the highest rank is an int of 1 or more.")
        if steps is not None:
            check_int("steps", steps, 1, float("inf"), "a training has an int of 1 update or more.")
        if scaling not in (*SCALINGS, "several"):  # what ``scaling_of`` tells of a model
            raise ValueError(f"scaling is {scaling!r}; choose one of {', '.join(map(repr, SCALINGS))}.")
        share = self.full_rank_share
        if share is None:
            share = FULL_RANK_SHARE if self.draws and scaling == "alpha/r" else 0.0
        distribution = self.distribution
        if distribution is None and self.draws:
            mixed = self.sampling == "example" and share and not self.frozen
            distribution = "mixed" if mixed else "uniform"
        paced = self.paced if self.paced is not None else distribution == "halving" and scaling == "alpha/r"
        settled = replace(
            self,
            full_rank_share=share,
            distribution=distribution,
            reduce=(self.reduce or "sum") if self.sampling == "matryoshka" else None,
            paced=paced,
        )
        return BoundSchedule(settled, r_max, steps, scaling)


@dataclass(frozen=True)
class BoundSchedule:
    """A schedule whose defaults are settled (``RankSchedule.resolve``): what each step sets, how tables call it."""

    schedule: RankSchedule
    r_max: int
    steps: int | None = None
    scaling: str = "alpha/r"  # the rule that the defaults were settled for

    def __post_init__(self):
        if not 1 <= self.schedule.r_min <= self.r_max:
            raise ValueError(f"r_min is {self.schedule.r_min} and r_max {self.r_max}; they need 1 <= r_min <= r_max.")
        for rank in self.schedule.gate_ranks or ():
            check_rank(rank, self.r_max)

    @property
    def full_steps(self) -> int:
        """How many updates, from the first on, train all components together."""
        if self.steps is None:
            raise ValueError("The schedule knows no number of steps; give it: resolve(r_max, scaling, steps).")
        return min(round((self.schedule.full_rank_share or 0) * self.steps), self.steps - 1)

    def sampler(self) -> RankSampler:
        """What draws the ranks."""
        kind = self.schedule
        per = "step" if kind.sampling == "step" else "example"
        return RankSampler(self.r_max, kind.r_min, kind.distribution or "uniform", kind.p, per, kind.seed or 0)

    def setting(
        self,
        step: int,
        size: int,
        micro_step: int = 0,
        process: int = 0,
        places: Sequence[int] | None = None,
        ordered: bool | None = None,
    ) -> Setting:
        """What the model is to be set to for one micro-batch of update ``step`` (from 0).

        Args:
            size: examples in the micro-batch; with ``places``, in the whole update.
            micro_step: which micro-batch of the update, from 0.
            process: on which process; each micro-batch of each process draws for itself.
            places: where the micro-batch's examples stand in the update. Ranks are then drawn for the whole update and
                cut, so that they do not depend on how it is split.
            ordered: whether components were ordered already. None: they are at the first micro-batch after
                ``full_steps``.
        """
        kind = self.schedule
        if kind.sampling == "matryoshka":
            ranks = kind.gate_ranks or tuple(range(kind.r_min, self.r_max + 1))
            return Setting(gate_ranks=ranks, reduce=kind.reduce or "sum")
        if kind.sampling == "fixed":
            return Setting(self.r_max)
        full_steps = self.full_steps
        first_part = step < full_steps
        due = step == full_steps and micro_step == 0 if ordered is None else not first_part and not ordered
        rank: int | torch.Tensor
        if first_part:
            rank = self.r_max if kind.sampling == "step" else torch.full((size,), self.r_max, device="cpu")
        else:
            # With places one draw serves all micro-batches and processes.
            rank = self.sampler()(step, size, *((micro_step, process) if places is None else ()))
        if places is not None and isinstance(rank, torch.Tensor):
            rank = rank[list(places) or [0]]
        paces = usual_paces(self.r_max, kind.r_min) if kind.paced else None
        if paces and first_part:
            paces = (1.0,) * self.r_max  # as usual; an optimizer that knows no paces is refused from the start
        return Setting(rank, kind.frozen and not first_part, order=bool(kind.full_rank_share) and due, paces=paces)

    def over(
        self,
        batches: Iterable[T],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        epochs: int = 1,
        accumulate: int = 1,
    ) -> Iterator[T]:
        """All batches of a training, ``epochs`` times, the model set for each: for a loop of one's own.

            schedule = lora.RankSchedule().resolve(r_max=8)
            for x, y in schedule.over(batches, model, optimizer, epochs=3):
                loss = ...

        However the loop ends, the model then runs at r_max. A batch has as many examples as its first tensor has rows.
        Under torch.distributed each process draws for itself.

        Args:
            optimizer: its momenta are turned along when the components are ordered, and its steps are where components
                learn at paces of their own.
            accumulate: batches to an update.

        Raises ValueError if the schedule was resolved for another r_max or scaling than the model's or for another
        number of updates than these, if neither it nor ``batches`` tells that number, if ``optimizer`` holds
        nothing of the adapter, and if it is not given and the schedule is paced.
        """
        check_int("accumulate", accumulate, 1, math.inf, "give the batches to an update, 1 or more.")
        check_int("epochs", epochs, 1, math.inf, "give how often the batches come, 1 or more.")
        found = max_rank(model), scaling_of(model)
        if found != (self.r_max, self.scaling):
            raise ValueError(
                f"The schedule was resolved for r_max {self.r_max} and scaling {self.scaling!r}, and the model has "
                f"{found[0]} and {found[1]!r}; give these to resolve."
            )
        at_rest(model)
        own = {id(factor) for _, layer in lora_layers(model) for factor in (layer.lora_A, layer.lora_B)}
        groups = [] if optimizer is None else optimizer.param_groups
        if groups and not any(id(parameter) in own for group in groups for parameter in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__} holds no parameter of the adapter: make it after inject, of what trains."
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        process = torch.distributed.get_rank() if distributed else 0
        bound, updates = self, None
        if _has_length(batches):
            updates = math.ceil(len(batches) * epochs / accumulate)
            bound = replace(self, steps=self.steps or updates)
            bound._check_updates(updates)
        number = 0
        forget_strengths(model)
        setattr(model, "lora_trained", bound.facts())  # noqa: B010  # plain data, which adapters are saved with
        try:
            for _ in range(epochs):
                for batch in batches:
                    place = number // accumulate, examples_in(batch), number % accumulate, process
                    bound.setting(*place).apply(model, optimizer)
                    number += 1
                    yield batch
        finally:
            set_rank(model, self.r_max)
            if optimizer is not None and self.schedule.paced:
                set_paces(optimizer, model, None)
        bound._check_updates(math.ceil(number / accumulate))

    def _check_updates(self, updates: int) -> None:
        if updates != self.steps:
            raise ValueError(
                f"The schedule was resolved for {self.steps} updates, and the batches make {updates}; give over() "
                f"those of the whole training, or resolve it for {updates}."
            )

    def title(self) -> str:
        """What tables and legends call this training."""
        kind = self.schedule
        if kind.sampling == "fixed":
            return f"LoRA trained at rank {self.r_max}"
        if kind.sampling == "matryoshka":
            ranks = "all ranks" if kind.gate_ranks is None else f"ranks {_listed(kind.gate_ranks)}"
            return f"one fixed gate, the {kind.reduce} over {ranks}"
        if kind.distribution == "mixed":
            ladder = [b for b in self.sampler().ladder() if b != kind.r_min]
            how = f"rank {kind.r_min} or ranks {_listed([kind.r_min, *ladder])} together"
        elif kind.distribution == "halving":
            *lower, top = self.sampler().ladder()
            how = "" if kind.sampling == "example" else "a rank for each update, "
            how += f"rank {top} half of the time, else {_listed(lower, 'or')}" if lower else f"rank {top}"
        else:
            often = ", low ones more often" if kind.distribution == "geometric" else ""
            how = f"a rank for each {'example' if kind.sampling == 'example' else 'update'}{often}"
        how += ", one component updated (frozen)" if kind.frozen else ""
        how += ", first components faster" if kind.paced else ""
        share = kind.full_rank_share
        if not share:
            return f"DyLoRA, {how}"
        when = "half-way" if share == 0.5 else f"after {100 * share:g} % of the steps"
        return f"DyLoRA, components ordered {when}, then {how}"

    def facts(self) -> dict:
        """The settled settings, as ``dylora.json`` and ``rank_results.json`` tell them."""
        kind = self.schedule
        facts = {name: getattr(kind, name) for name in FACTS}
        told_apart = {
            "p": kind.distribution == "geometric" and kind.p != RankSchedule.p,
            "reduce": kind.reduce == "mean",
            "gate_ranks": kind.gate_ranks is not None,
        }
        return facts | {name: getattr(kind, name) for name, tell in told_apart.items() if tell}


def _has_length(batches: Iterable) -> TypeGuard[Sized]:
    """Whether it tells how many it holds: a DataLoader of an IterableDataset has the method and raises TypeError."""
    try:
        return isinstance(batches, Sized) and len(batches) >= 0
    except TypeError:
        return False


def _listed(ranks: Sequence[int], word: str = "and") -> str:
    """1, 2, 4 and 8."""
    *first, last = map(str, ranks)
    return f"{', '.join(first)} {word} {last}" if first else last
