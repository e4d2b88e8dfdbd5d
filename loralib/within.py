"""A layer of ours in one of PEFT's, whose factors it reads: one arithmetic serves both. And what makes a layer class
of PEFT's hold such layers."""

from typing import Any

import torch
from peft.tuners.lora import layer as stock
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from . import layers
from .quantised import unpack
from .state import RankState

# Bases as a type checker is to take them: for anything, since properties stand where plain layers have attributes.
_Any: Any = object
_Linear: Any = layers.Linear
_Embedding: Any = layers.Embedding
_Variant: Any = LoraVariant


class Within(_Any):
    """What makes a layer of ours that lives in one of PEFT's: its factors and its base are that one's."""

    holder: Any  # PEFT's layer
    adapter: str

    @classmethod
    def of(cls, holder: Any, adapter: str, scaling: str) -> Any:
        inner = cls.__new__(cls)
        nn.Module.__init__(inner)
        # Plain attributes: the layer of PEFT's is no child of ours, nor ours of it, so names and files stay PEFT's.
        inner.__dict__.update(holder=holder, adapter=adapter)
        inner.r, inner.lora_alpha, inner.scaling = holder.r[adapter], holder.lora_alpha[adapter], scaling
        inner.fan_in_fan_out = getattr(holder, "fan_in_fan_out", False)
        inner.__dict__["at_first"] = holder.scaling[adapter]
        inner.state, inner.layout = RankState(inner.r), None
        return inner

    @property
    def _base(self) -> nn.Module:
        return self.holder.get_base_layer()

    @property
    def weight(self) -> Any:
        return self._base.weight

    @property
    def bias(self):
        return getattr(self._base, "bias", None)

    @property
    def lora_A(self) -> nn.Parameter:
        return self.holder.lora_A[self.adapter].weight

    @property
    def lora_B(self) -> nn.Parameter:
        return self.holder.lora_B[self.adapter].weight

    @property
    def lora_dropout(self) -> nn.Module:
        return self.holder.lora_dropout[self.adapter] if len(self.holder.lora_dropout) else nn.Identity()

    @property
    def is_merged(self) -> bool:
        return bool(self.holder.merged)

    def first_components(self, b: int, frozen: bool = False):
        if self.lora_A.shape[0] != self.r:
            raise RuntimeError(
                f"{self.described()} has {self.lora_A.shape[0]} components, and was made with {self.r}: PEFT's "
                "hot-swapping does not tell the ranks; load the adapter under a name of its own (load_adapter)."
            )
        return super().first_components(b, frozen)

    def strength(self) -> float:
        # PEFT's scale_layer multiplies its own strength: ours goes along.
        return super().strength() * self.holder.scaling[self.adapter] / self.at_first

    def placed(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        share = self.holder.scaling[self.adapter] / self.at_first
        return super().placed(gate if share == 1 else gate * share, x)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """h, the output so far, plus the update of x."""
        self.begin(x)
        return self.finish(h, x)

    def train(self, mode: bool = True):
        self.training = mode
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, adapter={self.adapter!r}"


class LinearWithin(Within, _Linear):
    """The update of a linear layer of PEFT's, quantised ones too."""


class EmbeddingWithin(Within, _Embedding):
    """The update of an embedding of PEFT's."""

    @property
    def lora_A(self) -> nn.Parameter:
        return self.holder.lora_embedding_A[self.adapter]

    @property
    def lora_B(self) -> nn.Parameter:
        return self.holder.lora_embedding_B[self.adapter]

    @property
    def lora_dropout(self) -> nn.Module:
        return nn.Identity()  # as in PEFT: the input is indices

    @property
    def padding_idx(self):
        return self._base.padding_idx


class Ranks(_Variant):
    """What PEFT asks a kind of LoRA for."""

    @staticmethod
    def init(module, adapter_name: str, config: Any, **kwargs) -> None:
        kind = EmbeddingWithin if isinstance(module, stock.Embedding) else LinearWithin
        inner = module.__dict__.setdefault("dylora_layers", {})
        inner[adapter_name] = kind.of(module, adapter_name, config.rule())

    @staticmethod
    def forward(module, active_adapter: str, x, result, **kwargs):
        inner = module.dylora_layers[active_adapter]
        inner.training = module.training
        return inner(x, result)

    @staticmethod
    def _delta(module, adapter: str, like: torch.Tensor) -> torch.Tensor:
        return module.dylora_layers[adapter].delta_weight().detach().to(like.device, like.dtype)

    @classmethod
    def merge_safe(cls, module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + cls._delta(module, active_adapter, orig_weight)

    @classmethod
    def merge_unsafe(cls, module, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += cls._delta(module, active_adapter, orig_weight)

    @classmethod
    def unmerge(cls, module, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - cls._delta(module, active_adapter, orig_weight)


class HasRanks(_Any):
    """Put before a layer class of PEFT's: adapters of a DyLoraConfig get ranks, plain ones beside stay plain."""

    def resolve_lora_variant(self, *, config, **kwargs):
        if hasattr(config, "rank_scaling"):
            return Ranks()
        return super().resolve_lora_variant(config=config, **kwargs)

    @property
    def dylora_layer(self):
        """The layer of ours for the first active adapter that has ranks, or None."""
        inner = self.__dict__.get("dylora_layers", {})
        return next((inner[name] for name in self.active_adapters if name in inner), None)

    def _cast_input_dtype(self, x, dtype):
        # A layer of ours casts where it must (under autocast it need not); this is for adapters without ranks.
        inner = self.__dict__.get("dylora_layers", {})
        ours = not self.__dict__.get("dylora_mixed") and all(name in inner for name in self.active_adapters)
        return x if ours else super()._cast_input_dtype(x, dtype)

    def _mixed_batch_forward(self, *args, **kwargs):
        # An adapter for each example: not those that are active.
        self.__dict__["dylora_mixed"] = True
        try:
            return super()._mixed_batch_forward(*args, **kwargs)
        finally:
            self.__dict__.pop("dylora_mixed", None)  # PEFT may have come here again within

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        # What PEFT takes for the update without asking the variant: convert_to_lora, and merging on torchao's weights.
        inner = self.__dict__.get("dylora_layers", {})
        return inner[adapter].delta_weight().detach() if adapter in inner else super().get_delta_weight(adapter)

    def merge(self, *args, **kwargs) -> None:
        unpack(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        unpack(self.get_base_layer())
        super().unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__.get("dylora_layers", {}).pop(adapter_name, None)
