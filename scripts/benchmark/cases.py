"""The cases by name, and the small ones: files, start-up, padding, tokenisation. A case yields ``Row``s."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers_dylora.data import padding_share

import loralib as lora
from loralib.training.batching import GroupedBatches

from . import peers as peers
from . import recipes as recipes
from . import steps as steps
from .evaluation import all_ranks
from .language import language_steps
from .peers import R_MAX
from .rows import Options, Row, exact, median, timed
from .timing import alternate


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
    script = Path(__file__).parents[2] / "examples" / "NLU" / "examples" / "text-classification" / "run_glue.py"

    def process(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)

    torch_alone, with_us = "import torch", "import torch, loralib; loralib.inject"
    times = alternate(
        {with_us: process("-c", with_us), torch_alone: process("-c", torch_alone)}, 3 if options.quick else 15
    )
    added = [1000 * (a - b) for a, b in zip(times[with_us], times[torch_alone], strict=True)]
    note = f"adds {median(added):.0f} ms (promised: under 50)"
    yield from timed("start-up", "a fresh process", times, with_us, None, {torch_alone: note})
    times = alternate(
        {
            "run_glue.py --help": process(str(script), "--help"),
            "import transformers.trainer": process("-c", "import transformers.trainer"),
        },
        2 if options.quick else 8,
    )
    yield from timed("start-up", "a fresh process", times, "run_glue.py --help", {"import transformers.trainer": 1.3})


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


QUICK = {
    "saved": steps.saved,
    "recipe-step": steps.recipe_step,
    "steps": steps.steps,
    "overhead": steps.overhead,
    "language-steps": language_steps,
    "all-ranks": all_ranks,
    "compiled": steps.compiled,
    "checkpoints": checkpoints,
    "start-up": start_up,
}
FULL = QUICK | {
    "padding": padding,
    "tokenisation": tokenisation,
    "released-recipe": recipes.released,
    "sweep": recipes.sweep,
}
