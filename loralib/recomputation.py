"""Gradient checkpointing: what is computed again in the backward pass must run at the rank it ran at before.

A checkpointed block keeps no activations; in the backward pass it runs a second time and reads whatever rank the model
has by then. Two forward passes at different ranks before one backward pass, or ``use_rank`` left before it, would give
wrong gradients: such a recomputation raises here. ``loralib.checkpoint_contexts`` makes it right.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial

import torch

from .state import HasState, RankState, set_states


class _Pass:
    """A forward pass of one layer whose backward pass is still to come. Its graph keeps it alive."""

    def __init__(self, state: RankState):
        self.state = state


# Beside the layers and not in them, since weak references can be neither copied nor pickled.
_pending: weakref.WeakKeyDictionary[HasState, weakref.WeakSet[_Pass]] = weakref.WeakKeyDictionary()
_put_back = 0  # how many recomputations run whose states ``states_put_back`` vouches for


def watch(layer: HasState, output: torch.Tensor) -> None:
    """Note the state of a training pass by its output or, within a backward pass, compare with those noted.

    Raises RuntimeError where the pass that is computed again ran, or may have run, in another state.
    """
    if torch.compiler.is_compiling():  # a compiled graph recomputes from its own inputs, the gates among them
        return
    forward = torch._C._current_graph_task_id() == -1
    # A pass that will be computed again keeps its activations by hooks (or has no gradient, and is not noted either).
    if forward and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return
    pending = _pending.get(layer)
    if pending is None:
        pending = _pending[layer] = weakref.WeakSet()
    if forward:
        this = _Pass(layer.state)
        pending.add(this)
        output.register_hook(partial(_done, pending, this))
        return
    if not _put_back and not (pending and all(layer.state.same_as(earlier.state) for earlier in pending)):
        raise RuntimeError(
            f"{layer.described()} is computed again in the backward pass, and not at the rank of its forward pass; "
            f"give gradient checkpointing use_reentrant=False and context_fn=loralib.checkpoint_contexts(model)."
        )


def _done(pending: weakref.WeakSet[_Pass], this: _Pass, gradient: torch.Tensor) -> None:
    pending.discard(this)


@contextlib.contextmanager
def states_put_back(states: list[tuple[HasState, RankState]]) -> Iterator[None]:
    """A recomputation within the body runs in these states, known to be those of its forward pass."""
    global _put_back
    before = [(layer, layer.state) for layer, _ in states]
    set_states(states)
    _put_back += 1
    try:
        yield
    finally:
        _put_back -= 1
        set_states(before)
