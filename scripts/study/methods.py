"""What the study compares: each method is a few settings of DyLoRATrainer, or of a peer.

The published methods, ``ordered`` and our default need nothing but the trainer's own arguments (and MatryoshkaLoRA the
ranks of its gate). What else was tried stands in tried.py.
"""

from dataclasses import dataclass, replace

import loralib as lora
from loralib.gate import scale

R_MAX, ALPHA = 8, 16


def shown_up_to(r_max: int) -> tuple[int, ...]:
    """The ranks that are measured: powers of two."""
    return tuple(2**k for k in range(r_max.bit_length()))


SHOWN = shown_up_to(R_MAX)
# Ranks drawn for each example from the first step on, and after half of the training at r_max and the ordering.
DRAWN = lora.RankSchedule(distribution="uniform", full_rank_share=0.0)
ORDERED = replace(DRAWN, full_rank_share=0.5)
MIXED = replace(ORDERED, distribution="mixed")
HALVING = replace(ORDERED, distribution="halving", full_rank_share=0.3, paced=True)
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
    rank_1_first: float = 0.0  # before ``weights``: the share of the training at rank 1 alone
    anneal: bool = False  # draw from the top rank alone at first, and reach ``weights`` (or uniform) half-way
    distil: float = 0.0  # weight of the divergence from the same batch's logits at r_max (no gradient through these)
    rate_B: float = 1.0  # learning rate of lora_B relative to all else (LoRA+)
    orthogonal: bool = False  # start lora_A with orthogonal rows of the same length
    strengths: tuple[float, ...] = ()  # one strength for each component, whatever the rank
    learn: tuple[float, ...] = ()  # once ranks are drawn: how much faster each component's lora_B learns
    paces: tuple[float, ...] = ()  # once the components are ordered: how much faster each one's lora_B learns
    stretch: tuple[float, ...] = ()  # once the components are ordered: how much longer each one's row of lora_A is
    skew: tuple[float, ...] = ()  # up to the ordering: how much stronger each component is
    lengths: tuple[float, ...] = ()  # how much longer each component's row of lora_A starts
    gate_after: tuple[int, ...] = ()  # once the components are ordered: the mean of these ranks' gates, nothing drawn
    wide_A: bool = False  # lora_A drawn with a bound of 1/sqrt(r) in place of 1/sqrt(in): MatryoshkaLoRA's release
    # Once the components are ordered, groups of examples: each group's share of the update, and its weights of ranks.
    tail: tuple[tuple[float, dict[int, float]], ...] = ()
    tail_end: tuple[float, ...] = ()  # the groups' shares at the end, to which they move evenly
    again: tuple[float, ...] = ()  # after which shares of the training the components are ordered once more
    by_cost: float = 0.0  # the rest of the tail's share goes to ranks 1, 2 and 4 by what the cut costs at the ordering
    adalora: bool = False  # r is what a layer has in the end, on average

    def at(self, r_max: int) -> "Method":
        """This method of r_max 8 for another: as strong with "alpha/r", and a gate over as many powers of two.

        A LoRA of a lower rank is trained for that rank alone and stays as it is. Raises ValueError for a variant that
        is written down for 8 components.
        """
        if r_max == R_MAX or self.r < R_MAX:
            return self
        faster = self.learn or self.paces or self.stretch
        by_component = self.weights or self.strengths or faster or self.skew or self.lengths
        if by_component or self.gate_after or self.tail or self.adalora:
            raise ValueError(f"{self.title!r} is for r_max {R_MAX} alone.")
        alpha = self.alpha * r_max / R_MAX if self.scaling == "alpha/r" else self.alpha
        ranks = shown_up_to(r_max) if self.schedule.gate_ranks else self.schedule.gate_ranks
        return replace(self, r=r_max, alpha=alpha, schedule=replace(self.schedule, gate_ranks=ranks))

    @property
    def strength(self) -> float:
        """The update's factor at r_max."""
        return scale(self.r, self.r, self.alpha, self.scaling)

    @property
    def ranks(self) -> list[int]:
        return [self.r] if self.schedule.sampling == "fixed" else list(shown_up_to(self.r))


