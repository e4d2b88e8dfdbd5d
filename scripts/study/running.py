"""Training and measuring cells, one after the other or several at a time."""

import json
import math
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from transformers import TrainerCallback

from loralib.training.precision import cpu_multiplies_bf16

from .cells import BATCH, BUDGETS, Budget, Cell, area, read_records
from .methods import CUTS, METHODS, MIXED, PARTS, R_MAX, SHOWN, TRIED, StudyTrainer
from .reducing import LOOKED_AT, cut, to_keep, with_components

ROOT = Path(__file__).resolve().parents[2]


def run_cell(cell: Cell, encoder: str, data: str | None, keep: str | None = None) -> list[dict]:
    """Train and measure; one record, and for lora-8 one more for each way to cut it. ``keep``: see ``__main__``."""
    import torch
    from transformers import DataCollatorWithPadding, TrainingArguments, set_seed, utils
    from transformers_dylora.arguments import ModelArguments
    from transformers_dylora.data import glue_task
    from transformers_dylora.metrics import metrics_function
    from transformers_dylora.modeling import load_model, load_tokenizer

    torch.set_num_threads(1)
    utils.logging.set_verbosity_error()
    method, task, budget = {**METHODS, **TRIED}[cell.method], glue_task(cell.task), BUDGETS[cell.task]
    model_args = ModelArguments(
        encoder, apply_lora=True, lora_r=method.r, lora_alpha=method.alpha, lora_scaling=method.scaling
    )
    tokenizer = load_tokenizer(model_args)
    train, measured = load_splits(task, budget, cell.split, tokenizer, data)
    trunk = Path(keep) / f"{cell.task}-{cell.seed}-{cell.rate:g}-{cell.split}" if keep else None
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            str(trunk) if trunk and cell.method == "lora-8" else directory,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=cell.rate,
            num_train_epochs=budget.epochs,
            warmup_steps=0.06,
            weight_decay=0.1,
            bf16=precision() == "bf16",
            use_cpu=not torch.accelerator.is_available(),
            seed=cell.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        set_seed(cell.seed)
        model, _ = load_model(model_args, task, training=True)
        trainer = StudyTrainer(
            method,
            model=model,
            args=args,
            train_dataset=train,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics_function(task),
        )
        start, checkpoint = time.perf_counter(), None
        if trunk and cell.method == "lora-8":
            trainer.add_callback(SaveParts())
        elif trunk and method.shares_trunk:
            steps = math.ceil(len(train) / BATCH) * budget.epochs
            checkpoint = trunk / f"checkpoint-{part_of(method.schedule.full_rank_share, int(steps))}"
            checkpoint = str(checkpoint) if checkpoint.exists() else None
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        facts = {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "commit": commit()}
        facts["precision"] = precision()
        facts |= {"from": "lora-8"} if checkpoint else {}
        if trunk and cell.method == "lora-8":
            trainer.save_model(str(trunk))
        records = [record(cell, trainer, measured, task) | facts]
        for name, made in CUTS.items():
            if made.of == cell.method:
                own = Cell(cell.task, name, cell.seed, cell.rate, cell.split)
                if made.of == "lora-8":
                    cut(model, name, encoder, directory, task)
                if made.by == "rank":
                    trainer.eval_ranks = list(SHOWN)
                    records.append(record(own, trainer, measured, task) | facts)
                else:
                    trainer.eval_ranks = [R_MAX]
                    records.append(reduced(own, made.by, trainer, measured, task) | facts)
    return records


def precision() -> str:
    """What a run computes in: bf16 autocast, or fp32 where the processor has no bf16 products."""
    import torch

    return "bf16" if torch.accelerator.is_available() or cpu_multiplies_bf16() else "fp32"


def part_of(share: float, steps: int) -> int:
    """The update before which the first part of the training ends."""
    return replace(MIXED, full_rank_share=share).resolve(R_MAX, "alpha/r", steps).full_steps


class SaveParts(TrainerCallback):
    """Saves a checkpoint wherever a method's first part may end."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in {part_of(share, state.max_steps) for share in PARTS}


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


def record(cell: Cell, trainer, measured, task) -> dict:
    """The scores (0-100) of every rank of the model as it is."""
    start = time.perf_counter()
    metrics = trainer.predict(measured, metric_key_prefix="x").metrics
    seconds = time.perf_counter() - start
    scores = {str(b): round(100 * metrics[f"x_r{b}_{task.main_metric}"], 4) for b in trainer.eval_ranks}
    return {
        **vars(cell),
        "metric": task.main_metric,
        "scores": scores,
        "evaluation_seconds": round(seconds, 1),
    }


def reduced(cell: Cell, by: str, trainer, measured, task) -> dict:
    """The record of the model with as many components as at ranks 1, 2, 4 and 8, chosen over all layers."""
    looked_at = trainer.train_dataset.shuffle(seed=0)
    looked_at = looked_at.select(range(min(LOOKED_AT, len(looked_at))))
    kept = to_keep(trainer.model, by, SHOWN, trainer.get_eval_dataloader(looked_at))
    found = {b: record(cell, trainer, measured, task) for b in with_components(trainer.model, kept)}
    scores = {str(b): each["scores"][str(R_MAX)] for b, each in found.items()}
    seconds = sum(each["evaluation_seconds"] for each in found.values())
    return found[R_MAX] | {"scores": scores, "evaluation_seconds": round(seconds, 1)}


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def run_all(cells: list[Cell], options) -> None:
    """Run what has no line yet, in order, in ``options.processes`` processes of one thread."""
    file = Path(options.results) / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not cell.done(read_records(file))]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are there", flush=True)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_cell, cell, options.encoder, options.data, options.keep): cell for cell in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            records = future.result()
            with open(file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(found) + "\n" for found in records)
            cell, found = waiting[future], records[0]
            print(
                f"{number}/{len(missing)} {cell.task} {cell.method} seed {cell.seed} rate {cell.rate:g} {cell.split}: "
                f"AURAC {area(found['scores']):.1f}, {found['seconds']:.0f} s",
                flush=True,
            )
