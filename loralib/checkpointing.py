"""Gradient checkpointing with ranks that change between forward and backward pass."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .layers import LoRALayer
from .model import lora_layers
from .recomputation import states_put_back
from .state import HasState, RankState


def checkpoint_contexts(model: nn.Module) -> Callable[[], tuple]:
    """The ``context_fn`` with which ``torch.utils.checkpoint`` computes a block again at the ranks it ran at.

        model.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": loralib.checkpoint_contexts(model)})

    Gradients are then exact whatever happens to the ranks between forward and backward pass. ``DyLoRATrainer`` does
    this by itself.
    """
    return Contexts([layer for _, layer in lora_layers(model)])


@dataclass(frozen=True, eq=False)
class Contexts:
    """The two contexts of a checkpointed block, of its forward pass and of its recomputation. A value and no closure: a
    copy of a model that holds it gets one of its own layers."""

    layers: list[LoRALayer]

    def __call__(self) -> tuple:
        # A merged layer's rank is fixed, and the model that was merged has it no more.
        states: list[tuple[HasState, RankState]] = [
            (layer, layer.state) for layer in self.layers if not layer.is_merged
        ]
        return contextlib.nullcontext(), states_put_back(states)
