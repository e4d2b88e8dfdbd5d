"""Whole trainings: ours against the released code's settings, and against a sweep of LoRA runs with PEFT."""

import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed
from transformers_dylora.arguments import ModelArguments
from transformers_dylora.data import glue_task, load_glue, tokenize
from transformers_dylora.metrics import metrics_function
from transformers_dylora.minilm import write_roberta
from transformers_dylora.modeling import load_model, load_tokenizer

import loralib as lora
from loralib.trainer import DyLoRATrainer

from . import peers as peers
from .peers import R_MAX
from .rows import Options, Row, exact
from .timing import alternate, autocast

sys.path.append(str(Path(__file__).parents[2] / "examples" / "NLU" / "examples" / "text-classification"))

EPOCHS, BATCH, RATE = 3, 32, 1e-3
LIMITS = {"rte": 1 / 20, "cola": 1 / 80}  # ours against the released settings


@functools.cache
def encoder() -> str:
    return str(write_roberta(Path(tempfile.mkdtemp()) / "encoder"))


def tokens(task: str, options: Options, fresh: bool = False) -> dict:
    """The task's train and validation splits, tokenised as run_glue does it."""
    tokenizer, task = load_tokenizer(ModelArguments(encoder())), glue_task(task)
    raw = load_glue(task, options.data)
    return {name: tokenize(raw[name], task, tokenizer, 128, False, fresh) for name in ("train", "validation")}


def run_glue(task: str, options: Options, *flags: str) -> tuple[float, dict]:
    """Seconds and results of ``run_glue.py`` with these flags, from loading to the table."""
    import run_glue

    with tempfile.TemporaryDirectory() as directory:
        argv = [
            "--model_name_or_path", encoder(), "--task_name", task, "--apply_lora", "--lora_r", str(R_MAX),
            "--lora_alpha", "16", "--do_train", "--do_eval", "--learning_rate", str(RATE),
            "--num_train_epochs", str(EPOCHS),
            "--per_device_train_batch_size", str(BATCH), "--per_device_eval_batch_size", "64", "--warmup_ratio", "0.06",
            "--weight_decay", "0.1", "--output_dir", directory, "--report_to", "none", "--disable_tqdm", "true", *flags,
        ]  # fmt: skip
        if options.data:
            argv += ["--dataset_dir", options.data]
        start = time.perf_counter()
        found = run_glue.main(argv)
        return time.perf_counter() - start, found


def released(options: Options) -> Iterator[Row]:
    """Ours, bf16, all ranks measured and the adapter saved each epoch, against the released settings, fp32.

    These pad to 512 tokens, evaluate and save the whole model each epoch, and pass over the data once for each rank at
    the end. Their side is a part measured and scaled to the same number of examples and epochs.
    """
    shape = peers.MINILM
    model = peers.ours(shape, R_MAX, options.device)
    inputs = {
        key: value.to(options.device)
        for key, value in {
            "input_ids": torch.randint(5, 1000, (BATCH, 512)),
            "attention_mask": torch.ones(BATCH, 512, dtype=torch.long),
            "labels": torch.arange(BATCH) % 2,
        }.items()
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    draws = iter(range(10**6))

    def step():
        model.train()
        lora.set_rank(model, next(draws) % R_MAX + 1, frozen=True)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def evaluate():
        model.eval()
        with torch.no_grad(), autocast(options.device, "fp32"):
            model(**inputs)

    def save():
        with tempfile.TemporaryFile() as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    part = {name: min(seconds) for name, seconds in alternate(dict(step=step, evaluate=evaluate, save=save), 3).items()}
    for task in ("rte", "cola"):
        data = tokens(task, options)
        steps, measured = len(data["train"]) / BATCH, len(data["validation"]) / BATCH
        theirs = EPOCHS * (steps * part["step"] + measured * part["evaluate"] + part["save"])
        theirs += R_MAX * measured * part["evaluate"]
        each_epoch = ("--eval_strategy", "epoch", "--save_strategy", "epoch")
        seconds, found = run_glue(task, options, "--bf16", *each_epoch)
        _, exactly = run_glue(task, options)
        note = (
            f"batch {BATCH}, {EPOCHS} epochs, MiniLM; theirs scaled from steps of {part['step']:.1f} s; AURAC of ours "
            f"{aurac(found)} in bf16, {aurac(exactly)} in fp32"
        )
        yield exact(
            "whole recipe",
            task,
            "run_glue.py, bf16",
            "the released settings, fp32",
            "s",
            seconds,
            theirs,
            LIMITS[task],
            note,
        )


def aurac(found) -> str:
    return f"{100 * next(iter(found.aurac.values())):.1f}"


def sweep(options: Options) -> Iterator[Row]:
    """One DyLoRA training, all ranks measured at its end, against 8 PEFT runs at our own best settings."""
    for task in ("rte", "cola"):
        ours, theirs = [], []
        for r in (1, 8):
            ours.append(run_glue(task, options, "--bf16", "--eval_strategy", "no", "--save_strategy", "no")[0])
            theirs.append(peft_run(task, r, options))
        yield exact(
            "against a sweep", task, "one DyLoRA training", "8 LoRA trainings with PEFT", "s",
            sum(ours) / len(ours), R_MAX * sum(theirs) / len(theirs), 1 / (0.9 * R_MAX),
            f"batch {BATCH}, {EPOCHS} epochs, MiniLM, bf16, both sides with length-grouped batches; theirs is 8 times "
            "the mean of r = 1 and r = 8, each evaluated once",
        )  # fmt: skip


def peft_run(task_name: str, r: int, options: Options) -> float:
    """Seconds of one LoRA run with PEFT: the same data, batches, precision and Trainer."""
    from peft import LoraConfig, get_peft_model

    start = time.perf_counter()
    task, data, name = glue_task(task_name), tokens(task_name, options), encoder()
    tokenizer = load_tokenizer(ModelArguments(name))
    set_seed(0)
    model, _ = load_model(ModelArguments(name), task, training=True)
    config = LoraConfig(r=r, lora_alpha=16, target_modules=peers.TARGETS, task_type="SEQ_CLS")
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, learning_rate=RATE,
            num_train_epochs=EPOCHS, warmup_steps=0.06, weight_decay=0.1, bf16=True, use_cpu=options.device == "cpu",
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = DyLoRATrainer(
            model=get_peft_model(model, config),
            args=args,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=metrics_function(task),
        )
        trainer.train()
        metrics = trainer.evaluate()
        trainer.save_model()
        (Path(directory) / "results.json").write_text(json.dumps(metrics), encoding="utf-8")
    return time.perf_counter() - start