# Where lora-8 leaves checkpoints for what goes on from them.
PARTS = HALVING.full_rank_share, ORDERED.full_rank_share, 0.7, 0.8, 0.9
CONSTANT_2 = dict(scaling="alpha/r", alpha=16)  # the strength of a LoRA of rank 8 with alpha 16

METHODS = {
    **{
        name: Method(f"LoRA r={r}, strength {alpha / r:g}", PLAIN, r=r, alpha=alpha, scaling="alpha/r")
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
    **{
        f"adalora-{b}": Method(f"AdaLoRA, rank {b} on average", PLAIN, r=b, scaling="alpha/r", adalora=True)
        for b in SHOWN
    },
    "ordered": Method("DyLoRA, ordered half-way, then per example", ORDERED, **CONSTANT_2),
    "mixed": Method("DyLoRA, our default ordered half-way", MIXED, **CONSTANT_2),
    "mixed-0.8": Method("DyLoRA (our default)", replace(MIXED, full_rank_share=0.8), **CONSTANT_2),
    "halving": Method(
        "DyLoRA, halving",
        HALVING,
        **CONSTANT_2,
    ),
}
DEFAULT = "mixed-0.8"  # what run_glue.py does without flags
# Together one method: at each of these ranks a LoRA that was trained for it, at one of these strengths.
SWEEP = {
    r: [name for name, made in METHODS.items() if made.schedule == PLAIN and made.r == r and not made.adalora]
    for r in SHOWN
}
PLAIN_SWEEP = {r: names[0] for r, names in SWEEP.items()}  # the sweep, each at strength 16/r
ADALORA = {b: f"adalora-{b}" for b in SHOWN}  # the same with AdaLoRA

# Together one method too, LoRA-Squeeze (arXiv 2602.10993) at our settings: the first 0.8 of the training are those of
# lora-8, then the update is reduced by SVD to one rank and the rest trains that rank alone.
SQUEEZE = {1: "squeeze-1", 2: "squeeze-2", 4: "squeeze-4", 8: "lora-8"}


@dataclass(frozen=True)
class Cut:
    """What a trained adapter gives at the lower ranks, without training on: made from each run of the method ``of``.

    ``by``: "rank" (the same in every layer), or what chooses as many components as at rank b over all layers:
    "importance", "values" (one threshold on singular values: PARA, arXiv 2604.27796), "energy" (one share of each
    layer's squared singular values: PEFT's ``convert_to_lora`` with a threshold) or "whitened" (one threshold on how
    much of the data's input passes). Or what a rank gets for itself on top of "rank": "strengths"
    (``loralib.fit_strengths``) or "heads" (private.py). ``tried``: measured with the leads alone.
    """

    title: str
    of: str = "lora-8"
    by: str = "rank"
    tried: bool = False


CUTS = {
    "cut-svd": Cut("LoRA r=8, reduced by SVD"),
    "cut-values": Cut("LoRA r=8, one threshold (PARA)", by="values"),
    "cut-energy": Cut("LoRA r=8, one share of energy", by="energy"),
    "cut-fisher": Cut("LoRA r=8, by Fisher information", by="importance"),
    "mixed-0.8-fisher": Cut("our default, by Fisher information", "mixed-0.8", "importance"),
    "cut-whitened": Cut("LoRA r=8, one threshold on what the data passes through", by="whitened", tried=True),
    "cut-alpha/b": Cut("LoRA r=8, cut, alpha/b"),
    "cut-alpha/r": Cut("LoRA r=8, cut, alpha/r"),
    **{
        f"{short}-{by}": Cut(f"{title}, {what}", of, by, tried)
        for short, title, of in [
            ("cut", "LoRA r=8, reduced by SVD", "lora-8"),
            ("mixed-0.8", "our default", "mixed-0.8"),
        ]
        for by, what, tried in [
            ("heads", "a head for each rank", True),
            ("strengths", "strengths fitted", False),
        ]
    },
}
