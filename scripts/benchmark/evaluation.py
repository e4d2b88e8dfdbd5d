"""Evaluation of all ranks, beside one pass a rank of the model without adapter."""

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial

import torch

import loralib as lora
from loralib import all_ranks as ranks_at_once

from . import peers as peers
from .peers import R_MAX, ROBERTA_BASE
from .rows import Options, Row, timed
from .steps import batch, run_glues_savings
from .timing import alternate, autocast


def all_ranks(options: Options) -> Iterator[Row]:
    """Logits of ranks 1..8 of the same batches, against 8 forward passes of the stock model without any adapter."""
    sizes = [(16, 32)] if options.quick else [(16, 12), (32, 64)]
    for shape, (rows, length), dtype in itertools.product(options.shapes(), sizes, options.dtypes):
        rounds = 6 if options.quick else 4 if shape is ROBERTA_BASE and length > 12 else 10
        inputs = batch(rows, length, options.device)
        del inputs["labels"]
        model, plain = (make(shape, R_MAX, options.device).eval() for make in (peers.overlay, peers.peft))
        frozen = peers.stock(shape, options.device).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.02)

        ours = "DyLoRA, 8 ranks"
        contenders = {
            ours: partial(at_all_ranks, model, inputs, options, dtype),
            "stock model, 8 passes": partial(repeated, frozen, inputs, options, dtype),
            "PEFT LoRA, 8 passes": partial(repeated, plain, inputs, options, dtype),
        }
        if not options.quick:
            contenders |= {
                "ours, never stacked": partial(at_all_ranks, model, inputs, options, dtype, budget=0),
                "ours, all ranks stacked": partial(at_all_ranks, model, inputs, options, dtype, budget=10**9),
            }
        with torch.no_grad(), autocast(options.device, dtype):
            whole = [at_rank(model, inputs, b) for b in range(1, R_MAX + 1)]
        with run_glues_savings(model, dtype):  # around an evaluation, as DyLoRATrainer has it: batches are many
            contenders[ours]()
            apart = max(float((a - b).abs().max()) for a, b in zip(contenders[ours](), whole, strict=True))
            times = alternate(contenders, rounds, options.device)
        yield from timed(
            "all ranks", f"{shape.name}, batch {rows} x {length}, {dtype}", times, ours,
            {"stock model, 8 passes": 0.95}, {"stock model, 8 passes": f"logits within {apart:.0e} of whole passes"},
        )  # fmt: skip


def at_all_ranks(model, inputs: dict, options: Options, dtype: str, budget: int | None = None) -> list[torch.Tensor]:
    """Logits of ranks 1..8 as DyLoRATrainer makes them."""
    with torch.no_grad(), autocast(options.device, dtype), stacking(budget):
        return [output.logits for _, output in lora.at_ranks(model, inputs, range(1, R_MAX + 1))]


def repeated(model, inputs: dict, options: Options, dtype: str) -> list[torch.Tensor]:
    with torch.no_grad(), autocast(options.device, dtype):
        return [model(**inputs).logits for _ in range(R_MAX)]


@contextlib.contextmanager
def stacking(budget: int | None):
    """Another ``STACKED_TOKENS``; None: the library's."""
    before = ranks_at_once.STACKED_TOKENS
    ranks_at_once.STACKED_TOKENS = before if budget is None else budget
    try:
        yield
    finally:
        ranks_at_once.STACKED_TOKENS = before


def at_rank(model, inputs, rank) -> torch.Tensor:
    with lora.use_rank(model, rank):
        return model(**inputs).logits
