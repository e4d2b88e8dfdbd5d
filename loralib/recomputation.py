"""Gradient checkpointing: what is computed again in the backward pass must run at the rank it ran at before.

A checkpointed block keeps no activations; in the backward pass it runs a second time and reads whatever rank the model
has by then. Two forward passes at different ranks before one backward pass, or ``use_rank`` left before it, would give
wrong gradients: such a recomputation raises here. ``loralib.checkpoint_contexts`` makes it right.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from .state import HasState, RankState, set_states


class _Pass:
    """A forward pass of one layer that may be computed again. Its graph keeps it alive."""

    def __init__(self, state: RankState):
        self.state = state
        self.over = False  # whether a backward pass went through it

    def end_with_backward(self, gradient: torch.Tensor) -> None:
        """A hook on the output. The gradient comes before what made the output is computed again, hence at the end."""
        torch.autograd.Variable._execution_engine.queue_callback(partial(setattr, self, "over", True))


# Beside the layers and not in them, since weak references can be neither copied nor pickled.
_passes: weakref.WeakKeyDictionary[HasState, weakref.WeakSet[_Pass]] = weakref.WeakKeyDictionary()
_vouched: set[int] = set()  # ids of the layers for which ``states_put_back`` stands


def note_pass(layer: HasState, output: torch.Tensor) -> None:
    """Note the state of a pass that will be computed again, by its output."""
    if torch.compiler.is_compiling() or not output.requires_grad or in_backward():
        return
    # A pass that will be computed again keeps its activations by hooks.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return
    this = _Pass(layer.state)
    _passes.setdefault(layer, weakref.WeakSet()).add(this)
    output.register_hook(this.end_with_backward)


def check_recomputation(layer: HasState, inputs: Iterable[torch.Tensor]) -> None:
    """Within a backward pass: raise RuntimeError unless the layer ran in the state that it has now.

    ``inputs`` are what the layer gets, and its factors; where none of them wants a gradient, any state will do. This
    stands before anything is computed: a recomputation ends in the middle of its last layer, with the last tensor
    that is needed. Of several passes that wait for their backward pass all must have run in this state.
    """
    if not torch.is_grad_enabled() or id(layer) in _vouched:
        return
    if not any(tensor.requires_grad for tensor in inputs):
        return
    passes = list(_passes.get(layer, ()))
    waiting = [each for each in passes if not each.over] or passes  # of a graph that is kept, its second time
    if not waiting or not all(layer.state.same_as(each.state) for each in waiting):
        raise RuntimeError(
            f"{layer.described()} is computed again in the backward pass, and not at the rank of its forward pass; "
            f"give gradient checkpointing use_reentrant=False and context_fn=loralib.checkpoint_contexts(model)."
        )


def in_backward() -> bool:
    """Whether a backward pass runs. Not in a compiled graph: that recomputes from its own inputs, the gates among
    them."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def states_put_back(states: list[tuple[HasState, RankState]]) -> Iterator[None]:
    """A recomputation within the body runs in these states, known to be those of its forward pass."""
    before = [(layer, layer.state) for layer, _ in states]
    fresh = {id(layer) for layer, _ in states} - _vouched
    set_states(states)
    _vouched.update(fresh)
    try:
        yield
    finally:
        _vouched.difference_update(fresh)
        set_states(before)
