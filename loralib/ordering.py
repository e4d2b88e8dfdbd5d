"""Components in the order of their importance, so that the first b of a trained adapter are its best b."""

import warnings
from collections.abc import Callable

import torch
from torch import nn

from .layers import Embedding, LoRALayer
from .model import get_rank, lora_layers, set_rank
from .momenta import GRADIENT, SQUARE, VALUE, kept_for, unwrapped_optimizer
from .sharding import at_rest, put, whole
from .state import renew_gates


@torch.no_grad()
def order_components(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Rewrite the components of every layer, in place, so that the first b are the best b.

    With the singular value decomposition ``lora_B @ lora_A = U S V^T``, singular values falling, the factors become

        lora_A' = a V^T,    lora_B' = U S / a,    a = |lora_A|_F / sqrt(r)

    At r_max the model computes what it did, to rounding, and ``lora_B'[:, :b] @ lora_A'[:b]`` is the nearest matrix of
    rank b (Eckart-Young); with ``scaling="alpha/r"`` rank b runs at the strength of r_max. Rows of lora_A keep their
    mean length: a component with two short factors would hardly train on. In an Embedding lora_B keeps it, since lora_A
    is the factor that starts at zero. A MergedLinear is ordered projection by projection; a component of a convolution
    has as many singular values as rows of lora_A.

    ``optimizer`` is the one that trains the adapter; its momenta go along, as gradients that are there do. With
    lora_A' = R lora_A the gradients are R^-T dA and dB R^T, and so are their running means; running means of squares
    follow as if entries were independent, with R's squared; a second set of values (schedule-free optimizers) moves as
    the first. States in 8 or 4 bits (bitsandbytes, torchao) are read and written so. Warns of a state of which is not
    known what it follows, and leaves it as it is. In a distributed run all processes call this together; the first
    one's result counts. Raises RuntimeError if a layer is merged, ValueError for factors that are not
    finite; nothing is changed then.
    """
    layers = lora_layers(model)
    for _, layer in layers:
        layer.check_unmerged()
    at_rest(model)
    refuse_shared_factors(layers)
    for name, layer in layers:
        if not all(bool(torch.isfinite(whole(factor)).all()) for factor in (layer.lora_A, layer.lora_B)):
            raise ValueError(
                f"{name} holds a number that is not finite, so its components have no order; train anew with a lower "
                "learning rate."
            )
    setattr(model, "lora_trained", {**getattr(model, "lora_trained", {}), "ordered": True})  # noqa: B010
    spread, rank = any(layer.components_at for _, layer in layers), get_rank(model)
    fitted = any(layer.strength_at for _, layer in layers)
    unknown: set[str] = set()
    for _, layer in layers:
        layer.components_at = layer.strength_at = None  # of another order
        (kept, see_kept), (other, see_other) = _factors(layer)
        result = ordered(see_kept(whole(kept)).cpu().double(), see_other(whole(other)).cpu().double())
        precision = torch.promote_types(kept.dtype, torch.float32)
        new_kept, new_other, R = (_of_first_process(value.to(kept.device, precision)) for value in result)
        _rewrite(kept, see_kept, lambda _, new=new_kept: new)
        _rewrite(other, see_other, lambda _, new=new_other: new)
        back = torch.linalg.pinv(R.cpu()).to(R.device).mT
        # Of the factor that keeps its length the rows are turned, of the other one the columns.
        unknown |= _turn(optimizer, kept, see_kept, lambda M, old: M @ old, gradient=back, value=R)
        unknown |= _turn(optimizer, other, see_other, lambda M, old: old @ M.mT, gradient=R, value=back)
    if unknown:
        warnings.warn(
            f"{type(unwrapped_optimizer(optimizer)).__name__} keeps {', '.join(sorted(unknown))} for the adapter, and "
            "of these it is not known how they follow components that are put in order: they stay as they are.",
            stacklevel=2,
        )
    if spread and isinstance(rank, int):
        set_rank(model, rank)  # whose parts were those of the other order
    elif spread or fitted:
        renew_gates([layer for _, layer in layers])


def refuse_shared_factors(layers: list[tuple[str, LoRALayer]]) -> None:
    """Raise ValueError for a factor of two layers, which would be changed twice."""
    held: dict[int, str] = {}
    for name, layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            if (other := held.setdefault(id(factor), name)) != name:
                raise ValueError(f"{other} and {name} share a factor, so neither can be changed without the other.")


def _rewrite(tensor: torch.Tensor, see: Callable, change: Callable) -> None:
    """Replace what ``see`` sees of a tensor by ``change`` of it."""
    value = whole(tensor).clone()
    see(value).copy_(change(see(value)))
    put(tensor, value)


def _factors(layer: LoRALayer):
    """The factor that keeps its length and the other one, each with how its tensors are seen: (projections, components,
    d) and (projections, d, components)."""
    if isinstance(layer, Embedding):
        return (layer.lora_B, lambda t: t.T[None]), (layer.lora_A, lambda t: t.T[None])
    p, n = layer.projections, layer.r * layer.rows
    return (layer.lora_A, lambda t: t.view(p, n, -1)), (layer.lora_B, lambda t: t.view(p, -1, n))


def ordered(kept: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """kept' = R kept with orthogonal rows of one length, other' with kept' other' = kept other, and R.

    Shapes: kept (..., n, d), other (..., m, n), R (..., n, n). Where n is more than m or d, the components beyond these
    are zero: the product has no use for them.
    """
    n = kept.shape[-2]
    Q_kept, R_kept = torch.linalg.qr(kept.mT)
    Q_other, R_other = torch.linalg.qr(other)
    U, S, Vt = torch.linalg.svd(R_other @ R_kept.mT, full_matrices=False)
    length = torch.linalg.matrix_norm(kept)[..., None, None] / n**0.5
    length = torch.where(length > 0, length, 1)
    missing = n - S.shape[-1]
    new_kept = nn.functional.pad(length * Vt @ Q_kept.mT, (0, 0, 0, missing))
    new_other = nn.functional.pad(Q_other @ (U * S[..., None, :]) / length, (0, missing))
    return new_kept, new_other, new_kept @ torch.linalg.pinv(kept)


def _turn(optimizer, parameter: nn.Parameter, see: Callable, apply: Callable, gradient, value) -> set[str]:
    """Turn the parameter's gradient and what the optimizer keeps for it; the names of what stays as it is.

    ``gradient`` and ``value``: the matrices of a gradient and of the parameter, for ``apply``.
    """
    turns = {GRADIENT: gradient, SQUARE: gradient.square(), VALUE: value}
    unknown = set()
    if parameter.grad is not None:
        _rewrite(parameter.grad, see, lambda old: apply(gradient.to(old.dtype), old))
    for kept in [] if optimizer is None else kept_for(optimizer, parameter):
        if kept.follows is None:
            unknown.add(kept.name)
            continue
        turned = kept.read().clone()
        old = see(turned)
        old.copy_(apply(turns[kept.follows].to(old.dtype), old))
        kept.write(turned)
    return unknown


def _of_first_process(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, 0)
    return tensor
