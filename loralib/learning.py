"""Learning where the examples of a batch stand in each adapted layer's input, from a few passes made for that alone.

The passes run in evaluation mode and without gradient: a batch, and some of its examples one by one. What each layer
gets in the one and in the others is compared (``loralib.layout.infer``).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .checks import check_int
from .cutting import Batch, batches
from .layers import LoRALayer, adapted_layers
from .layout import (
    ALIKE,
    CHANGING,
    UNREACHED,
    Call,
    Layout,
    LayoutError,
    Seen,
    agreed,
    calls,
    distinct,
    infer,
    tensors_in,
)
from .quantised import row_by_row
from .sharding import is_sharded_model, without_fsdp
from .state import RankState
from .walking import modes_of, put_modes

SINGLES = 4  # examples of a batch that run one by one
ROUNDS = 2  # batches that are compared: the one at hand, and one of its tokens mixed up
MORE = 8  # more of these, where a layer gets rows that are not simply all tokens
TOGETHER = (
    "all processes learn together where examples stand, from a batch of 2 or more in each: call loralib.learn_layout("
    "model, **batch) in all of them, or say it with loralib.declare_layout(model, 0)"
)
_this_thread = threading.local()


def passes_run() -> bool:
    """Whether the passes that run in this thread are those made for learning."""
    return getattr(_this_thread, "learning", False)


def learn_layout(model: nn.Module, *args, **kwargs) -> None:
    """Learn from one batch where its examples stand in every adapted layer; ``model(*args, **kwargs)`` is how it would
    run.

    A model called with one rank per example does this by itself, in its first call; under
    ``torch.compile(fullgraph=True)`` it cannot, and this comes before. Passes run in evaluation mode and without
    gradient; generators and states are put back.

    Raises LayoutError if the model cannot run examples one by one.
    """
    size = next(map(len, tensors_in((args, kwargs))), 1)
    gates = [layer.state.gate for _, layer in adapted_layers(model) if layer.state.learn]
    n = next((len(g) for g in gates if g is not None and g.ndim == 2), size)
    call = Call(model, args, kwargs, learn)
    if is_sharded_model(model):
        _learn_together(call, n)
    else:
        learn(call, n)


def declare_layout(model: nn.Module, dim: int) -> None:
    """Say in which dimension of every adapted layer's input the examples stand, 0 or 1; it is not learnt then.

    In the first dimension an example may have several rows, those of one example together. A model without adapter is
    left as it is. Raises ValueError for another dimension.
    """
    check_int("dim", dim, 0, 1, "give 0 (the first dimension) or 1 (the second).")
    for _, layer in adapted_layers(model):
        layer.layout = Layout(dim, rows=None if dim == 0 else 1, shared=dim == 0, declared=True)


# --- learning -----------------------------------------------------------------------------------------

Layouts = dict[LoRALayer, Layout | str]
Record = dict[LoRALayer, list[Seen]]


def learn(call: Call, n: int) -> None:
    """Give every adapted layer that the call's inputs reach its layout for n examples, or the reason why it has none.

    Raises LayoutError if the model cannot run examples one by one, or if this process alone would make it run.
    """
    if is_sharded_model(call.model):
        raise LayoutError(f"{type(call.model).__name__} gets other shapes than at first, and under FSDP {TOGETHER}.")
    _learn_alone(call, n)


def _learn_alone(call: Call, n: int) -> None:
    if n < 2:
        return  # of a single example nothing can be learnt, and nothing has to be
    failures: list[Exception] = []
    results: list[Layouts] = []
    layers = adapted_layers(call.model)
    with aside(call.model):
        for batch in batches(call, n):
            try:
                results.append(_compared(call, batch, n))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a model raises for inputs that are no batch of its own
                failures.append(error)
    if not results:
        if failures:
            reason = (str(failures[0]).strip() or type(failures[0]).__name__).splitlines()[0]
            raise LayoutError(
                f"{type(call.model).__name__} cannot run the examples of a batch one by one, which tells where they "
                f"stand in its layers ({reason}); say it with loralib.declare_layout(model, 0)."
            )
        return
    refused = [sum(isinstance(layout, str) for layout in result.values()) for result in results]
    best = [result for result, count in zip(results, refused, strict=True) if count == min(refused)]
    for _, layer in layers:
        if isinstance(layer.layout, Layout) and layer.layout.declared:
            continue
        found = [result[layer] for result in best if layer in result]
        if found and all(_alike(layout, found[0]) for layout in found):
            layer.layout = found[0]
        elif not found:
            layer.layout = layer.layout or UNREACHED
        else:
            layer.layout = (
                f"the batch has several dimensions of {n} that could be the examples; say which with "
                f"loralib.declare_layout"
            )


def _learn_together(call: Call, n: int) -> None:
    """Under FSDP, where a pass is all processes' together: each learns from a whole model, and the first one's result
    counts."""
    distributed = torch.distributed
    sizes: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(sizes, n)
    if max(sizes) < 2:
        return
    if min(sizes) < 2:
        raise LayoutError(f"Under FSDP {TOGETHER}.")
    with without_fsdp(call.model):
        _learn_alone(call, n)
    layers = [layer for _, layer in adapted_layers(call.model)]
    layouts = [layer.layout for layer in layers]
    distributed.broadcast_object_list(layouts)
    for layer, layout in zip(layers, layouts, strict=True):
        layer.layout = layout


def _alike(one: Layout | str, other: Layout | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return replace(one, source=None) == replace(other, source=None)


@contextlib.contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Passes in the body leave no trace: evaluation mode, no gradient; generators, modes and states are put back."""
    modes = modes_of(model)
    states = [(layer, layer.state) for _, layer in adapted_layers(model)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outer, _this_thread.learning = passes_run(), True
    nested = any(call.model is model for call in calls())
    # Accelerate wraps a model's forward in an autocast object that cannot be entered twice; within a call it is active
    # anyway.
    wrapper = model.__dict__.pop("forward", None) if nested else None
    with (
        torch.no_grad(),
        torch.random.fork_rng(
            [] if device.type == "cpu" else [device.index or 0],
            device_type="cuda" if device.type == "cpu" else device.type,
        ),
    ):
        try:
            model.eval()
            for layer, _ in states:
                layer.state = RankState(layer.r)
            with row_by_row(model.modules()):
                yield
        finally:
            _this_thread.learning = outer
            if wrapper is not None:
                model.forward = wrapper
            for layer, state in states:
                layer.state = state
            put_modes(modes)


def _pass(model: nn.Module, batch: Batch) -> tuple[Record, list[torch.Tensor]]:
    """What every adapted layer gets in a pass, in the order of its calls, and the tensors of the model's output."""
    record: Record = {}

    def note(layer, args, kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        record.setdefault(layer, []).append(Seen.of(x, layer.example_dims(x)))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for _, layer in adapted_layers(model)]
    try:
        args, kwargs = batch.inputs()
        output = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return record, tensors_in(output)


@dataclass(frozen=True)
class Round:
    """What the layers got of one batch: of the whole, and of single examples (i, ..)."""

    whole: Record
    alone: list[tuple[int, Record]]

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, chosen: list[int]) -> Round:
        return cls(_pass(model, batch)[0], [(i, _pass(model, batch.example(i))[0]) for i in chosen])

    def layers(self) -> list[LoRALayer]:
        return list(dict.fromkeys(layer for record in (self.whole, *(r for _, r in self.alone)) for layer in record))

    def layouts(self, layer: LoRALayer, n: int) -> list[list[Layout] | str]:
        """For each call of the layer the layouts that it may have, or a reason why there is none."""
        count = len(self.whole.get(layer, []))
        if any(len(record.get(layer, [])) != count for _, record in self.alone):
            return [CHANGING]
        return [infer(self.whole[layer][c], self._singles(layer, c), n) for c in range(count)]

    def tells_apart(self, layer: LoRALayer) -> bool:
        """Whether the examples differ in what the layer gets, so that rows in another order would have been seen."""
        return all(
            distinct([seen.print for _, seen in self._singles(layer, c)]) for c in range(len(self.whole.get(layer, [])))
        )

    def _singles(self, layer: LoRALayer, c: int) -> list[tuple[int, Seen]]:
        return [(i, record[layer][c]) for i, record in self.alone]


