"""Adding a layer's update to its weight, and taking it out again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .quantised import dequantised, is_quantised
from .sharding import is_managed
from .state import RankState


class Merging(nn.Module):
    """The part of a layer that merges: what it needs of the layer stands first."""

    r: int
    state: RankState
    weight: torch.Tensor
    bias: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    _base: nn.Module | None = None  # the module that the layer was put around
    _base_weight: list[torch.Tensor] | None = None  # while merged: [the parameter that holds W0]

    def first_components(self, b: int, frozen: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors cut to rank b."""
        raise NotImplementedError

    def strength(self) -> float:
        """scale(b) at the int rank in use."""
        raise NotImplementedError

    def delta(self, A: torch.Tensor, B: torch.Tensor, gate) -> torch.Tensor:
        """The change of the weight that the update amounts to, shaped like the weight; gate as a float or
        (components,)."""
        raise NotImplementedError

    def described(self) -> str:
        """How an error message names the layer."""
        raise NotImplementedError

    @property
    def is_merged(self) -> bool:
        return self._base_weight is not None

    def check_unmerged(self) -> None:
        """Raise RuntimeError if the layer is merged."""
        if self.is_merged:
            raise RuntimeError(f"{self.described()} is merged and its rank is fixed; call unmerge() first.")

    def delta_weight(self) -> torch.Tensor:
        """What the update at the rank (or gate) in use adds to the weight. Raises ValueError for per-example ranks."""
        gate, device = self.state.gate, self.lora_A.device.type
        if gate is not None and gate.ndim == 2:
            raise ValueError(f"{self.described()} has one rank per example; set one rank for all before merging.")
        # A weight is made once: autocast, if it is on, would round it for good.
        precise = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with precise:
            if gate is None:
                return self.delta(*self.first_components(self.state.rank), self.strength())
            return self.delta(self.lora_A, self.lora_B, gate)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update at the rank in use to the weight, for inference.

        The merged weight is a new parameter; the one with W0 is kept aside untouched, with all that shares it (a tied
        output layer, an optimizer), until ``unmerge``.
        """
        if self.r == 0 or self.is_merged:
            return
        if is_quantised(self.weight):
            raise RuntimeError(
                f"{self.described()} is quantised, and its weight has no place for the update; loralib.merge(model, "
                "rank) makes a plain layer of it."
            )
        if is_managed(self):
            raise RuntimeError(
                f"{self.described()} is spread over processes by FSDP, which would not see a new weight; "
                "loralib.merge(model, rank) gives a whole model."
            )
        merged = self.weight + self.delta_weight().to(self.weight.dtype)
        self._base_weight = [self.weight]
        self.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put W0 back, bit for bit."""
        if self._base_weight is not None:
            (base,) = self._base_weight
            base.data = base.data.to(self.weight.device, self.weight.dtype)  # both may have been changed meanwhile
            self.weight, self._base_weight = base, None

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """As every module's, with W0: beside the factors a merged weight would count the update twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None:
            (base,) = self._base_weight
            destination[f"{prefix}weight"] = base if keep_vars else base.detach().to(self.weight)

    def _load_from_state_dict(self, *args, **kwargs):
        """As every module's; a merged layer is merged again with what it got."""
        merged = self.is_merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()

    def to_plain(self) -> nn.Module:
        """The plain layer that computes what this one computes at the rank in use; it takes over the parameters.

        For a layer around another that is the very module it was put around; around a quantised one a new nn.Linear, in
        the precision that the quantised one computes in.
        """
        if is_quantised(self.weight):
            return self._dequantised().train(self.training)
        self.merge()
        if self._base is not None:
            plain = self._base
            kept = {name: value for name, value in self._parameters.items() if name not in ("lora_A", "lora_B")}
            plain.__dict__["_parameters"] = kept  # the plain layer's own from here on
            return plain.train(self.training)
        with torch.device("meta"):
            plain = self.new_plain()
        for name in ("weight", "bias"):
            if getattr(self, name, None) is not None:
                setattr(plain, name, getattr(self, name))
        return plain.train(self.training)

    @torch.no_grad()
    def _dequantised(self) -> nn.Module:
        """nn.Linear with the weight as the quantised layer stands for it, and the update added."""
        weight, dtype = dequantised(self if self._base is None else self._base)
        merged = weight.to(torch.float32)
        if self.r:
            merged = merged + self.delta_weight().to(merged)
        merged = merged.T if getattr(self, "fan_in_fan_out", False) else merged
        plain = nn.Linear(merged.shape[1], merged.shape[0], bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(merged.to(dtype), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return plain

    def new_plain(self) -> nn.Module:
        """An empty layer of the plain type with this one's shapes and options."""
        raise NotImplementedError
