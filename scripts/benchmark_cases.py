"""What is measured, one function a case; each yields ``Row``s of ours against one peer."""

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import benchmark_peers as peers
import benchmark_recipes as recipes
import torch
from benchmark_peers import MINILM, ROBERTA_BASE, Shape
from benchmark_rows import Options, Row, exact, median, timed
from benchmark_timing import alternate, autocast, paired_ratio, product_rate, saved_bytes
from torch.utils.flop_counter import FlopCounterMode
from transformers_dylora.data import padding_share

import loralib as lora
from loralib import sharing
from loralib.batching import GroupedBatches
from loralib.precision import frozen_weights_in
from loralib.sharing import passes, share_between_ranks

R_MAX, BUILDS = 8, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def batch(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (rows, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows, device=device) % 2}


# --- training step --------------------------------------------------------------------------------------


def training_step(model, inputs: dict, device: str, dtype: str, before=lambda step: None) -> Callable[[], None]:
    """One update: ranks set, forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    steps = iter(range(10**9))

    def run():
        before(next(steps))
        with autocast(device, dtype):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def drawn(model, r: int, rows: int, per: str) -> Callable[[int], None]:
    sampler = lora.RankSampler(r, per=per)
    return lambda step: lora.set_rank(model, sampler(step, rows))


def step_contenders(shape: Shape, r: int, inputs: dict, device: str, dtype: str, everyone: bool) -> dict:
    """{name: one training step}. ``everyone``: beside PEFT also microsoft's layers, LyCORIS and the frozen model."""
    rows = len(inputs["labels"])
    models = {"PEFT LoRA": peers.peft(shape, r, device)}
    if everyone:
        models |= {
            "microsoft loralib": peers.microsoft(shape, r, device),
            "LyCORIS dylora": peers.lycoris(shape, r, device),
            "frozen encoder, head alone": peers.stock(shape, device),
        }
    found = {}
    for per in ("example", "step"):
        model = peers.ours(shape, r, device)
        found[f"DyLoRA, rank per {per}"] = training_step(model, inputs, device, dtype, drawn(model, r, rows, per))
    for name, model in models.items():
        if model is not None:
            found[name] = training_step(model, inputs, device, dtype)
    return found


PEFT_LIMIT = {"PEFT LoRA": 1.03}


def steps(options: Options) -> Iterator[Row]:
    """The training step at equal work: the same stock model, all layers whole."""
    rows, length = (16, 32) if options.quick else (16, 64)
    for shape in options.shapes():
        inputs = batch(rows, length, options.device)
        for dtype in options.dtypes:
            setting = f"{shape.name}, batch {rows} x {length}, {dtype}"
            # Built anew a few times: where a model lies in memory changes its time by a percent or two.
            times = {}
            for _ in range(BUILDS):
                contenders = step_contenders(shape, R_MAX, inputs, options.device, dtype, everyone=not options.quick)
                for name, seconds in alternate(contenders, 7 if shape is MINILM else 5, options.device).items():
                    times.setdefault(name, []).extend(seconds)
            for per in ("example", "step"):
                yield from timed("training step", setting, times, f"DyLoRA, rank per {per}", PEFT_LIMIT)


def recipe_step(options: Options) -> Iterator[Row]:
    """The step as run_glue makes it, and how near it is to the limit."""
    rows, length = (16, 32) if options.quick else (16, 64)
    inputs = batch(rows, length, options.device)
    for shape in options.shapes():
        seconds = {}
        for dtype in options.dtypes:
            model = peers.overlay(shape, R_MAX, options.device)
            inner = training_step(model, inputs, options.device, dtype, drawn(model, R_MAX, rows, "example"))
            name = "run_glue's step"
            plain = peers.peft(shape, R_MAX, options.device)
            with run_glues_savings(model, dtype):
                with FlopCounterMode(display=False) as counter:
                    inner()
                times = alternate(
                    {name: inner, "PEFT LoRA": training_step(plain, inputs, options.device, dtype)}, 15, options.device
                )
            rate = product_rate(DTYPES[dtype], options.device)
            share = counter.get_total_flops() / median(times[name]) / rate
            note = f"{100 * share:.0f} % of the {dtype} matrix-product peak, {rate / 1e9:.0f} GFLOP/s"
            yield from timed(
                "run_glue's training step", f"{shape.name}, batch {rows} x {length}, {dtype}", times, name,
                {"PEFT LoRA": 1.0}, {"PEFT LoRA": note},
            )  # fmt: skip
            seconds[dtype] = times[name]
        found = paired_ratio(seconds["bf16"], seconds["fp32"])
        yield Row(
            "bf16 against fp32", f"{shape.name}, batch {rows} x {length}", "run_glue's step, bf16",
            "run_glue's step, fp32", "ms", 1000 * median(seconds["bf16"]), 1000 * median(seconds["fp32"]),
            found.median, found.low, found.high, 1 / 1.6 if shape is ROBERTA_BASE else None,
        )  # fmt: skip


