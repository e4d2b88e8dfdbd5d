"""What an optimizer keeps for a parameter (momenta, running squares, a second set of values), read and written as plain
numbers whatever it is stored as."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .sharding import is_sharded, put, whole

GRADIENT, SQUARE, VALUE = "the gradient", "the gradient's square", "the parameter"
OWN = ""  # the name of the parameter itself
# What state follows, by the names of torch's optimizers, transformers', schedulefree's and torchao's.
FOLLOWS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg"), GRADIENT),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), SQUARE),
    **dict.fromkeys(("z", "ax"), VALUE),
}
# Means of squares over rows and over columns, in place of all squares: torch's Adafactor's and transformers'.
FACTORED = {"row_var": "col_var", "exp_avg_sq_row": "exp_avg_sq_col"}
# bitsandbytes' optimizers whose first state is not a momentum.
SQUARES_FIRST = ("rmsprop", "adagrad")
BLOCK = 256  # elements that share a scale in its states of 8 bits


@dataclass(frozen=True)
class Kept:
    """One tensor of the parameter's shape that an optimizer keeps. ``follows``: GRADIENT, SQUARE, VALUE, or None where
    that is not known. ``is_shared``: it is made of means over the components."""

    name: str
    follows: str | None
    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]
    is_shared: bool = False


def of_parameter(parameter: torch.Tensor) -> Kept:
    """The parameter itself, as if it were kept."""
    return Kept(OWN, VALUE, partial(_plain, parameter), partial(put, parameter.detach()))


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate put one of its own around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def kept_for(optimizer: Any, parameter: torch.Tensor) -> list[Kept]:
    """What the optimizer keeps for the parameter and each of its elements; single numbers are left out."""
    optimizer = unwrapped_optimizer(optimizer)
    state = {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, torch.Tensor)}
    found: list[Kept] = []
    for row, column in FACTORED.items():
        if row in state and column in state:
            pair = state.pop(row), state.pop(column)
            found.append(Kept(row, SQUARE, partial(_outer, *pair), partial(_put_means, *pair), is_shared=True))
    for i in (1, 2):  # bitsandbytes' two, which may be stored in 8 bits
        if (codes := state.pop(f"state{i}", None)) is not None:
            first = SQUARE if getattr(optimizer, "optimizer_name", "") in SQUARES_FIRST else GRADIENT
            scales = [state.pop(f"{name}{i}", None) for name in ("absmax", "qmap")]
            found += _of_bitsandbytes(f"state{i}", first if i == 1 else SQUARE, parameter, codes, *scales)
    for name, tensor in state.items():
        if tensor.shape == parameter.shape:
            found.append(Kept(name, FOLLOWS.get(name), partial(_plain, tensor), partial(put, tensor)))
        elif tensor.numel() > 1:
            found.append(Kept(name, None, partial(_plain, tensor), partial(put, tensor), is_shared=True))
    return found


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; of torchao's in fewer bits, its values."""
    tensor = tensor.detach()
    if type(tensor).dequantize is not torch.Tensor.dequantize and not is_sharded(tensor):
        return tensor.dequantize()
    return whole(tensor)


def _outer(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The squares that the two stand for: row times column over their common mean."""
    row, column = whole(row).reshape(-1, 1), whole(column).reshape(1, -1)
    mean = row.mean()
    return row * column / torch.where(mean > 0, mean, 1)


def _put_means(row: torch.Tensor, column: torch.Tensor, squares: torch.Tensor) -> None:
    put(row, squares.mean(1).view(row.shape))
    put(column, squares.mean(0).view(column.shape))


def _of_bitsandbytes(name: str, follows: str, parameter, codes, absmax, qmap) -> list[Kept]:
    if codes.shape[-parameter.ndim :] != parameter.shape or is_sharded(codes):
        return [Kept(name, None, partial(_plain, codes), partial(put, codes), is_shared=True)]
    found = []
    # AdEMAMix has two momenta in one tensor.
    several = [(f"{name}[{i}]", i) for i in range(len(codes))] if codes.ndim > parameter.ndim else [(name, ...)]
    for each, i in several:
        stored = (codes[i],) if qmap is None else (codes[i], absmax[i], qmap)
        read, write = (_plain, put) if qmap is None else (_from_8_bits, _to_8_bits)
        found.append(Kept(each, follows, partial(read, *stored), partial(write, *stored)))
    return found


def _from_8_bits(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=BLOCK)


def _to_8_bits(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor, values: torch.Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    new, state = quantize_blockwise(values.float().contiguous(), code=qmap, blocksize=BLOCK)
    codes.copy_(new)
    absmax.copy_(state.absmax)
