"""Timing for a noisy machine: the contenders take turns, and what counts is the ratio of neighbours."""

import contextlib
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, with a 95 percent interval of that median by bootstrap over rounds."""

    median: float
    low: float
    high: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def alternate(contenders: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each contender in each round; all run once in every round, in an order drawn anew, after one
    warm-up."""
    draw = random.Random(0)
    names = list(contenders)
    found = {name: [] for name in names}
    for number in range(rounds + 1):
        draw.shuffle(names)
        for name in names:
            synchronize(device)
            start = time.perf_counter()
            contenders[name]()
            synchronize(device)
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def paired_ratio(ours: list[float], peer: list[float]) -> Ratio:
    """ours / peer, round by round."""
    ratios = np.array(ours) / np.array(peer)
    draw = np.random.default_rng(0)
    medians = np.median(ratios[draw.integers(0, len(ratios), (4000, len(ratios)))], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def saved_bytes(run: Callable[[], object], parameters: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of ``run``, ``parameters`` not counted."""
    theirs = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return sum(storages.values())


def product_rate(dtype: torch.dtype, device: str, size: int = 2048) -> float:
    """Floating point operations a second of the fastest of some square matrix products: the machine's limit."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    seconds = alternate({"product": lambda: a @ b}, 8, device)["product"]
    return 2 * size**3 / min(seconds)


def autocast(device: str, dtype: str):
    """The context of a precision: "fp32", or autocast to "bf16" or "fp16"."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype])