def saved(options: Options) -> Iterator[Row]:
    """What autograd keeps for the backward pass. Per step: at r_max, which keeps most. Per example: the gate, 512 bytes, too."""
    inputs = batch(16, 64, options.device)
    for shape, dtype in itertools.product(options.shapes(), options.dtypes):

        def kept(model, rank=None, dtype=dtype) -> float:
            if rank is not None:
                lora.set_rank(model.train(), rank)
            with autocast(options.device, dtype):
                return saved_bytes(lambda: model.train()(**inputs).loss, model.parameters()) / 1e6

        ranks = torch.arange(16) % R_MAX + 1
        theirs = kept(peers.peft(shape, R_MAX, options.device))
        model, trained = (make(shape, R_MAX, options.device) for make in (peers.ours, peers.overlay))
        with run_glues_savings(trained, dtype):
            in_run_glue = kept(trained, ranks)
        ours = {"rank per example": kept(model, ranks), "rank per step": kept(model, R_MAX), "in run_glue": in_run_glue}
        for name, value in ours.items():
            setting = f"{shape.name}, batch 16 x 64, {dtype}"
            yield exact("saved for backward", setting, f"DyLoRA, {name}", "PEFT LoRA", "MB", value, theirs, 1.0001)


# --- evaluation of all ranks ----------------------------------------------------------------------------


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
            "ours, never stacked": partial(at_all_ranks, model, inputs, options, dtype, budget=0),
            "ours, all ranks stacked": partial(at_all_ranks, model, inputs, options, dtype, budget=10**9),
        }
        with torch.no_grad(), autocast(options.device, dtype):
            whole = [at_rank(model, inputs, b) for b in range(1, R_MAX + 1)]
        apart = max(float((a - b).abs().max()) for a, b in zip(contenders[ours](), whole, strict=True))
        times = alternate(contenders, rounds, options.device)
        yield from timed(
            "all ranks", f"{shape.name}, batch {rows} x {length}, {dtype}", times, ours,
            {"stock model, 8 passes": 0.95}, {"stock model, 8 passes": f"logits within {apart:.0e} of whole passes"},
        )  # fmt: skip


def at_all_ranks(model, inputs: dict, options: Options, dtype: str, budget: int | None = None) -> list[torch.Tensor]:
    """Logits of ranks 1..8 as DyLoRATrainer makes them."""
    with (
        torch.no_grad(),
        autocast(options.device, dtype),
        run_glues_savings(model, dtype),
        share_between_ranks(model) as new_batch,
        stacking(budget),
    ):
        plan = passes(inputs, list(range(1, R_MAX + 1)))
        new_batch(*(own for _, _, own in plan))
        found = []
        for ranks, rank, own in plan:
            found += at_rank(model, own, rank).chunk(len(ranks))
        return found


def repeated(model, inputs: dict, options: Options, dtype: str) -> list[torch.Tensor]:
    with torch.no_grad(), autocast(options.device, dtype):
        return [model(**inputs).logits for _ in range(R_MAX)]


@contextlib.contextmanager
def run_glues_savings(model, dtype: str):
    """What DyLoRATrainer does around training and evaluation: the last block for the first token, weights rounded once."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.first_token_only())
        if dtype != "fp32":
            stack.enter_context(frozen_weights_in(model, DTYPES[dtype]))
        yield


@contextlib.contextmanager
def stacking(budget: int | None):
    """Another ``STACKED_TOKENS``; None: the library's."""
    before = sharing.STACKED_TOKENS
    sharing.STACKED_TOKENS = before if budget is None else budget
    try:
        yield
    finally:
        sharing.STACKED_TOKENS = before


def at_rank(model, inputs, rank) -> torch.Tensor:
    with lora.use_rank(model, rank):
        return model(**inputs).logits


# --- checkpoints, start-up ------------------------------------------------------------------------------


