"""How strong the update of each rank is in each layer, learnt once a training is over."""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .checks import check_int, is_number
from .inside_peft import warn_of_what_peft_drops
from .layers import LoRALayer
from .layout import LayoutError, examples_in
from .losses import Loss, finite_loss, on_device
from .model import has_lora, lora_layers, max_rank, set_rank
from .ordering import refuse_shared_factors
from .sampling import RankSampler
from .sharding import at_rest
from .state import renew_gates
from .walking import modes_of, put_modes, unwrapped

UPDATES, RATE = 60, 0.02  # as the study has them


def fit_strengths(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    updates: int = UPDATES,
    rate: float = RATE,
    accumulate: int = 1,
) -> None:
    """Learn by how much each layer's update should be stronger or weaker at each rank, in place: from now on rank b
    runs in layer l at

        scale(b) * s[l, b],    s[l, b] > 0

    The factors s alone are learnt, all else stays: by Adam on the loss of training data, whose examples run in turn at
    the ranks 1, 2, 4, .. r_max. Between these ranks log s is linear in log b. What is learnt for r_max becomes part of
    lora_B, so that s[l, r_max] is 1.

    For an adapter whose training is over. Adapters are saved and loaded with s (``layer.strength_at``); cut to a rank,
    they hold it in lora_B, and stock PEFT computes the same. Other ways to put weights in (a state dict, PEFT's own
    ``load_adapter``) neither bring nor clear s. ``order_components``, ``order_by_importance`` and a new training forget
    it.

    Args:
        batches: of training data, at random, as the model is called, ``labels`` among them, or as ``loss`` takes them;
            they are moved to the model's device, and come again if there are too few.
        loss: of the model and a batch, the mean over examples; default the ``loss`` that the model returns.
        updates: how many; each should have 32 examples, or 8 texts of which every token counts.
        rate: the learning rate, which falls to zero evenly.
        accumulate: batches to an update.

    The model runs in evaluation mode, keeps its modes, and is at r_max afterwards. In a distributed run all processes
    call this together, each with its own batches. Raises ValueError if there is no batch, a loss is no finite scalar, a
    number is out of range, the model cannot run with a rank per example, layers share a factor, ranks are spread over
    layers by importance, or FSDP has spread the model; RuntimeError if a layer is merged; TypeError if the model gives
    no loss. Nothing is changed then.
    """
    check_int("updates", updates, 1, math.inf, "give how many updates to learn in, 1 or more.")
    check_int("accumulate", accumulate, 1, math.inf, "give the batches to an update, 1 or more.")
    if not is_number(rate) or not 0 < rate < math.inf:
        raise ValueError(f"rate is {rate!r}; give a number above 0, for example 0.02.")
    model = unwrapped(model)  # DistributedDataParallel would wait for a backward pass
    named = lora_layers(model)
    layers = [layer for _, layer in named]
    refuse_shared_factors(named)
    if any(layer.components_at for layer in layers):
        raise ValueError("Ranks are spread over the layers by importance; strengths are for ranks as trained.")
    if at_rest(model):
        raise ValueError("The model is spread over processes by FSDP; fit its saved adapter in one process.")
    before, modes = [(layer.state, layer.strength_at) for layer in layers], modes_of(model)
    model.eval()
    try:
        found = _learn(model, layers, batches, loss, updates, rate, accumulate)
    except BaseException:
        for layer, (state, strength_at) in zip(layers, before, strict=True):
            layer.state, layer.strength_at = state, strength_at
        raise
    finally:
        put_modes(modes)
    with torch.no_grad():
        for layer, table in zip(layers, found, strict=True):
            layer.lora_B.mul_(float(table[-1]))
            layer.strength_at = tuple((table / table[-1]).tolist())
    set_rank(model, max_rank(model))
    warn_of_what_peft_drops(model, "the strengths of its ranks")


