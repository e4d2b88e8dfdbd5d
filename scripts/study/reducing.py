"""A trained LoRA of rank r_max made smaller: by rank in every layer, or by components over all layers."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

import loralib as lora
from loralib.layers import LoRALayer
from loralib.model import lora_layers

LOOKED_AT = 1024  # training examples from which importance is measured


def cut(model, name: str, encoder: str, directory: str, task) -> None:
    """Change the trained lora-8 in place, so that its ranks are what the way ``name`` of cutting gives."""
    layers = dict(lora_layers(model))
    if name in ("cut-svd", "cut-fisher"):
        for path, (A, B) in svd_components(model, encoder, directory, task).items():
            layer = layers[path]
            layer.lora_A.data.copy_(A)
            layer.lora_B.data.copy_(B * layer.r / layer.lora_alpha)
    for layer in layers.values():
        layer.scaling = "alpha/b" if name == "cut-alpha/b" else "alpha/r"


def svd_components(model, encoder: str, directory: str, task) -> dict:
    """lora_A and lora_B of every layer after peft's reduction at r_max: its first b components are that at rank b."""
    from peft import PeftModel, convert_to_lora
    from transformers import AutoModelForSequenceClassification

    lora.save_adapter(model, Path(directory) / "adapter")
    stock = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=task.num_labels)
    adapted = PeftModel.from_pretrained(stock, str(Path(directory) / "adapter"))
    config, state = convert_to_lora(adapted, rank=lora.max_rank(model))
    strength = config.lora_alpha / config.r
    found = {}
    for key, A in state.items():
        if key.endswith(".lora_A.weight"):
            B = state[key.replace(".lora_A.", ".lora_B.")]
            found[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")] = (A, B * strength)
    return found


def importance(model, batches: Iterable[dict]) -> dict[LoRALayer, torch.Tensor]:
    """How much the loss depends on each component of each layer at r_max: {layer: (r,)}.

    The mean over examples i of (d loss_i / d gate_ij)^2, the Fisher information of gates that every example has of its
    own; ``batches`` hold ``labels`` of a classification.
    """
    layers = [layer for _, layer in lora_layers(model)]
    found = {layer: torch.zeros(layer.r) for layer in layers}
    count = 0
    for batch in batches:
        labels = batch["labels"]
        gates = [torch.full((len(labels), layer.r), layer.strength(), requires_grad=True) for layer in layers]
        for layer, gate in zip(layers, gates, strict=True):
            layer.set_gate(gate)
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        for layer, gradient in zip(layers, torch.autograd.grad(loss, gates), strict=True):
            found[layer] += gradient.square().sum(0)
        count += len(labels)
        lora.set_rank(model, lora.max_rank(model))  # what ``strength`` of the next batch is asked at
    return {layer: total / count for layer, total in found.items()}


def most_important(scores: dict[LoRALayer, torch.Tensor], b: int) -> dict[LoRALayer, torch.Tensor]:
    """Which components to keep so that as many are left as at rank b, for layers of one size: {layer: bool (r,)}."""
    flat = torch.cat(list(scores.values()))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(b * len(scores)).indices] = True
    return dict(zip(scores, chosen.split([len(each) for each in scores.values()]), strict=True))


def with_the_most_important(model, batches: Iterable[dict], levels: Iterable[int]):
    """Yield each level b with the model reduced to the parameters of rank b; afterwards it is whole again."""
    training = model.training
    scores = importance(model.eval(), batches)
    whole = {layer: layer.lora_B.detach().clone() for layer in scores}
    for b in levels:
        for layer, chosen in most_important(scores, b).items():
            layer.lora_B.data.copy_(whole[layer] * chosen)
        yield b
    for layer, value in whole.items():
        layer.lora_B.data.copy_(value)
    model.train(training)
