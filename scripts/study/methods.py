"""What the study compares: each method is a few settings of DyLoRATrainer, or a variant of it that was tried.

The published methods, ``ordered`` and our default need nothing but the trainer's own arguments (and MatryoshkaLoRA the
ranks of its gate). What else was tried (``weights``, ``distil``, ...) lives here and not in the library.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import loralib as lora
from loralib.gate import scale
from loralib.model import lora_layers
from loralib.schedule import Setting
from loralib.trainer import DyLoRATrainer

R_MAX, ALPHA = 8, 16
SHOWN = (1, 2, 4, 8)  # the ranks that are measured
# Ranks drawn for each example from the first step on, and after half of the training at r_max and the ordering.
DRAWN = lora.RankSchedule(distribution="uniform", full_rank_share=0.0)
ORDERED = replace(DRAWN, full_rank_share=0.5)
MIXED = replace(ORDERED, distribution="mixed")
GATE = lora.RankSchedule("matryoshka")
POWERS_SUMMED = replace(GATE, gate_ranks=(1, 2, 4, 8))
PLAIN = lora.RankSchedule("fixed")


@dataclass(frozen=True)
class Method:
    """How an adapter is trained.

    ``title`` is how the tables call it. ``r`` is the adapter's r_max; ``ranks`` those it is measured at.
    """

    title: str
    schedule: lora.RankSchedule = DRAWN
    r: int = R_MAX
    alpha: float = ALPHA
    scaling: str = "alpha/b"
    group_by_length: bool = True
    # Variants that were tried; each is a no-op at its default.
    weights: tuple[float, ...] = ()  # draw ranks 1..r with these weights, evenly: each takes its share of every update
    anneal: bool = False  # draw from the top rank alone at first, and reach ``weights`` (or uniform) half-way
    distil: float = 0.0  # weight of the divergence from the same batch's logits at r_max (no gradient through these)
    rate_B: float = 1.0  # learning rate of lora_B relative to all else (LoRA+)
    orthogonal: bool = False  # start lora_A with orthogonal rows of the same length
    strengths: tuple[float, ...] = ()  # one strength for each component, whatever the rank
    gate_after: tuple[int, ...] = ()  # once the components are ordered: the mean of these ranks' gates, nothing drawn
    wide_A: bool = False  # lora_A drawn with a bound of 1/sqrt(r) in place of 1/sqrt(in): MatryoshkaLoRA's release
    # Once the components are ordered, groups of examples: each group's share of the update, and its weights of ranks.
    tail: tuple[tuple[float, dict[int, float]], ...] = ()
    by_cost: float = 0.0  # the rest of the tail's share goes to ranks 1, 2 and 4 by what the cut costs at the ordering

    @property
    def shares_trunk(self) -> bool:
        """Whether the first part of the training is that of lora-8, so that it may go on from its checkpoint."""
        return bool(self.schedule.full_rank_share) and (self.r, self.strength) == (R_MAX, ALPHA / R_MAX)

    @property
    def strength(self) -> float:
        """The update's factor at r_max."""
        return scale(self.r, self.r, self.alpha, self.scaling)

    @property
    def ranks(self) -> list[int]:
        return [self.r] if self.schedule.sampling == "fixed" else [b for b in SHOWN if b <= self.r]


ALL_POWERS = dict.fromkeys((1, 2, 4, 8), 1 / 4)
UNIFORM = (1.0,) * R_MAX
ENDS = (3, 1, 1, 1, 1, 1, 1, 3)
POWERS = (1, 1, 0, 1, 0, 0, 0, 1)
PARTS = ORDERED.full_rank_share, 0.7, 0.8, 0.9  # where lora-8 leaves checkpoints for what goes on from them
CONSTANT = dict(scaling="alpha/r", alpha=48)  # strength 6 at every rank
CONSTANT_2 = dict(scaling="alpha/r", alpha=16)  # the strength of a LoRA of rank 8 with alpha 16

