"""How training draws its ranks (the paper's p_B), as a pure function of the step."""

import bisect
import itertools
import math
import random

import torch

from .checks import check_int

DISTRIBUTIONS = ("uniform", "geometric", "mixed", "halving")
LOWEST_SHARE = 1 / 3


class RankSampler:
    """Draws ranks b ~ p_B on {r_min..r_max}: the same ones for the same seed and arguments, on every machine.

    Args:
        r_max: highest rank, 1 or more.
        r_min: lowest rank, 1..r_max.
        distribution: "uniform"; "geometric" with p(b) ~ (1 - p)^(b - r_min), renormalised over the ranks; "halving":
            half at r_max, a quarter at r_min, an eighth at 2 r_min, and so on, the last of r_min, 2 r_min, 4 r_min, ..
            below r_max with what is left, and of the examples of one draw each rank's share as nearly as can be; or
            "mixed": a third of the examples, chosen at random, at r_min, and each of the others at the ranks r_min,
            2 r_min, 4 r_min, .. r_max at once, in equal parts. What comes back is then a float tensor of weights (see
            ``set_rank``).
        p: parameter of the geometric distribution, between 0 and 1 (the paper: 0.15).
        per: "example" draws one rank for each example, "step" one for a whole update: every micro-batch of it and
            every process then has the same rank, with nothing to communicate. "mixed" is per example.
        seed: any int.

    Raises ValueError for a value outside of these.

    Source: DyLoRA, arXiv 2210.07558, section 3 (p_B); drawing per example is nested dropout's own form.
    """

    def __init__(
        self,
        r_max: int,
        r_min: int = 1,
        distribution: str = "uniform",
        p: float = 0.15,
        per: str = "example",
        seed: int = 0,
    ):
        check_int("r_max", r_max, 1, math.inf, "the highest rank is an int of 1 or more.")
        check_int("r_min", r_min, 1, math.inf, "the lowest rank is an int of 1 or more.")
        if not 1 <= r_min <= r_max:
            raise ValueError(f"r_min is {r_min} and r_max {r_max}; they need 1 <= r_min <= r_max.")
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution is {distribution!r}; choose one of {', '.join(map(repr, DISTRIBUTIONS))}.")
        if not 0 < p < 1:
            raise ValueError(f"p is {p}; the geometric distribution needs a number between 0 and 1.")
        if per not in ("example", "step"):
            raise ValueError(f"per is {per!r}; choose 'example' or 'step'.")
        if distribution == "mixed" and per != "example":
            raise ValueError(
                "distribution='mixed' gives examples of one update different ranks; per='example' goes with it."
            )
        self.r_max, self.r_min, self.distribution, self.p = r_max, r_min, distribution, p
        self.per, self.seed = per, seed
        self.ranks = list(range(r_min, r_max + 1))

    def probabilities(self) -> list[float]:
        """p(b) for b = r_min..r_max; they sum to 1. For "mixed": each rank's part in training."""
        if self.distribution == "uniform":
            weights = [1.0] * len(self.ranks)
        elif self.distribution == "halving":
            *lower, top = self.ladder()
            shares = {b: 2.0**-k for k, b in enumerate(lower, 2)}
            shares |= {lower[-1]: 2.0 ** -len(lower)} if lower else {}
            weights = [(shares | {top: 1 / 2}).get(b, 0.0) for b in self.ranks]
        elif self.distribution == "mixed":
            ladder = self.ladder()
            weights = [(1 - LOWEST_SHARE) * (b in ladder) / len(ladder) for b in self.ranks]
            weights[0] += LOWEST_SHARE
        else:
            weights = [(1 - self.p) ** (b - self.r_min) for b in self.ranks]
        return [w / sum(weights) for w in weights]

    def ladder(self) -> list[int]:
        """The ranks r_min, 2 r_min, 4 r_min, .. below r_max, and r_max."""
        doubled = [self.r_min << k for k in range(self.r_max.bit_length())]
        return [*(b for b in doubled if b < self.r_max), self.r_max]

    def __call__(self, step: int, batch_size: int, micro_step: int = 0, process: int = 0):
        """The ranks of one micro-batch, for ``set_rank``: an int (per="step"), a LongTensor (batch_size,), or for
        "mixed" a float tensor (batch_size, r_max)."""
        # A str seed is hashed with SHA-512, so that neighbouring steps have unrelated streams.
        key = (self.seed, step) if self.per == "step" else (self.seed, step, micro_step, process)
        source = random.Random(":".join(map(str, key)))
        if self.distribution == "mixed":
            return self._mixed(batch_size, source)
        if self.distribution == "halving" and self.per == "example":
            return self._even(batch_size, source)
        draw = source.choices(self.ranks, self.probabilities(), k=1 if self.per == "step" else batch_size)
        return draw[0] if self.per == "step" else torch.tensor(draw, device="cpu")

    def _even(self, batch_size: int, source: random.Random) -> torch.Tensor:
        """Each rank batch_size * p(b) times, to less than one more or less, in random order."""
        edges = list(itertools.accumulate(self.probabilities()))
        first = source.random()
        places = [bisect.bisect_right(edges, (i + first) / batch_size, hi=len(edges) - 1) for i in range(batch_size)]
        source.shuffle(places)
        return torch.tensor([self.ranks[place] for place in places], device="cpu")

    def _mixed(self, batch_size: int, source: random.Random) -> torch.Tensor:
        ladder = self.ladder()
        weights = torch.zeros(batch_size, self.r_max, device="cpu")
        weights[:, [b - 1 for b in ladder]] = 1 / len(ladder)
        lowest = source.sample(range(batch_size), int(LOWEST_SHARE * batch_size + source.random()))
        weights[lowest] = 0
        weights[lowest, self.r_min - 1] = 1
        return weights
