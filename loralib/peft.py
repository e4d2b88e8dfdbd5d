"""DyLoRA inside PEFT: ``get_peft_model(model, DyLoraConfig(...))`` gives a PeftModel whose adapter has ranks.

    from loralib.peft import DyLoraConfig
    from peft import get_peft_model

    model = get_peft_model(model, DyLoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

On it ``lora.set_rank``, ``use_rank``, ``at_ranks``, ``order_components``, ``freeze_undrawn``, ``RankSchedule``,
``save_adapter(rank=)`` and the trainers work as on a model after ``lora.inject``; all of PEFT's own (several adapters,
merging, ``save_pretrained``, quantised bases) works as with a ``LoraConfig``. Each layer of PEFT's holds a layer of
ours that reads its factors: one arithmetic serves both. Tried with PEFT 0.21; what it uses of PEFT's private parts is
held to the installed release by tests/loralib/test_peft.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import layer as stock
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import layers
from .adapters.directory import EXTRA, read_facts
from .adapters.hub import local
from .files import write_text
from .gate import check_scaling
from .quantised import is_quantised, unpack
from .state import RankState

# Fields of LoraConfig under which an adapter is more or other than a low-rank update with ranks to choose.
OTHERS = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters", "trainable_token_indices"),
    *(
        "layer_replication",
        "alora_invocation_tokens",
        "arrow_config",
        "velora_config",
        "monteclora_config",
        "kasa_config",
    ),
)


@dataclass
class DyLoraConfig(LoraConfig):
    """PEFT's ``LoraConfig`` for an adapter that works at every rank from 1 to r.

    Args (beside LoraConfig's):
        rank_scaling: strength at rank b: "alpha/r" (one strength for all ranks) or "alpha/b" (the paper's). With
            ``use_rslora`` it is alpha/sqrt(b).

    Saved it is a plain LoRA configuration: stock PEFT loads the adapter. Raises ValueError for settings of LoraConfig
    with which an adapter has no ranks to choose (DoRA and the like).
    """

    rank_scaling: str = field(default="alpha/r", metadata={"help": 'Strength at rank b: "alpha/r" or "alpha/b".'})

    def __post_init__(self):
        super().__post_init__()
        for name in OTHERS:
            if getattr(self, name, None):
                raise ValueError(
                    f"{name} = {getattr(self, name)!r}: such an adapter has no ranks to choose; leave it out."
                )
        if self.bias != "none":
            raise ValueError(f"bias = {self.bias!r} trains biases, which belong to no rank; give bias='none'.")
        check_scaling(self.rank_scaling, 1)
        self._register_custom_module(layer_classes())

    def to_dict(self) -> dict:
        """LoraConfig's fields alone, so that stock PEFT knows what it reads."""
        known = {one.name for one in fields(LoraConfig)}
        return {name: value for name, value in super().to_dict().items() if name in known}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's; ``dylora.json`` beside it holds what LoraConfig has no field for."""
        super().save_pretrained(save_directory, **kwargs)
        r_max = max(self.r, *(self.rank_pattern or {}).values(), 1)
        facts = {"rank": r_max, "r_max": r_max, "lora_alpha": self.lora_alpha, "scaling": self.rule()}
        write_text(Path(save_directory, EXTRA), json.dumps(facts, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs
    ) -> DyLoraConfig:
        """The configuration of a saved adapter, for ``PeftModel.from_pretrained(.., config=..)``."""
        plain = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        known = {one.name for one in fields(LoraConfig) if one.init}
        given = {name: value for name, value in vars(plain).items() if name in known}
        facts = read_facts(
            local(pretrained_model_name_or_path, kwargs.get("token"), kwargs.get("revision")) / (subfolder or "")
        )
        if "components_at" in facts:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds ranks that importance spread over the layers; PEFT has none "
                "such: cut it to a rank (dylora export), or load it with loralib.load_adapter."
            )
        scaling = facts.get("scaling", "alpha/r")
        return cls(**given, rank_scaling="alpha/r" if scaling == "alpha/sqrt(b)" else scaling)

    def rule(self) -> str:
        """The scaling rule, in loralib's words."""
        return "alpha/sqrt(b)" if self.use_rslora else self.rank_scaling


# --- a layer of ours that reads the factors of PEFT's --------------------------------------------------


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
    def init(module, adapter_name: str, config: DyLoraConfig, **kwargs) -> None:
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
        if isinstance(config, DyLoraConfig):
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

    def merge(self, *args, **kwargs) -> None:
        unpack(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        unpack(self.get_base_layer())
        super().unmerge()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.__dict__.get("dylora_layers", {}).pop(adapter_name, None)


class Linear(HasRanks, stock.Linear):
    """PEFT's linear layer, with ranks."""


class LinearOfTorchao(HasRanks, TorchaoLoraLinear):
    """The same on a weight of torchao's."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        # What PEFT adds to this kind of weight, and takes out again, without asking the variant.
        inner = self.__dict__.get("dylora_layers", {})
        return inner[adapter].delta_weight().detach() if adapter in inner else super().get_delta_weight(adapter)


def linear(base_layer, adapter_name, config, **kwargs):
    """The class for an nn.Linear, which says nothing of what its weight is."""
    inner = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
    kind = LinearOfTorchao if is_quantised(inner.weight) else Linear
    return kind(base_layer, adapter_name, config=config, **kwargs)


class LinearOnConv1D(HasRanks, stock.Linear):
    """The same on Hugging Face's Conv1D, whose weight is stored (in, out)."""

    def __init__(self, base_layer, adapter_name, config, **kwargs):
        if not config.fan_in_fan_out:
            config.fan_in_fan_out = True
        super().__init__(base_layer, adapter_name, config=config, **{**kwargs, "is_target_conv_1d_layer": True})


class Embedding(HasRanks, stock.Embedding):
    """PEFT's embedding, with ranks."""


def refuse(base_layer, adapter_name, config, **kwargs):
    """For modules that PEFT would adapt without ranks."""
    raise ValueError(
        f"{type(base_layer).__name__} cannot have ranks inside PEFT; leave it out of target_modules, or adapt the "
        "model with loralib.inject."
    )


def layer_classes() -> dict[type, Any]:
    """PEFT's custom modules: {base layer's class: our layer}, the first that fits counts."""
    found: dict[type, Any] = {}
    if is_bnb_available():
        import bitsandbytes as bnb
        from peft.tuners.lora import bnb as stock_bnb

        found[bnb.nn.Linear8bitLt] = type("Linear8bitLt", (HasRanks, stock_bnb.Linear8bitLt), {})
        if is_bnb_4bit_available():
            found[bnb.nn.Linear4bit] = type("Linear4bit", (HasRanks, stock_bnb.Linear4bit), {})
    # nn.MultiheadAttention is refused before the linear layers are looked at, any other module after.
    plain = {nn.MultiheadAttention: refuse, nn.Embedding: Embedding, nn.Linear: linear, Conv1D: LinearOnConv1D}
    return found | plain | {nn.Module: refuse}