METHODS = {
    **{
        name: Method(f"LoRA trained at rank {r}, strength {alpha / r:g}", PLAIN, r=r, alpha=alpha, scaling="alpha/r")
        for name, r, alpha in [
            *((f"lora-{r}", r, ALPHA) for r in (1, 2, 4, 8)),
            *((f"lora-{r}-strength-2", r, 2 * r) for r in (1, 2, 4)),
        ]
    },
    "released": Method("DyLoRA as released (per step, frozen)", lora.RankSchedule.paper()),
    "step": Method("DyLoRA, per step", replace(DRAWN, sampling="step")),
    "step-geometric": Method(
        "DyLoRA, per step, geometric 0.15", replace(DRAWN, sampling="step", distribution="geometric")
    ),
    "example": Method("DyLoRA, per example"),
    **{
        f"matryoshka-{name}": Method(
            f"MatryoshkaLoRA, scale {name}", POWERS_SUMMED, alpha=alpha, scaling=scaling, wide_A=True
        )
        for name, alpha, scaling in [("1", R_MAX, "alpha/r"), ("1/r", 1, "alpha/b"), ("1/sqrt(r)", 1, "alpha/sqrt(b)")]
    },
    "matryoshka-mean": Method("fixed gate, mean with alpha/b", replace(GATE, reduce="mean")),
    "ordered": Method("DyLoRA, half at r_max, ordered, then per example", ORDERED, **CONSTANT_2),
    "mixed": Method("DyLoRA, half at r_max, ordered, then mixed", MIXED, **CONSTANT_2),
    "mixed-0.8": Method(
        "DyLoRA, 0.8 at r_max, ordered, then mixed (our default)", replace(MIXED, full_rank_share=0.8), **CONSTANT_2
    ),
}
DEFAULT = "mixed-0.8"  # what run_glue.py does without flags
# Together one method: at each of these ranks a LoRA that was trained for it, at one of these strengths.
SWEEP = {
    r: [name for name, method in METHODS.items() if method.schedule == PLAIN and method.r == r] for r in (1, 2, 4, 8)
}


# Together one method too, LoRA-Squeeze (arXiv 2602.10993) at our settings: the first 0.8 of the training are those of
# lora-8, then the update is reduced by SVD to one rank and the rest trains that rank alone.
SQUEEZE = {1: "squeeze-1", 2: "squeeze-2", 4: "squeeze-4", 8: "lora-8"}


@dataclass(frozen=True)
class Cut:
    """What a trained adapter gives at the lower ranks, without training on: made from each run of the method ``of``.

    ``by``: "rank" (the same in every layer), or what chooses as many components as at rank b over all layers:
    "importance", "values" (one threshold on singular values: PARA, arXiv 2604.27796) or "energy" (one share of each
    layer's squared singular values: PEFT's ``convert_to_lora`` with a threshold).
    """

    title: str
    of: str = "lora-8"
    by: str = "rank"