def checkpoints(options: Options) -> Iterator[Row]:
    """Saving what an epoch leaves."""
    shape = options.shapes()[-1]
    model, other, whole = (
        peers.ours(shape, R_MAX, options.device),
        peers.peft(shape, R_MAX, options.device),
        peers.stock(shape, options.device),
    )
    with tempfile.TemporaryDirectory() as directory:
        folders = {name: Path(directory) / name for name in ("ours", "peft", "whole")}
        times = alternate(
            {
                "DyLoRA save_adapter": lambda: lora.save_adapter(model, folders["ours"]),
                "PEFT save_pretrained": lambda: other.save_pretrained(folders["peft"]),
                "whole model": lambda: whole.save_pretrained(folders["whole"]),
            },
            10,
        )
        sizes = {name: sum(f.stat().st_size for f in folder.iterdir()) for name, folder in folders.items()}
    yield from timed("checkpoint time", shape.name, times, "DyLoRA save_adapter")
    for name, peer in (("peft", "PEFT save_pretrained"), ("whole", "whole model")):
        yield exact(
            "checkpoint size", shape.name, "DyLoRA save_adapter", peer, "MB", sizes["ours"] / 1e6, sizes[name] / 1e6
        )


def start_up(options: Options) -> Iterator[Row]:
    """Fresh Python processes: what importing and answering cost."""
    script = Path(__file__).parents[1] / "examples" / "NLU" / "examples" / "text-classification" / "run_glue.py"

    def process(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)

    torch_alone, with_us = "import torch", "import torch, loralib"
    times = alternate(
        {with_us: process("-c", with_us), torch_alone: process("-c", torch_alone)}, 5 if options.quick else 15
    )
    added = [1000 * (a - b) for a, b in zip(times[with_us], times[torch_alone], strict=True)]
    note = f"adds {median(added):.0f} ms (promised: under 50)"
    yield from timed("start-up", "a fresh process", times, with_us, None, {torch_alone: note})
    times = alternate(
        {
            "run_glue.py --help": process(str(script), "--help"),
            "import transformers.trainer": process("-c", "import transformers.trainer"),
        },
        3 if options.quick else 8,
    )
    yield from timed("start-up", "a fresh process", times, "run_glue.py --help", {"import transformers.trainer": 1.3})


# --- data -----------------------------------------------------------------------------------------------


def padding(options: Options) -> Iterator[Row]:
    """The share of padding in an epoch of length-grouped batches, against shuffled ones (needs --data)."""
    for task in ("rte", "cola"):
        lengths = recipes.tokens(task, options)["train"]["length"]
        for size in (8, 16, 32):
            shares = [
                padding_share(lengths, batches)
                for batches in (GroupedBatches(lengths, size, 32 // size, seed=0), shuffled(len(lengths), size))
            ]
            yield exact(
                "padding", f"{task}, {size} per device", "length-grouped", "shuffled", "% of tokens",
                100 * shares[0], 100 * shares[1],
            )  # fmt: skip


def shuffled(n: int, size: int) -> list[list[int]]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(size)


def tokenisation(options: Options) -> Iterator[Row]:
    """A second run finds the tokens of the first (needs --data)."""
    times = alternate(
        {
            "from the cache": lambda: recipes.tokens("rte", options),
            "anew": lambda: recipes.tokens("rte", options, fresh=True),
        },
        5,
    )
    yield from timed("tokenisation", "rte, all splits", times, "from the cache")


# --- a GPU's case ---------------------------------------------------------------------------------------


def compiled(options: Options) -> Iterator[Row]:
    """The gated path under torch.compile with CUDA graphs: one compilation serves every draw of ranks."""
    if options.device == "cpu":
        return
    inputs = batch(16, 64, options.device)
    for shape in options.shapes():
        plain, model = (peers.ours(shape, R_MAX, options.device) for _ in range(2))
        fast = torch.compile(model, mode="reduce-overhead")
        gate = torch.zeros(16, R_MAX, device=options.device)  # CUDA graphs read the same memory each time

        def draw(step: int, gate=gate) -> None:
            ranks = lora.RankSampler(R_MAX)(step, 16).to(gate.device)
            gate.copy_(lora.gate.rank_gate(ranks, R_MAX, peers.ALPHA, "alpha/b"))

        for each in (plain, model):
            lora.set_gate(each, gate)
        contenders = {
            "DyLoRA, compiled": training_step(fast, inputs, options.device, "bf16", draw),
            "not compiled": training_step(plain, inputs, options.device, "bf16", draw),
        }
        torch._dynamo.utils.counters.clear()
        times = alternate(contenders, 15, options.device)
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        note = {"not compiled": f"{count} graphs compiled for 16 draws of ranks"}
        yield from timed("compiled step", f"{shape.name}, batch 16 x 64, bf16", times, "DyLoRA, compiled", None, note)


QUICK = {
    "saved": saved,
    "recipe-step": recipe_step,
    "steps": steps,
    "all-ranks": all_ranks,
    "compiled": compiled,
    "checkpoints": checkpoints,
    "start-up": start_up,
}
FULL = QUICK | {
    "padding": padding,
    "tokenisation": tokenisation,
    "released-recipe": recipes.released,
    "sweep": recipes.sweep,
}