def _compared(call: Call, batch: Batch, n: int) -> Layouts:
    chosen = sorted({i * (n - 1) // (SINGLES - 1) for i in range(SINGLES)})
    rounds = [Round.of(call.model, batch, chosen), *_mixed_rounds(call.model, batch, chosen, range(1, ROUNDS))]
    layouts = _agreed(rounds, call, n)
    if any(_is_doubtful(layer, layouts, rounds[0]) for layer in layouts):
        rounds += _mixed_rounds(call.model, batch, chosen, range(ROUNDS, ROUNDS + MORE))
        layouts = _agreed(rounds, call, n)
        for layer in layouts:
            if _is_doubtful(layer, layouts, rounds[0]) and not any(each.tells_apart(layer) for each in rounds):
                layouts[layer] = ALIKE
    growing = [layer for layer, layout in layouts.items() if isinstance(layout, Layout) and layout.shared]
    if growing and not _grows(call.model, batch, n, chosen, layouts):
        for layer in growing:
            layouts[layer] = "its input is the same for all examples, and the model takes no output for each of them"
    return layouts


def _mixed_rounds(model: nn.Module, batch: Batch, chosen: list[int], numbers: range) -> Iterator[Round]:
    for number in numbers:
        with contextlib.suppress(Exception):  # values may make no sense to the model
            yield Round.of(model, batch.mixed_up(number), chosen)


def _agreed(rounds: list[Round], call: Call, n: int) -> Layouts:
    layers = dict.fromkeys(layer for each in rounds for layer in each.layers())
    return {layer: agreed([each.layouts(layer, n) for each in rounds], call.shapes(), n) for layer in layers}


def _is_doubtful(layer: LoRALayer, layouts: Layouts, first: Round) -> bool:
    """Whether a layer may be an expert of a mixture that got equally many rows of each example by chance.

    What gets every token (``source``) gets it whatever is routed, and experts get rows of tokens, not sequences.
    """
    layout = layouts[layer]
    rows = any(seen.print.ndim == 1 for seen in first.whole.get(layer, []))
    return isinstance(layout, Layout) and layout.source is None and not layout.shared and rows


@contextlib.contextmanager
def random_factors(model: nn.Module) -> Iterator[None]:
    """Within the body the adapters have other factors, whose update is about as large as its input."""
    generator = torch.Generator("cpu").manual_seed(0)
    with contextlib.ExitStack() as stack:
        for _, layer in adapted_layers(model):
            for factor in (layer.lora_A, layer.lora_B):
                stack.callback(setattr, factor, "data", factor.data)
                random = torch.randn(factor.shape, generator=generator, device="cpu") / math.sqrt(factor.shape[-1])
                factor.data = random.to(factor.device, factor.dtype)
        yield


def _grows(model: nn.Module, batch: Batch, n: int, chosen: list[int], layouts: Layouts) -> bool:
    """Whether the model runs right when a layer gives n outputs for an input that all examples share.

    With other factors, since fresh ones have no effect: n ranks at once against the examples one by one.
    """
    with random_factors(model), contextlib.ExitStack() as stack:
        for _, layer in adapted_layers(model):
            stack.callback(setattr, layer, "layout", layer.layout)
        for layer, layout in layouts.items():
            layer.layout = layout
        ranks = torch.arange(n, device="cpu")
        for _, layer in adapted_layers(model):
            each = (ranks % (layer.r + 1)).to(layer.weight.device)
            layer.state = RankState(each, layer.gate_of(each), learn=True)
        try:
            whole, outputs = _pass(model, batch)
        except Exception:  # shapes that the model does not expect
            return False
        alone = []
        for i in chosen:
            for _, layer in adapted_layers(model):
                layer.state = RankState(i % (layer.r + 1))
            alone.append((i, *_pass(model, batch.example(i))))
    seen = Round(whole, [(i, record) for i, record, _ in alone])
    if any(isinstance(found, str) for layer in whole for found in seen.layouts(layer, n)):
        return False
    return all(
        not isinstance(infer(Seen.of(x, 2), [(i, Seen.of(each[c], 2)) for i, _, each in alone], n), str)
        for c, x in enumerate(outputs)
    )