CUTS = {
    "cut-alpha/b": Cut("LoRA trained at rank 8, cut, alpha/b"),
    "cut-alpha/r": Cut("LoRA trained at rank 8, cut, alpha/r"),
    "cut-svd": Cut("LoRA trained at rank 8, reduced by SVD"),
    "cut-values": Cut("LoRA trained at rank 8, one threshold on all singular values (PARA)", by="values"),
    "cut-energy": Cut("LoRA trained at rank 8, one share of energy (convert_to_lora, threshold)", by="energy"),
    "cut-fisher": Cut("LoRA trained at rank 8, components kept by Fisher information over all layers", by="importance"),
    "mixed-0.8-fisher": Cut(
        "our default, components kept by Fisher information over all layers", "mixed-0.8", "importance"
    ),
}
TRIED = {
    **{
        name: Method(
            f"LoRA of rank 8 to 0.8 of the training, SVD, then rank {b} alone",
            replace(ORDERED, full_rank_share=0.8),
            tail=((1.0, {b: 1.0}),),
            **CONSTANT_2,
        )
        for b, name in SQUEEZE.items()
        if b < R_MAX
    },
    "matryoshka-sum": Method(
        "fixed gate, sum over ranks 1, 2, 4, 8, alpha/sqrt(b)", POWERS_SUMMED, scaling="alpha/sqrt(b)"
    ),
    "ordered-0.3": Method("ordered after 0.3 of the training", replace(ORDERED, full_rank_share=0.3), **CONSTANT_2),
    "ordered-0.7": Method("ordered after 0.7 of the training", replace(ORDERED, full_rank_share=0.7), **CONSTANT_2),
    "ordered-geometric": Method(
        "ordered, ranks drawn evenly, geometric 0.3",
        ORDERED,
        weights=tuple(0.7**b for b in range(R_MAX)),
        **CONSTANT_2,
    ),
    **{
        f"mixed-{share}": Method(
            f"ordered after {share} of the training, then mixed", replace(MIXED, full_rank_share=share), **CONSTANT_2
        )
        for share in (0.7, 0.9)
    },
    **{
        f"{name}-{share}": Method(
            f"ordered after {share} of the training, then {how}",
            replace(ORDERED, full_rank_share=share),
            tail=tail,
            by_cost=1 - sum(part for part, _ in tail),
            **CONSTANT_2,
        )
        for share in (0.7, 0.8, 0.9)
        for name, how, tail in [
            (
                "thirds",
                "thirds of the examples at rank 1, at 1, 2, 4, 8 at once and at 8",
                ((1 / 3, {1: 1.0}), (1 / 3, ALL_POWERS), (1 / 3, {8: 1.0})),
            ),
            ("halves", "halves at 1, 2, 4, 8 at once and at 8", ((1 / 2, ALL_POWERS), (1 / 2, {8: 1.0}))),
            ("by-cost", "half at 8 and half at 1, 2, 4 by what the cut costs", ((1 / 2, {8: 1.0}),)),
        ]
    },
    "ordered-even": Method("ordered, ranks drawn evenly", ORDERED, weights=UNIFORM, **CONSTANT_2),
    "ordered-ends": Method("ordered, ranks 1 and 8 more often", ORDERED, weights=ENDS, **CONSTANT_2),
    "ordered-powers": Method("ordered, ranks 1, 2, 4, 8 alone", ORDERED, weights=POWERS, **CONSTANT_2),
    "ordered-alpha/b": Method("ordered, alpha/b", ORDERED),
    "ordered-4": Method("ordered, one strength 4", ORDERED, scaling="alpha/r", alpha=32),
    "ordered-8": Method("ordered, one strength 8", ORDERED, scaling="alpha/r", alpha=64),
    "ordered-gate": Method(
        "ordered, then fixed gate, mean", ORDERED, gate_after=tuple(range(1, R_MAX + 1)), **CONSTANT_2
    ),
    "ordered-gate-powers": Method(
        "ordered, then fixed gate, mean of ranks 1, 2, 4, 8",
        ORDERED,
        gate_after=(1, 2, 4, 8),
        **CONSTANT_2,
    ),
    "ordered-distil": Method("ordered, then distilled", ORDERED, distil=1.0, **CONSTANT_2),
    "ordered-0.7-ends": Method(
        "ordered after 0.7 of the training, ranks 1 and 8 more often",
        replace(ORDERED, full_rank_share=0.7),
        weights=ENDS,
        **CONSTANT_2,
    ),
    **{
        f"strengths-{name}": Method(
            f"per example, component k at strength {title}", weights=weights, strengths=strengths, scaling="alpha/r"
        )
        for name, title, weights, strengths in [
            ("1/k", "16/k", UNIFORM, tuple(16 / k for k in range(1, 9))),
            ("linear", "6 (9 - k)/8", UNIFORM, tuple(6 * (9 - k) / 8 for k in range(1, 9))),
            ("ends-1/k", "16/k, ranks 1 and 8 more often", ENDS, tuple(16 / k for k in range(1, 9))),
            ("ends-sqrt", "8/sqrt(k), ranks 1 and 8 more often", ENDS, tuple(8 / k**0.5 for k in range(1, 9))),
        ]
    },
    "even": Method("per example, evenly", weights=UNIFORM),
    "even-sqrt": Method("per example, evenly, alpha/sqrt(b)", weights=UNIFORM, scaling="alpha/sqrt(b)"),
    "even-constant": Method("per example, evenly, one strength 6", weights=UNIFORM, **CONSTANT),
    "even-constant-2": Method("per example, evenly, one strength 2", weights=UNIFORM, **CONSTANT_2),
    "ends-constant-2": Method("per example, ranks 1 and 8 more often, one strength 2", weights=ENDS, **CONSTANT_2),
    "distil-constant-2": Method(
        "per example, evenly, distilled, one strength 2", weights=UNIFORM, distil=1.0, **CONSTANT_2
    ),
    "even-constant-16": Method("per example, evenly, one strength 16", weights=UNIFORM, scaling="alpha/r", alpha=128),
    "ends": Method("per example, ranks 1 and 8 more often", weights=ENDS),
    "ends-constant": Method("per example, ranks 1 and 8 more often, one strength 6", weights=ENDS, **CONSTANT),
    "powers-constant": Method("per example, ranks 1, 2, 4, 8 alone, one strength 6", weights=POWERS, **CONSTANT),
    "top-constant": Method("per example, rank 8 more often, one strength 6", weights=(1,) * 7 + (5,), **CONSTANT),
    "anneal-constant": Method(
        "per example, from rank 8 to all, one strength 6", weights=UNIFORM, anneal=True, **CONSTANT
    ),
    "distil-constant": Method(
        "per example, evenly, distilled, one strength 6", weights=UNIFORM, distil=1.0, **CONSTANT
    ),
    "plus-constant": Method(
        "per example, evenly, LoRA+ (B 4 times), one strength 6", weights=UNIFORM, rate_B=4.0, **CONSTANT
    ),
    "orthogonal-constant": Method(
        "per example, evenly, orthogonal A, one strength 6", weights=UNIFORM, orthogonal=True, **CONSTANT
    ),
    "shuffled-constant": Method(
        "per example, evenly, one strength 6, no grouping by length", weights=UNIFORM, group_by_length=False, **CONSTANT
    ),
    "mean-constant": Method("fixed gate, mean, one strength 6", replace(GATE, reduce="mean"), **CONSTANT),
}