def _learn(
    model: nn.Module,
    layers: list[LoRALayer],
    batches: Iterable[Any],
    loss: Loss | None,
    updates: int,
    rate: float,
    accumulate: int,
) -> list[torch.Tensor]:
    """Each layer's factors at its ranks 1..r. Leaves the layers at what ran last."""
    device, ranks = layers[0].lora_A.device, torch.tensor(RankSampler(max_rank(model)).ladder(), device="cpu")
    between = [interpolation(RankSampler(layer.r).ladder()) for layer in layers]
    logs = torch.zeros(sum(matrix.shape[1] for matrix in between), device="cpu", requires_grad=True)
    optimizer, seen = torch.optim.Adam([logs], lr=rate), 0

    def tables() -> list[torch.Tensor]:
        own = logs.split([matrix.shape[1] for matrix in between])
        return [(matrix @ part).exp() for matrix, part in zip(between, own, strict=True)]

    for number, batch in enumerate(itertools.islice(itertools.cycle(batches), updates * accumulate)):
        batch = on_device(batch, device)
        n = examples_in(batch)
        with torch.enable_grad():
            for layer, table in zip(layers, tables(), strict=True):
                layer.strength_at = table  # type: ignore[assignment]  # a tensor as long as it is learnt
            set_rank(model, ranks[(seen + torch.arange(n, device="cpu")) % len(ranks)])
            try:
                value = finite_loss(model, batch, loss, f"batch {number + 1}") / accumulate
            except LayoutError as error:
                raise LayoutError(
                    f"Strengths are fitted with a rank per example, and this model cannot have one: {error}"
                ) from error
            if not value.requires_grad:
                raise ValueError(f"The loss of batch {number + 1} depends on no adapted layer, or keeps no gradient.")
            (gradient,) = torch.autograd.grad(value, [logs])
        logs.grad = gradient if logs.grad is None else logs.grad + gradient
        seen += n
        if (number + 1) % accumulate == 0:
            _average(logs.grad, device)
            optimizer.param_groups[0]["lr"] = rate * (1 - number // accumulate / updates)
            optimizer.step()
            optimizer.zero_grad()
    if not seen:
        raise ValueError("There are no batches to fit strengths on; give some of the training data.")
    found = [table.detach() for table in tables()]
    if not all(bool((torch.isfinite(table) & (table > 0)).all()) for table in found):
        raise ValueError("The strengths came to no finite numbers above 0; give a lower rate.")
    return found


def has_strengths(model: nn.Module) -> bool:
    """Whether ranks have strengths that were fitted."""
    return any(layer.strength_at for _, layer in lora_layers(model))


def forget_strengths(model: nn.Module) -> None:
    """Before a training: strengths that were fitted are of the weights before it. Warns where there were some."""
    if has_lora(model) and has_strengths(model):
        layers = [layer for _, layer in lora_layers(model)]
        for layer in layers:
            layer.strength_at = None
        renew_gates(layers)
        warnings.warn(
            "The strengths that were fitted are of the weights before this training, which begins without them: fit "
            "them again when it is over.",
            stacklevel=3,
        )


def interpolation(ladder: Sequence[int]) -> torch.Tensor:
    """(r, ranks): what the ranks 1..r take of values at the ranks of ``ladder``, from 1 to r, linear in log b."""
    matrix = torch.zeros(ladder[-1], len(ladder), dtype=torch.float32, device="cpu")
    matrix[-1, -1] = 1
    for i, (low, high) in enumerate(itertools.pairwise(ladder)):
        for b in range(low, high):
            share = math.log(b / low) / math.log(high / low)
            matrix[b - 1, i], matrix[b - 1, i + 1] = 1 - share, share
    return matrix


def _average(gradient: torch.Tensor, device: torch.device) -> None:
    """The mean over processes, in place, on the device that they talk through."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = gradient.to(device)
        torch.distributed.all_reduce(total)
        gradient.copy_(total / torch.distributed.get_world_size())
