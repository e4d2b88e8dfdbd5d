"""The contenders: one frozen RoBERTa, adapted at query and value by us and by each peer."""

import importlib.util
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import RobertaConfig
from transformers.models.roberta.modeling_roberta import RobertaForSequenceClassification as StockRoberta
from transformers_dylora.models.roberta import RobertaForSequenceClassification

import loralib as lora

TARGETS = ["query", "value"]
R_MAX, ALPHA = 8, 16


@dataclass(frozen=True)
class Shape:
    """An encoder's size. The vocabulary is small: it costs memory and no time."""

    name: str
    width: int
    layers: int
    heads: int

    def config(self) -> RobertaConfig:
        return RobertaConfig(
            vocab_size=1000,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            max_position_embeddings=514,
            pad_token_id=1,
            num_labels=2,
            problem_type="single_label_classification",  # else the first forward sets it, and torch.compile starts anew
        )

    def cut(self, layers: int) -> "Shape":
        return replace(self, name=f"{self.name}, {layers} of its {self.layers} layers", layers=layers)


ROBERTA_BASE = Shape("RoBERTa-base", 768, 12, 12)
MINILM = Shape("MiniLM", 384, 6, 12)


def stock(shape: Shape, device: str) -> nn.Module:
    """The plain model, its head trainable and the rest frozen."""
    torch.manual_seed(0)
    model = StockRoberta(shape.config()).to(device)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def ours(shape: Shape, r: int, device: str) -> nn.Module:
    """loralib's layers in the stock model, as ``inject`` puts them there."""
    model = lora.inject(stock(shape, device), TARGETS, r, ALPHA, scaling="alpha/b")
    lora.mark_only_lora_as_trainable(model)
    return model


def overlay(shape: Shape, r: int, device: str) -> nn.Module:
    """The model that run_glue trains: loralib's layers, and the last block computes the first token alone if asked."""
    config = shape.config()
    config.apply_lora, config.lora_r, config.lora_alpha = True, r, ALPHA
    config.lora_dropout, config.lora_scaling = 0.0, "alpha/b"
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config).to(device)
    missing = model.load_state_dict(stock(shape, device).state_dict(), strict=False).missing_keys
    assert all("lora_" in name for name in missing), missing
    lora.mark_only_lora_as_trainable(model)
    return model


def peft(shape: Shape, r: int, device: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        stock(shape, device), LoraConfig(r=r, lora_alpha=ALPHA, target_modules=TARGETS, task_type="SEQ_CLS")
    )


def microsoft_module():
    """microsoft/LoRA's package, which has our import name, under another; None where env.sh has not put it."""
    folder = Path(sys.prefix) / "peers" / "loralib"
    if not folder.exists():
        return None
    spec = importlib.util.spec_from_file_location(
        "microsoft_loralib", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["microsoft_loralib"] = module
    spec.loader.exec_module(module)
    return module


def microsoft(shape: Shape, r: int, device: str) -> nn.Module | None:
    library = microsoft_module()
    if library is None:
        return None
    model = stock(shape, device)
    for layer in model.roberta.encoder.layer:
        for name in TARGETS:
            plain = getattr(layer.attention.self, name)
            adapted = library.Linear(
                plain.in_features, plain.out_features, r=r, lora_alpha=ALPHA, merge_weights=False, device=device
            )
            adapted.load_state_dict(plain.state_dict(), strict=False)
            adapted.bias.requires_grad_(False)
            setattr(layer.attention.self, name, adapted)
    return model


def lycoris(shape: Shape, r: int, device: str) -> nn.Module | None:
    """LyCORIS's ``dylora`` with one component a block, as the paper has it."""
    if importlib.util.find_spec("lycoris") is None:
        return None
    from lycoris import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    model = stock(shape, device)
    LycorisNetwork.apply_preset(
        {"enable_conv": False, "target_module": [], "target_name": [f".*{name}" for name in TARGETS]}
    )
    network = LycorisNetwork(model, 1.0, lora_dim=r, alpha=ALPHA, network_module="dylora", block_size=1)
    network.apply_to()
    network.to(device)
    assert len(network.loras) == 2 * shape.layers, len(network.loras)
    model.lycoris = network  # its parameters train with the model's
    return model