def even_draw(weights, n: int, seed: str) -> torch.Tensor:
    """n ranks, rank b about n * weights[b - 1] / sum(weights) times, at most one more or less; their order is
    random."""
    import random

    draw = random.Random(seed)
    edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64) + draw.random()) / n * edges[-1]
    ranks = (torch.searchsorted(edges, points, right=True) + 1).clamp(max=len(weights)).tolist()
    draw.shuffle(ranks)
    return torch.tensor(ranks)


@dataclass(frozen=True)
class AtStrengths(Setting):
    """Ranks whose components have strengths of their own, whatever the rank."""

    strengths: tuple[float, ...] = ()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().apply(model, optimizer)
        if self.strengths:
            lora.set_gate(
                model, (torch.arange(len(self.strengths)) < self.rank[:, None]) * torch.tensor(self.strengths)
            )


class StudyTrainer(DyLoRATrainer):
    """DyLoRATrainer with the variants of a ``Method``."""

    def __init__(self, method: Method, **options):
        super().__init__(
            schedule=method.schedule, eval_ranks=method.ranks, group_by_length=method.group_by_length, **options
        )
        self.method = method
        if method.orthogonal:
            for _, layer in lora_layers(self.model):
                length = layer.lora_A.detach().norm() / layer.r**0.5
                nn.init.orthogonal_(layer.lora_A, gain=float(length))
        if method.wide_A:
            self.widen(self.model)
        self.groups: list[tuple[float, dict[int, float]]] = []  # the tail, settled at the ordering

    @staticmethod
    @torch.no_grad()
    def widen(model: nn.Module) -> None:
        """lora_A as if drawn with a bound of 1/sqrt(r) in place of 1/sqrt(in)."""
        for _, layer in lora_layers(model):
            layer.lora_A *= (layer.lora_A.shape[1] / layer.r) ** 0.5

    def draws_by_now(self) -> bool:
        """Whether the part at r_max is over."""
        return self.state.global_step >= self.bound.full_steps

    def training_setting(self, batch_size: int) -> Setting:
        setting, method = super().training_setting(batch_size), self.method
        if not self.draws_by_now():
            return setting
        if method.gate_after:
            return replace(setting, gate_ranks=method.gate_after, reduce="mean")
        if method.tail:
            if setting.order or not self.groups:
                self.groups = [*method.tail, *self.groups_by_cost(setting.order)]
            return Setting(self.group_weights(), order=setting.order)
        if method.weights:
            return AtStrengths(self.even_ranks(), order=setting.order, strengths=method.strengths)
        return setting

    def groups_by_cost(self, order: bool) -> list[tuple[float, dict[int, float]]]:
        """Ranks below r_max, each with a share in proportion to its loss above that of r_max, on a few training
        batches."""
        if not self.method.by_cost:
            return []
        if order:
            lora.order_components(
                self.model, self.optimizer
            )  # again by the setting: of what is ordered nothing changes
        losses = dict.fromkeys((1, 2, 4, 8), 0.0)
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for _, batch in zip(
                range(8),
                super().get_eval_dataloader(self.train_dataset.select(range(min(512, len(self.train_dataset))))),
                strict=False,
            ):
                for b, output in lora.at_ranks(self.model, batch, list(losses)):
                    losses[b] += float(output.loss)
        self.model.train(training)
        cost = {b: max(loss - losses[8], 1e-9) for b, loss in losses.items() if b != 8}
        return [(self.method.by_cost * value / sum(cost.values()), {b: 1.0}) for b, value in cost.items()]

    def group_weights(self) -> torch.Tensor:
        """The micro-batch's part of the update's examples, each with its group's weights of ranks."""
        rows = torch.zeros(len(self.groups), self.method.r)
        for row, (_, weights) in zip(rows, self.groups, strict=True):
            for b, weight in weights.items():
                row[b - 1] = weight
        shares = [share for share, _ in self.groups]
        drawn = even_draw(shares, self.place.size(0), f"{self.args.seed}:{self.state.global_step}")
        return rows[drawn - 1][list(self.place.places())]

    def even_ranks(self) -> torch.Tensor:
        """The micro-batch's part of the even draw for the update."""
        weights, step = list(self.method.weights), self.state.global_step
        if self.method.anneal:
            share = min(1.0, 2 * step / self.state.max_steps)
            weights = [w * share for w in weights[:-1]] + [weights[-1] + (1 - share) * sum(weights[:-1])]
        return even_draw(weights, self.place.size(0), f"{self.args.seed}:{step}")[list(self.place.places())]

    def train(self, *args, **kwargs):
        """As the library's; then own strengths of the components become part of lora_B."""
        output = super().train(*args, **kwargs)
        if self.method.strengths:
            with torch.no_grad():
                for _, layer in lora_layers(self.model):
                    layer.lora_B *= torch.tensor(self.method.strengths) / layer.strength()
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and self.method.distil and self.draws_by_now():
            with torch.no_grad(), lora.use_rank(model, self.method.r):
                full = super().compute_loss(model, inputs, True, num_items_in_batch)[1].logits
            own = F.log_softmax(outputs.logits.float(), -1)
            loss = loss + self.method.distil * F.kl_div(
                own, F.log_softmax(full.float(), -1), log_target=True, reduction="batchmean"
            )
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args, **kwargs):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self.method.rate_B != 1:
            B = {id(p) for name, p in self.model.named_parameters() if name.endswith("lora_B")}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in B]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in B]
                    optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self.method.rate_B})
        return optimizer
