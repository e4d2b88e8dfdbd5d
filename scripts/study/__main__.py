"""Does one DyLoRA run match a whole LoRA sweep? Train and measure the methods of methods.py on GLUE data.

    python -m scripts.study rates  --encoder DIR --data DIR     # choose each method's learning rate, on a tenth of train
    python -m scripts.study tried  --encoder DIR --data DIR     # what else was tried, at one rate on the same tenth
    python -m scripts.study runs   --encoder DIR --data DIR     # every task, method and seed, on validation
    python -m scripts.study tables                              # results/study: tables, curves, cost
    python -m scripts.study cell rte mixed 0 --encoder DIR --data DIR       # one run again; prints what it found

``DIR`` of --encoder is what `python -m transformers_dylora.minilm DIR` writes, that of --data holds GLUE tasks as
run_glue.py's --dataset_dir (without --data: from the hub). Runs are appended to results/study/runs.jsonl, one line each; a
run that has its line is not repeated, so an interrupted command goes on where it was. Every run has one core to itself.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from .methods import CUTS, METHODS, SWEEP, TRIED, StudyTrainer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "study"


@dataclass(frozen=True)
class Budget:
    """What a task gets: training epochs, and the fixed subsets of its data (None: all of it)."""

    epochs: float
    max_length: int = 128
    train: int | None = None
    validation: int | None = None


BUDGETS = {
    "cola": Budget(epochs=4),
    "rte": Budget(epochs=4),
    "sst2": Budget(epochs=2, train=10_000),
    "mnli": Budget(epochs=2, validation=3_000),
    "qnli": Budget(epochs=2, validation=3_000),
    "qqp": Budget(epochs=2, validation=3_000),
}
BATCH = 32
RATES = (5e-4, 1e-3, 2e-3)
# What a rate is chosen on: tasks and seeds. Two of CoLA, since at 2e-3 some seeds of every method collapse there.
RATE_RUNS = (("rte", 0), ("cola", 0), ("cola", 1))
TRIED_RATE = 1e-3
SWEEP_ENDS = ("lora-1", "lora-8")


@dataclass(frozen=True)
class Cell:
    """One training run. ``split`` "held_out": train on nine tenths of train, measure on the last tenth."""

    task: str
    method: str
    seed: int
    rate: float
    split: str = "validation"

    def done(self, records: list[dict]) -> bool:
        return any(all(record[k] == v for k, v in vars(self).items()) for record in records)


def read_records(file: Path) -> list[dict]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def chosen_rates(records: list[dict]) -> dict[str, float]:
    """Each method's best rate by AURAC on the held-out tenths, averaged over tasks; only methods measured at all rates.

    The sweep is one method: its rate is the best for the mean of its ends, ``SWEEP_ENDS``.
    """
    scores = {
        (record["method"], record["rate"], record["task"], record["seed"]): record["aurac"]
        for record in records
        if record["split"] == "held_out"
    }
    weight = {task: 1 / sum(t == task for t, _ in RATE_RUNS) for task, _ in RATE_RUNS}
    found = {}
    for method in {key[0] for key in scores}:
        family = SWEEP_ENDS if method in SWEEP_ENDS else (method,)
        own = {
            rate: sum(
                weight[task] * scores.get((name, rate, task, seed), -math.inf)
                for name in family
                for task, seed in RATE_RUNS
            )
            for rate in RATES
        }
        if min(own.values()) > -math.inf:
            found[method] = max(own, key=own.get)
    if SWEEP_ENDS[0] in found:
        found |= dict.fromkeys(SWEEP, found[SWEEP_ENDS[0]])
    return found


# --- one run ------------------------------------------------------------------------------------------


def run_cell(cell: Cell, encoder: str, data: str | None) -> list[dict]:
    """Train and measure; one record, and for lora-8 one more for each way to cut it."""
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
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=cell.rate,
            num_train_epochs=budget.epochs,
            warmup_steps=0.06,
            weight_decay=0.1,
            bf16=True,
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
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        facts = {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "commit": commit()}
        records = [record(cell, trainer, measured, task) | facts]
        if cell.method == "lora-8" and cell.split == "validation":
            trainer.eval_ranks = list(range(1, method.r + 1))
            for name in CUTS:
                cut(model, name, encoder, directory, task)
                own = Cell(cell.task, name, cell.seed, cell.rate, cell.split)
                records.append(record(own, trainer, measured, task) | facts)
    return records


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
        "aurac": round(100 * metrics[f"x_aurac_{task.main_metric}"], 4),
        "evaluation_seconds": round(seconds, 1),
    }


def cut(model, name: str, encoder: str, directory: str, task) -> None:
    """Change the trained lora-8 in place, so that its ranks are what the way ``name`` of cutting gives."""
    from loralib.model import lora_layers

    layers = dict(lora_layers(model))
    if name == "cut-svd":
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

    import loralib as lora

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


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


# --- many runs ----------------------------------------------------------------------------------------


def run_all(cells: list[Cell], options) -> None:
    """Run what has no line yet, in order, in ``options.processes`` processes of one thread."""
    file = Path(options.results) / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not cell.done(read_records(file))]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are there", flush=True)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(run_cell, cell, options.encoder, options.data): cell for cell in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            records = future.result()
            with open(file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(found) + "\n" for found in records)
            cell, found = waiting[future], records[0]
            print(
                f"{number}/{len(missing)} {cell.task} {cell.method} seed {cell.seed} rate {cell.rate:g} {cell.split}: "
                f"AURAC {found['aurac']:.1f}, {found['seconds']:.0f} s",
                flush=True,
            )


def rate_cells(methods: list[str], rates: list[float]) -> list[Cell]:
    own = [name for name in methods if name not in SWEEP or name in SWEEP_ENDS]
    return [Cell(task, name, seed, rate, "held_out") for name in own for rate in rates for task, seed in RATE_RUNS]


def run_cells(tasks: list[str], methods: list[str], seeds: list[int], rates: dict[str, float]) -> list[Cell]:
    """Seed by seed, so that a whole table stands early."""
    return [Cell(task, name, seed, rates[name]) for seed in seeds for task in tasks for name in methods]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rates", "tried", "runs", "tables", "cell"])
    parser.add_argument("cell", nargs="*", metavar="task method seed", help="for cell: which one")
    parser.add_argument("--encoder", help="directory of the encoder")
    parser.add_argument("--data", help="directory of the GLUE tasks; default: the hub's")
    parser.add_argument("--tasks", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *TRIED], help="default: all the command is for")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, choices=RATES, help="for rates and tried: these alone")
    parser.add_argument("--rate", type=float, help="for cell: instead of the chosen one")
    parser.add_argument("--held-out", action="store_true", help="for cell: measure on a tenth of train")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", default=str(RESULTS), help="where runs.jsonl and the tables are")
    options = parser.parse_args(argv)
    # The workers inherit this: one core each.
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.command == "tables":
        from .tables import write_tables

        records = read_records(Path(options.results) / "runs.jsonl")
        return write_tables(Path(options.results), records, chosen_rates(records), BUDGETS)
    if not options.encoder:
        parser.error(f"{options.command} needs --encoder; `python -m transformers_dylora.minilm DIR` writes one.")
    records = read_records(Path(options.results) / "runs.jsonl")
    rates = chosen_rates(records)
    if options.command == "rates":
        return run_all(rate_cells(options.methods or [*METHODS], options.rates or RATES), options)
    if options.command == "tried":
        return run_all(rate_cells(options.methods or [*TRIED], options.rates or [TRIED_RATE]), options)
    if options.command == "runs":
        methods = options.methods or [*METHODS]
        without = [name for name in methods if name not in rates]
        if without:
            parser.error(
                f"{', '.join(without)}: no learning rate is chosen yet; run `python -m scripts.study rates` first."
            )
        return run_all(run_cells(options.tasks, methods, options.seeds, rates), options)
    if len(options.cell) != 3 or options.cell[0] not in BUDGETS or options.cell[1] not in {**METHODS, **CUTS, **TRIED}:
        parser.error(
            f"cell needs a task ({', '.join(BUDGETS)}), a method ({', '.join([*METHODS, *CUTS, *TRIED])}) and a seed."
        )
    task, name, seed = options.cell
    trained = "lora-8" if name in CUTS else name
    if not options.rate and trained not in rates:
        parser.error(f"{trained}: no learning rate is chosen yet; give --rate.")
    split = "held_out" if options.held_out else "validation"
    cell = Cell(task, trained, int(seed), options.rate or rates[trained], split)
    for found in run_cell(cell, options.encoder, options.data):
        if found["method"] == name:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
