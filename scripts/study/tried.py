"""Variants of a training that were tried; what they do in a step is in trainer.py."""

from dataclasses import replace

from .methods import CONSTANT_2, GATE, HALVING, METHODS, MIXED, ORDERED, POWERS_SUMMED, R_MAX, SQUEEZE, Method

ALL_POWERS = dict.fromkeys((1, 2, 4, 8), 1 / 4)
UNIFORM = (1.0,) * R_MAX
ENDS = (3, 1, 1, 1, 1, 1, 1, 3)
POWERS = (1, 1, 0, 1, 0, 0, 0, 1)
BY_COST = "by-cost", "half at 8 and half at 1, 2, 4 by what the cut costs", ((1 / 2, {8: 1.0}),)
ROOTS = tuple(4 / k**0.5 for k in range(1, 9))
CONSTANT = dict(scaling="alpha/r", alpha=48)  # strength 6 at every rank

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
        f"again-{len(again) + 1}": Method(
            f"ordered after 0.8, {' and '.join(map(str, again))} of the training, mixed from the first on",
            replace(MIXED, full_rank_share=0.8),
            again=again,
            **CONSTANT_2,
        )
        for again in ((0.9,), (0.87, 0.93))
    },
    "rising": Method(
        "ordered after 0.8 of the training, then mixed, rank 1's share of the examples rising from 1/6 to 1/2",
        replace(ORDERED, full_rank_share=0.8),
        tail=((1 / 6, {1: 1.0}), (5 / 6, ALL_POWERS)),
        tail_end=(1 / 2, 1 / 2),
        **CONSTANT_2,
    ),
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
            BY_COST,
        ]
    },
    **{
        f"paces-{name}{after}": Method(
            f"{begun}, component k learns {title} times as fast once ordered",
            replace(MIXED, full_rank_share=share),
            paces=paces,
            **CONSTANT_2,
        )
        for name, title, paces in [
            ("1/k", "8/k", tuple(8 / k for k in range(1, 9))),
            ("sqrt", "4/sqrt(k)", ROOTS),
        ]
        for after, begun, share in [
            ("", "ordered after 0.8 of the training, then mixed", 0.8),
            ("-0.7", "ordered after 0.7 of the training, then mixed", 0.7),
            ("-0.5", "half at r_max, ordered, then mixed", 0.5),
        ]
    },
    **{
        f"{beside}{name}": Method(
            f"ordered after 0.8 of the training, then {how}{what}",
            replace(ORDERED, full_rank_share=0.8),
            tail=tail,
            by_cost=1 - sum(part for part, _ in tail),
            **more,
            **CONSTANT_2,
        )
        for name, how, tail in [
            BY_COST,
            (
                "late",
                "half at 8, 3/8 at 1, 1/10 at 2 and 1/40 at 4",
                ((1 / 2, {8: 1.0}), (3 / 8, {1: 1.0}), (1 / 10, {2: 1.0}), (1 / 40, {4: 1.0})),
            ),
        ]
        for beside, what, more in [
            ("paces-", ", component k 4/sqrt(k) times as fast", {"paces": ROOTS}),
            ("stretched-", ", rows of lora_A 4/sqrt(k) times as long", {"stretch": ROOTS}),
        ]
    },
    **{
        f"skewed-{name}": Method(
            f"ordered after 0.8 of the training, then mixed, component k at strength {title} before",
            replace(MIXED, full_rank_share=0.8),
            skew=skew,
            **CONSTANT_2,
        )
        for name, title, skew in [
            ("1/k", "16/k", tuple(8 / k for k in range(1, 9))),
            ("sqrt", "4/sqrt(k)", tuple(2 / k**0.5 for k in range(1, 9))),
            ("half", "16/2^k", tuple(8 / 2**k for k in range(1, 9))),
        ]
    },
    **{
        f"long-{name}": Method(
            f"ordered after 0.8 of the training, then mixed, rows of lora_A {title} times as long at first",
            replace(MIXED, full_rank_share=0.8),
            lengths=lengths,
            **CONSTANT_2,
        )
        for name, title, lengths in [
            ("1/k", "8/k", tuple(8 / k for k in range(1, 9))),
            ("sqrt", "2/sqrt(k)", tuple(2 / k**0.5 for k in range(1, 9))),
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
    **{
        f"grown-{share}{kind}": Method(
            (f"rank 1 for {share} of the training, then " if share else "from the start ")
            + f"half of the examples at 8, a quarter at 1, the others at 2 and 4, component k at strength {title}",
            weights=(2, 1, 0, 1, 0, 0, 0, 4),
            strengths=strengths,
            rank_1_first=share,
            scaling="alpha/r",
        )
        for share in (0, 0.3, 0.5)
        for kind, title, strengths in [
            ("", "8/sqrt(k)", tuple(8 / k**0.5 for k in range(1, 9))),
            ("-1/k", "16/k", tuple(16 / k for k in range(1, 9))),
        ]
    },
    **{
        f"nested-{share}{kind}": Method(
            f"ordered after {share} of the training, then half of the examples at 8, a quarter at 1, the others at 2 "
            f"and 4, component k {title} times as fast",
            replace(ORDERED, full_rank_share=share),
            weights=(2, 1, 0, 1, 0, 0, 0, 4),
            learn=learn,
            **CONSTANT_2,
        )
        for share in (0.3, 0.5)
        for kind, title, learn in [
            ("-1/k", "8/k", tuple(8 / k for k in range(1, 9))),
            ("-sqrt", "4/sqrt(k)", ROOTS),
            ("-1", "1", (1.0,) * 8),
        ]
    },
    **{
        f"halving-{share:g}": replace(
            METHODS["halving"], title=f"DyLoRA, halving, {begun}", schedule=replace(HALVING, full_rank_share=share)
        )
        for share, begun in [(0.0, "from the first step on"), (0.1, "ordered after 0.1 of the training")]
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


def named(method: str) -> Method:
    return {**METHODS, **TRIED}[method]
