"""Layers of every kind, an input for each, and the dense formula they are checked against."""

import contextlib
import socket

import torch
from torch import nn

import loralib as lora

IDS = torch.arange(12).reshape(3, 4) + torch.arange(3)[:, None] * 7  # three examples for a language model


@torch.no_grad()
def logits_at(model, rank=None) -> torch.Tensor:
    """What the model gives for IDS, at ``rank`` or at the rank that is set."""
    with contextlib.nullcontext() if rank is None else lora.use_rank(model, rank):
        return model(input_ids=IDS).logits


KINDS = ("linear", "fan_in_fan_out", "merged", "embedding", "conv1d", "conv2d", "conv3d")


def make(kind: str, r: int, alpha: float = 4.0, scaling: str = "alpha/b", dtype=torch.float64):
    """A layer with random factors (so that the update is not zero) and an input of 5 examples."""
    options = dict(r=r, lora_alpha=alpha, scaling=scaling)
    if kind == "linear":
        layer, x = lora.Linear(6, 7, **options), torch.randn(5, 3, 6)
    elif kind == "fan_in_fan_out":
        layer, x = lora.Linear(6, 7, fan_in_fan_out=True, **options), torch.randn(5, 3, 6)
    elif kind == "merged":
        layer, x = lora.MergedLinear(6, 9, enable_lora=[True, False, True], **options), torch.randn(5, 3, 6)
    elif kind == "embedding":
        layer, x = lora.Embedding(11, 7, **options), torch.randint(0, 11, (5, 3))
    elif kind == "conv1d":
        layer, x = lora.Conv1d(4, 6, 3, groups=2, padding=1, **options), torch.randn(5, 4, 6)
    elif kind == "conv2d":
        layer, x = lora.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="reflect", **options), torch.randn(5, 4, 6, 6)
    else:
        layer, x = lora.Conv3d(4, 6, 2, dilation=2, **options), torch.randn(5, 4, 5, 5, 5)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer = layer.to(dtype)
    return layer, x.to(dtype) if x.is_floating_point() else x


def strength(b: int, r: int, alpha: float, scaling: str) -> float:
    return alpha / {"alpha/b": max(b, 1), "alpha/r": r, "alpha/sqrt(b)": max(b, 1) ** 0.5}[scaling]


def dense_delta(kind: str, layer, b: int) -> torch.Tensor:
    """The change of the weight at rank b, term by term from the definition: a sum over components of outer products."""
    A, B, r = layer.lora_A, layer.lora_B, layer.r
    total = torch.zeros_like(layer.weight)
    for j in range(b):
        if kind in ("linear", "fan_in_fan_out"):
            term = torch.outer(B[:, j], A[j])
            total = total + (term.T if kind == "fan_in_fan_out" else term)
        elif kind == "embedding":
            total = total + torch.outer(A[j], B[:, j])
        elif kind == "merged":
            out = layer.out_features // 3
            first = torch.outer(B[:out, j], A[j])
            last = torch.outer(B[out:, j], A[r + j])
            total = total + torch.cat([first, torch.zeros_like(first), last])
        else:
            k = layer.kernel_size[0]
            rows = slice(j * k, (j + 1) * k)
            total = total + (B[:, rows] @ A[rows]).view(layer.weight.shape)
    return strength(b, r, layer.lora_alpha, layer.scaling) * total


def dense_forward(kind: str, layer, x, b: int) -> torch.Tensor:
    """What the layer must give at rank b: the plain torch operation with the weight W0 + delta."""
    weight = layer.weight + dense_delta(kind, layer, b)
    if kind in ("linear", "merged"):
        return nn.functional.linear(x, weight, layer.bias)
    if kind == "fan_in_fan_out":
        return x @ weight + layer.bias
    if kind == "embedding":
        return weight[x]
    return layer._conv_forward(x, weight, layer.bias)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
