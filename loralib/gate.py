"""Ranks and gates: what a rank means for the components of one adapter.

A rank is an ``int`` (the whole batch runs at it) or a ``LongTensor`` of shape ``(batch,)`` (every
example its own). A gate is what multiplies the components: for example i and component j, from 0,

    gate[i, j] = (j < b_i) * scale(b_i)

A float tensor ``weights`` of shape ``(batch, n)`` stands for several ranks at once, the weighted sum of their gates:

    gate[i, j] = sum over b = 1..n of weights[i, b - 1] * (j < b) * scale(b)

with scale(b) = alpha/b (DyLoRA, arXiv 2210.07558, eq. 5 and 7), alpha/r or alpha/sqrt(b) (rsLoRA,
arXiv 2312.03732). Ranks are 1-based: rank b uses the first b components, rank 0 none of them.
"""

import math

import torch

from .checks import check_int

SCALINGS = ("alpha/b", "alpha/r", "alpha/sqrt(b)")


def check_scaling(scaling: str, alpha: float) -> None:
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is {scaling!r}; choose one of {', '.join(map(repr, SCALINGS))}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha is {alpha!r}; give a number above 0, for example 16.")


def check_rank(rank, r: int):
    """Return ``rank`` if it is an int in 0..r, an integer tensor ``(batch,)`` of such, or weights ``(batch, r)``, else
    raise.

    Raises TypeError for another type (a bool and a float included), ValueError for another value.
    """
    if isinstance(rank, torch.Tensor):
        if rank.is_floating_point() and rank.ndim == 2:
            if rank.shape[1] != r or not len(rank):
                raise ValueError(
                    f"rank is a tensor of shape {tuple(rank.shape)}; weights of the ranks 1..{r} have shape (batch, "
                    f"{r})."
                )
            return rank
        if rank.is_floating_point() or rank.is_complex() or rank.dtype == torch.bool:
            raise TypeError(
                f"rank is a tensor of {rank.dtype}; give an int from 0 to {r} or a LongTensor of shape (batch,)."
            )
        if rank.ndim != 1 or not len(rank):
            raise ValueError(
                f"rank is a tensor of shape {tuple(rank.shape)}; give one rank per example, shape (batch,)."
            )
        rank = rank.long()  # unsigned ones too, of which torch compares no more than bytes
        low, high = (int(v) for v in torch.aminmax(rank))
        if low < 0 or high > r:
            raise ValueError(f"rank holds {low if low < 0 else high}; every rank lies in 0..{r}.")
        return rank
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(
            f"rank is {rank!r} ({type(rank).__name__}); give an int from 0 to {r} or a LongTensor of shape (batch,)."
        )
    check_int("rank", rank, 0, r, f"this adapter takes 0 (the base model) to {r}.")
    return rank


def scale(rank, r: int, alpha: float, scaling: str):
    """scale(b) for an int (a float comes back) or a float tensor of ranks (another); b = 0 counts as 1."""
    if isinstance(rank, torch.Tensor):
        b = rank.clamp(min=1)
        strength = {"alpha/b": lambda: alpha / b, "alpha/sqrt(b)": lambda: alpha / b.sqrt()}
        return strength.get(scaling, lambda: torch.full_like(b, alpha / r))()
    b = max(rank, 1)
    return alpha / {"alpha/b": b, "alpha/r": r, "alpha/sqrt(b)": math.sqrt(b)}[scaling]


def rank_gate(
    ranks: torch.Tensor, r: int, alpha: float, scaling: str, dtype=torch.float32, strength_at=None
) -> torch.Tensor:
    """The gate of ranks (batch,), or of weights (batch, n) of the ranks 1..n, those above r counting as r: (batch,
    r). ``strength_at``: factors of scale(1) .. scale(r), if any."""
    if ranks.is_floating_point():
        each = torch.arange(1, ranks.shape[1] + 1, device=ranks.device).clamp(max=r)
        gates = rank_gate(each, r, alpha, scaling, dtype, strength_at)
        return (ranks.to(dtype)[..., None] * gates).sum(1)  # no matrix product: autocast would round it
    component = torch.arange(r, device=ranks.device)
    strength = scale(ranks.to(dtype), r, alpha, scaling)
    if strength_at is not None:
        strength = strength * torch.as_tensor(strength_at, dtype=dtype, device=ranks.device)[ranks.clamp(min=1) - 1]
    return (component < ranks[:, None]) * strength[:, None]


def matryoshka_gate(
    r: int, alpha: float, scaling: str, ranks=None, reduce: str = "sum", strength_at=None
) -> torch.Tensor:
    """One fixed gate that trains all ``ranks`` at once: (r,).

    The sum (MatryoshkaLoRA's diagonal P, arXiv 2605.07850) or the mean over ``ranks`` (default 1..r)
    of their gates; ``strength_at`` as of ``rank_gate``. Raises TypeError or ValueError for what is no rank in 0..r,
    ValueError for another reduction.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f"reduce is {reduce!r}; choose 'sum' or 'mean'.")
    if ranks is not None and not len(list(ranks)):
        raise ValueError("ranks is empty; name the ranks that train, or leave it out for all of them.")
    ranks = torch.as_tensor(list(ranks) if ranks is not None else range(1, r + 1), device="cpu")
    gates = rank_gate(check_rank(ranks, r), r, alpha, scaling, strength_at=strength_at)
    return getattr(gates, reduce)(0)
