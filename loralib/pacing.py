"""Components that learn at paces of their own, under any optimizer."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .layers import Embedding, LoRALayer
from .model import lora_layers, max_rank
from .momenta import VALUE, kept_for, unwrapped_optimizer
from .parts import part
from .sharding import at_rest, is_sharded, put, whole

FASTEST = 8.0  # times as fast, the first component of an adapter of rank 8 or more
# The paces that an optimizer goes by, and what ends that.
_paced: WeakKeyDictionary[Any, tuple[tuple[float, ...], list]] = WeakKeyDictionary()


def usual_paces(r_max: int, r_min: int = 1) -> tuple[float, ...]:
    """Paces of components 1..r_max: min(r_max, 8)/k for component k, but 1 at least.

    From r_max 8 on and at one strength for all ranks, "alpha/r" with alpha = 2 r, the components up to the eighth then
    learn (under Adam) as if component k were at strength 16/k, that of a LoRA of rank k with alpha 16. Components up to
    r_min, which no lower rank uses, share the pace of the last of them.
    """
    return tuple(max(1.0, min(r_max, FASTEST) / max(k, r_min)) for k in range(1, r_max + 1))


def pace_components(optimizer: torch.optim.Optimizer, model: nn.Module, paces: Sequence[float] | None) -> None:
    """Make each ``optimizer.step()`` change component k of the factor that starts at zero ``paces[k - 1]`` times as
    much.

    From this call on, a step that would take lora_B (of an Embedding lora_A) from B to B + D takes it to

        B[:, k] + paces[k] * D[:, k]

    which is that optimizer at ``paces[k]`` times the learning rate for these entries, weight decay included. The other
    factor and the optimizer's state are as they would be. Under Adam this is how a component would learn whose strength
    were ``paces[k]`` times as high: the factor is then as much smaller, and the update the same.

        model = lora.inject(...); optimizer = torch.optim.AdamW(...)
        lora.pace_components(optimizer, model, [8 / k for k in range(1, 9)])

    ``paces`` are those of the components that the ranks 1..r_max of the model add. Another call replaces them; with
    None every component learns as usual again. A step that a subclass of an optimizer makes of another's counts whole.

    Raises ValueError, and leaves the optimizer as it was, unless paces are r_max numbers above 0, if the optimizer
    holds none of these factors, and if it cannot stand a change behind its back: one that keeps a second set of values
    (schedule-free ones; others that do are refused at their first step) or learns from differences (LBFGS).
    """
    optimizer = unwrapped_optimizer(optimizer)
    if paces is None:
        _unpace(optimizer)
        return
    r_max = max_rank(model)
    if len(paces) != r_max or not all(0 < pace < float("inf") for pace in paces):
        raise ValueError(f"paces are {list(paces)}; give a number above 0 for each of the {r_max} components.")
    at_rest(model)  # parameters that a pass left whole are none that the optimizer knows
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    paced = [(layer, _of_layer(layer, paces)) for _, layer in lora_layers(model) if id(_from_zero(layer)) in held]
    if not paced:
        raise ValueError(
            f"{type(optimizer).__name__} holds no lora_B (of an Embedding: lora_A) of the model: make it after inject, "
            "of what trains."
        )
    if _keeps_its_own(optimizer):
        _refuse(optimizer)
    _unpace(optimizer)
    before: list[torch.Tensor] = []

    # torch calls the hooks of a subclass whose step calls its parent's for both, one within the other: what is
    # remembered is then renewed, and what the outer step adds is paced as well.
    @torch.no_grad()
    def remember(*_):
        before[:] = [_read(layer).clone() for layer, _ in paced]

    @torch.no_grad()
    def scale_change(*_):
        if any(kept.follows == VALUE for layer, _ in paced for kept in kept_for(optimizer, _from_zero(layer))):
            _refuse(optimizer)
        changed = []
        for (layer, pace), old in zip(paced, before, strict=True):
            new = _read(layer)
            see = layer.split_A if isinstance(layer, Embedding) else layer.split_B
            changed.append(torch.lerp(see(old), see(new), pace.to(new)).view_as(new))
        for (layer, _), value in zip(paced, changed, strict=True):  # after all are read: layers may share a factor
            _write(layer, value)
        before[:] = changed

    hooks = [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(scale_change)]
    _paced[optimizer] = tuple(paces), hooks


def _unpace(optimizer: torch.optim.Optimizer) -> None:
    for handle in _paced.pop(optimizer, ((), []))[1]:
        handle.remove()


def _keeps_its_own(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known before its first step that it would not notice a change: schedule-free optimizers have the
    modes of a module."""
    modes = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    return modes or isinstance(optimizer, torch.optim.LBFGS)


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    raise ValueError(
        f"{type(optimizer).__name__} keeps a second set of values or learns from differences, so that components "
        "cannot learn at paces of their own; take another optimizer, or RankSchedule(paced=False)."
    )


def paces_of(optimizer: torch.optim.Optimizer) -> tuple[float, ...] | None:
    """The paces that its components learn at; None: as usual."""
    return _paced.get(unwrapped_optimizer(optimizer), (None, []))[0]


def set_paces(optimizer: torch.optim.Optimizer, model: nn.Module, paces: tuple[float, ...] | None) -> None:
    """``pace_components`` where that changes anything: for every step of a training."""
    if paces_of(optimizer) != paces:
        pace_components(optimizer, model, paces)


def _of_layer(layer: LoRALayer, paces: Sequence[float]) -> torch.Tensor:
    """The paces of the layer's own components, shaped to go with ``split_A`` and ``split_B``: each one's is that of the
    lowest rank of the model that uses it."""
    counts = [part(layer, b) for b in range(1, len(paces) + 1)]
    own = [paces[next((i for i, n in enumerate(counts) if n >= k), -1)] for k in range(1, layer.r + 1)]
    return torch.tensor(own, device="cpu").view(-1, *([1] * (2 if isinstance(layer, Embedding) else 1)))


def _from_zero(layer: LoRALayer) -> nn.Parameter:
    """The factor that starts at zero."""
    return layer.lora_A if isinstance(layer, Embedding) else layer.lora_B


def _has_all_components(layer: LoRALayer) -> bool:
    """Whether a sharded factor's part in this process does: FSDP2 cuts the first dimension, which is lora_B's outputs
    and lora_A's components."""
    factor: Any = _from_zero(layer)
    return not isinstance(layer, Embedding) and all(not p.is_shard() or p.is_shard(0) for p in factor.placements)


def _read(layer: LoRALayer) -> torch.Tensor:
    """The factor, or of a sharded one this process's part where that has all components."""
    factor: Any = _from_zero(layer).detach()
    if is_sharded(factor) and _has_all_components(layer):
        return factor.to_local()
    return whole(factor)


def _write(layer: LoRALayer, value: torch.Tensor) -> None:
    """Write what ``_read`` read."""
    factor: Any = _from_zero(layer).detach()
    if is_sharded(factor) and _has_all_components(layer):
        factor.to_local().copy_(value)
    else:
        put(factor, value)
