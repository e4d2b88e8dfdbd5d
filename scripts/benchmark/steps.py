"""The training step: its time beside the peers', its share of the machine's limit, what it keeps in memory."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

import loralib as lora
from loralib.gate import rank_gate
from loralib.pacing import usual_paces
from loralib.training.precision import frozen_weights_in

from . import peers as peers
from .peers import R_MAX, ROBERTA_BASE, Shape
from .rows import Options, Row, exact, median, timed
from .timing import DTYPES, alternate, autocast, paired_ratio, product_rate, saved_bytes

BUILDS = 6


def batch(rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (rows, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows, device=device) % 2}


@contextlib.contextmanager
def run_glues_savings(model, dtype: str):
    """What DyLoRATrainer does around training and evaluation: the last block for the first token, weights rounded
    once."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.first_token_only())
        if dtype != "fp32":
            stack.enter_context(frozen_weights_in(model, DTYPES[dtype], model.device.type))
        yield


def training_step(
    model, inputs: dict, device: str, dtype: str, before=lambda step: None, paces=None
) -> Callable[[], None]:
    """One update: ranks set, forward, backward, AdamW, at ``paces`` if there are any."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    if paces:
        lora.pace_components(optimizer, model, paces)
    steps = iter(range(10**9))

    def run():
        before(next(steps))
        with autocast(device, dtype):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


HALVING = "example, halving, paced"
PER = ("example", "step", HALVING)


def drawn(model, r: int, rows: int, per: str) -> Callable[[int], None]:
    sampler = lora.RankSampler(r, distribution="halving") if per == HALVING else lora.RankSampler(r, per=per)
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
    for per in PER:
        model = peers.ours(shape, r, device)
        paces = usual_paces(r) if per == HALVING else None
        own = training_step(model, inputs, device, dtype, drawn(model, r, rows, per), paces)
        found[f"DyLoRA, rank per {per}"] = own
    for name, model in models.items():
        if model is not None:
            found[name] = training_step(model, inputs, device, dtype)
    return found


PEFT_LIMIT = {"PEFT LoRA": 1.03}
NARROW = Shape("MiniLM at width 48", 48, 6, 2)


def overhead(options: Options) -> Iterator[Row]:
    """A step whose arithmetic is next to nothing: what is left is Python, and on a GPU the launches of kernels."""
    rows, length = 4, 4
    inputs = batch(rows, length, options.device)
    contenders = step_contenders(NARROW, R_MAX, inputs, options.device, "fp32", everyone=False)
    for step in contenders.values():
        step()
    times = alternate(contenders, 150, options.device)
    for per in PER:
        yield from timed(
            "overhead of a step", f"{NARROW.name}, batch {rows} x {length}", times, f"DyLoRA, rank per {per}",
            {"PEFT LoRA": 1.1},
        )  # fmt: skip


def steps(options: Options) -> Iterator[Row]:
    """The training step at equal work: the same stock model, all layers whole."""
    rows, length = (16, 32) if options.quick else (16, 64)
    for shape in options.shapes():
        inputs = batch(rows, length, options.device)
        for dtype in options.dtypes:
            setting = f"{shape.name}, batch {rows} x {length}, {dtype}"
            # Built anew a few times: where a model lies in memory changes its time by a percent or two.
            times = {}
            for _ in range(BUILDS // 2 if options.quick else BUILDS):
                contenders = step_contenders(shape, R_MAX, inputs, options.device, dtype, everyone=not options.quick)
                for name, seconds in alternate(contenders, 4, options.device).items():
                    times.setdefault(name, []).extend(seconds)
            for per in PER:
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
            found.median, found.low, found.high, 1 / 1.6 if shape is ROBERTA_BASE else None, of_machine=True,
        )  # fmt: skip


def saved(options: Options) -> Iterator[Row]:
    """What autograd keeps for the backward pass. Per step: at r_max, which keeps most. Per example: the gate, 512
    bytes, too."""
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
            kept(trained, ranks)  # the first pass shows which weights are to be rounded
            in_run_glue = kept(trained, ranks)
        ours = {"rank per example": kept(model, ranks), "rank per step": kept(model, R_MAX), "in run_glue": in_run_glue}
        for name, value in ours.items():
            setting = f"{shape.name}, batch 16 x 64, {dtype}"
            yield exact("saved for backward", setting, f"DyLoRA, {name}", "PEFT LoRA", "MB", value, theirs, 1.0001)


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
            gate.copy_(rank_gate(ranks, R_MAX, peers.ALPHA, "alpha/b"))

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
