"""What a cell trains: the model with its adapter, its data tokenised, and what it is measured by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import DataCollatorWithPadding

from .adalora import with_adalora
from .cells import ALL_LINEAR, USUAL_TARGETS, Budget, Cell
from .language import load_language


@dataclass
class Loaded:
    model: object
    tokenizer: object
    train: object
    measured: object
    collator: object
    metric: str  # the main one
    compute_metrics: Callable | None = None  # of a classifier


def updates(cell: Cell, examples: int) -> int:
    """How many updates the cell's training has."""
    return math.ceil(examples / cell.budget.batch) * math.ceil(cell.budget.epochs)


def load(cell: Cell, base: str, data: str | None) -> Loaded:
    """``base``: the encoder's directory, or the language model's. The random state decides how an adapter starts."""
    return Loaded(*load_language(cell, base, data)) if cell.task == "webnlg" else load_glue_cell(cell, base, data)


def load_glue_cell(cell: Cell, encoder: str, data: str | None) -> Loaded:
    from transformers_dylora.arguments import ModelArguments
    from transformers_dylora.data import glue_task
    from transformers_dylora.metrics import metrics_function
    from transformers_dylora.modeling import load_model, load_tokenizer

    method, task = cell.trained, glue_task(cell.task)
    args = ModelArguments(
        encoder,
        apply_lora=not method.adalora,
        lora_r=method.r,
        lora_alpha=method.alpha,
        lora_scaling=method.scaling,
        lora_target_modules={USUAL_TARGETS: None, ALL_LINEAR: [ALL_LINEAR]}[cell.targets],
    )
    tokenizer = load_tokenizer(args)
    train, measured = load_splits(task, cell.budget, cell.split, tokenizer, data)
    model, _ = load_model(args, task, training=True)
    if method.adalora:
        targets = ALL_LINEAR if cell.targets == ALL_LINEAR else cell.targets.split(",")
        model = with_adalora(model, method.r, targets, updates(cell, len(train)))
    collator = DataCollatorWithPadding(tokenizer)
    return Loaded(model, tokenizer, train, measured, collator, task.main_metric, metrics_function(task))


def load_splits(task, budget: Budget, split: str, tokenizer, data: str | None):
    """The training data and what the run is measured on, tokenised; the same for every method."""
    from transformers_dylora.data import load_glue, tokenize

    raw = load_glue(task, data)
    train = raw["train"]
    if budget.train and budget.train < len(train):
        train = train.shuffle(seed=0).select(range(budget.train))
    if split == "held_out":
        halves = train.train_test_split(test_size=0.1, seed=0)
        train, measured = halves["train"], halves["test"]
    else:
        measured = raw[task.splits("validation")[0]]
        if budget.validation:
            measured = measured.select(range(min(budget.validation, len(measured))))
    return (tokenize(part, task, tokenizer, budget.max_length, False, False) for part in (train, measured))
