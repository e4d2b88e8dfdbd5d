"""What a layer runs at, as one immutable value, and the one place that changes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True, eq=False)
class RankState:
    """The setting of one layer.

    Args:
        rank: an int, a LongTensor (batch,) with one rank per example, or None where the gate came from no rank.
        gate: None for an int rank; else the factors of the components, (r,) or (batch, r), scaling included.
        frozen: component b alone gets a gradient (paper, eq. 10).
        learn: where a batch's examples stand is learnt (``loralib.learning``), not taken to be the first dimension.

    Raises ValueError for a frozen state without a rank.
    """

    rank: Any
    gate: torch.Tensor | None = None
    frozen: bool = False
    learn: bool = False

    def __post_init__(self):
        if self.frozen and self.rank is None:
            raise ValueError(
                "frozen training updates the component of a drawn rank, and weights of ranks draw none; leave out "
                "frozen."
            )
        for name in ("rank", "gate"):  # a state outlives the mode that it is set in: training may come next
            value = getattr(self, name)
            if isinstance(value, torch.Tensor) and value.is_inference():
                with torch.inference_mode(False):
                    object.__setattr__(self, name, value.clone())

    @property
    def is_off(self) -> bool:
        """Whether the rank is 0, at which there is no update."""
        return isinstance(self.rank, int) and self.rank == 0

    def same_as(self, other: RankState) -> bool:
        """Whether a layer computes the same, and trains the same components, in both."""
        if self is other:
            return True
        if self.frozen != other.frozen or (self.gate is None) != (other.gate is None):
            return False
        if self.gate is None or other.gate is None:
            return self.rank == other.rank
        return self.gate.shape == other.gate.shape and torch.equal(self.gate, other.gate.to(self.gate.device))


class HasState(Protocol):
    """What is needed of a layer here."""

    state: RankState

    def check_unmerged(self) -> None:
        """Raise RuntimeError if the layer is merged."""

    def described(self) -> str:
        """How an error message names the layer."""


def set_states(states: Iterable[tuple[HasState, RankState]]) -> None:
    """Set every layer's state, or, where one of them is merged, none. Raises RuntimeError that names the merged
    layer."""
    states = list(states)
    for layer, _ in states:
        layer.check_unmerged()
    for layer, state in states:
        vars(layer)["state"] = state  # without nn.Module's search for a parameter of that name


def renew_gates(layers: list[Any]) -> None:
    """For layers whose ranks have come to mean something else: where a gate is in use, which was made of what they
    meant before, the layers run at their whole rank from now on."""
    if any(layer.state.gate is not None for layer in layers):
        set_states([(layer, RankState(layer.r)) for layer in layers])
