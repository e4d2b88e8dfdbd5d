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

from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import layer as stock
from peft.tuners.lora.torchao import TorchaoLoraLinear
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters.directory import EXTRA, WEIGHTS, read_facts
from .adapters.fingerprint import of_factors
from .adapters.hub import local
from .adapters.peft_format import PLAIN_STARTS
from .files import write_text
from .gate import check_scaling
from .quantised import is_quantised
from .within import HasRanks

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
# Facts of an adapter that only layers of ours keep, and what to do with one.
CUT = "cut it to a rank (dylora export)"
ELSEWHERE = {
    "components_at": ("ranks that importance spread over the layers", CUT),
    "strength_at": ("strengths that were learnt for each rank", "give no config, for its whole rank alone"),
    "scalings": ("several rules of strength", CUT),
    "projections": ("layers of several projections", CUT),
}


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
        if self.init_lora_weights not in PLAIN_STARTS:
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights!r} changes more than the adapter's start, so that its "
                "ranks are no ranks of an update of the model; leave it out."
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
        weights = Path(save_directory, WEIGHTS)  # PEFT writes them before the configuration
        facts |= {"factors": of_factors(load_file(weights))} if weights.exists() else {}
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
        for name, (what, instead) in ELSEWHERE.items():
            if name in facts:
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds {what}, which PEFT has no place for: {instead}, or load it "
                    "with loralib.load_adapter."
                )
        scaling = facts.get("scaling", "alpha/r")
        return cls(**given, rank_scaling="alpha/r" if scaling == "alpha/sqrt(b)" else scaling)

    def rule(self) -> str:
        """The scaling rule, in loralib's words."""
        return "alpha/sqrt(b)" if self.use_rslora else self.rank_scaling


# --- PEFT's layers, with ranks -------------------------------------------------------------------------


class Linear(HasRanks, stock.Linear):
    """PEFT's linear layer, with ranks."""


class LinearOfTorchao(HasRanks, TorchaoLoraLinear):
    """The same on a weight of torchao's."""


def linear(base_layer, adapter_name, config, **kwargs):
    """The class for an nn.Linear, which says nothing of what its weight is."""
    inner = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
    kind = LinearOfTorchao if is_quantised(inner.weight) else Linear
    config.fan_in_fan_out = False  # a Conv1D beside, which shares the configuration, has it on
    return kind(base_layer, adapter_name, config=config, **kwargs)


class LinearOnConv1D(HasRanks, stock.Linear):
    """The same on Hugging Face's Conv1D, whose weight is stored (in, out)."""

    def __init__(self, base_layer, adapter_name, config, **kwargs):
        config.fan_in_fan_out = True
        super().__init__(base_layer, adapter_name, config=config, **{**kwargs, "is_target_conv_1d_layer": True})


class Embedding(HasRanks, stock.Embedding):
    """PEFT's embedding, with ranks."""

    def _mixed_batch_forward(self, x, *args, adapter_names, **kwargs):
        # PEFT computes these without asking what kind of LoRA an adapter is.
        if ranked := self.__dict__.get("dylora_layers", {}).keys() & set(adapter_names):
            raise ValueError(
                f"adapter_names has {sorted(ranked)[0]!r}, whose embedding has ranks, and PEFT's embeddings take plain "
                "adapters alone in a batch of several: run one adapter at a time."
            )
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)


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

        from . import peft_bnb

        found[bnb.nn.Linear8bitLt] = peft_bnb.Linear8bitLt
        if is_bnb_4bit_available():
            found[bnb.nn.Linear4bit] = peft_bnb.Linear4bit
    # nn.MultiheadAttention is refused before the linear layers are looked at, any other module after.
    plain = {nn.MultiheadAttention: refuse, nn.Embedding: Embedding, nn.Linear: linear, Conv1D: LinearOnConv1D}
    return found | plain | {nn.Module: refuse}
