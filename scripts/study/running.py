"""Training and measuring cells, one after the other or several at a time."""

import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from transformers import TrainerCallback

from loralib.training.precision import cpu_multiplies_bf16

from .adalora import Allocate
from .cells import BUDGETS, LANGUAGE, Cell, area, read_records
from .loading import Loaded, load, updates
from .methods import CUTS, MIXED, PARTS, R_MAX, SHOWN, shown_up_to
from .private import with_heads
from .reducing import LOOKED_AT, as_trained, cut, to_keep, with_components
from .trainer import StudyTrainer

CUT_EVERYWHERE = ("cut-svd",)  # the others are measured in the main tables alone
ROOT = Path(__file__).resolve().parents[2]


def run_cell(cell: Cell, base: str, data: str | None, keep: str | None = None) -> list[dict]:
    """Train and measure; one record, and for lora-8 one more for each way to cut it.

    ``base``: the encoder's directory, or the language model's. ``keep``: see ``__main__``.
    """
    import torch
    from transformers import TrainingArguments, set_seed, utils

    torch.set_num_threads(1)
    repeatable()
    utils.logging.set_verbosity_error()
    trunk = trunk_of(cell, keep)
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            str(trunk) if trunk and cell.is_trunk else directory,
            per_device_train_batch_size=cell.budget.batch,
            per_device_eval_batch_size=64 if cell.task in BUDGETS else cell.budget.batch,
            learning_rate=cell.rate,
            num_train_epochs=cell.budget.epochs,
            warmup_steps=0.06,
            weight_decay=0.1,
            bf16=precision() == "bf16",
            tf32=precision() == "tf32" or None,
            use_cpu=not torch.accelerator.is_available(),
            seed=cell.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        set_seed(cell.seed)
        loaded = load(cell, base, data)
        trainer = StudyTrainer(
            cell.trained,
            model=loaded.model,
            args=args,
            train_dataset=loaded.train,
            processing_class=loaded.tokenizer,
            data_collator=loaded.collator,
            compute_metrics=loaded.compute_metrics,
        )
        facts = train(cell, trainer, trunk)
        records = [record(cell, trainer, loaded) | facts]
        restore = as_trained(loaded.model) if cell.is_trunk else None
        for name, made in CUTS.items():
            if made.of != cell.method or not measured(cell, name):
                continue
            own = replace(cell, method=name)
            if restore:
                restore()
                cut(loaded.model, name)
            if made.by == "strengths":
                of = "cut-svd" if cell.is_trunk else cell.method
                before = next(each["scores"] for each in records if each["method"] == of)
                records.append(fitted(own, trainer, loaded, facts, before))
            elif made.by == "rank":
                trainer.eval_ranks = list(shown_up_to(cell.r_max))
                records.append(record(own, trainer, loaded) | facts)
            else:
                records.append(reduced(own, made.by, trainer, loaded) | facts)
    return records


def measured(cell: Cell, name: str) -> bool:
    """Whether this way to cut is measured for the cell."""
    if CUTS[name].tried:
        return cell.is_lead
    if CUTS[name].by == "strengths" and cell.task in LANGUAGE:
        return True
    return cell.usual or name in CUT_EVERYWHERE


def trunk_of(cell: Cell, keep: str | None) -> Path | None:
    """Where the plain training of this cell's task, seed, rate, r_max and targets leaves its checkpoints."""
    if keep is None:
        return None
    apart = "" if cell.usual else f"-{cell.r_max}-{cell.targets}"
    return Path(keep) / f"{cell.task}-{cell.seed}-{cell.rate:g}-{cell.split}{apart}"


def train(cell: Cell, trainer, trunk: Path | None) -> dict:
    """Train, from the trunk's checkpoint where there is one; what is known of the training afterwards."""
    start, checkpoint = time.perf_counter(), None
    if trunk and cell.is_trunk:
        trainer.add_callback(SaveParts())
    elif trunk and cell.goes_on:
        step = part_of(cell.trained.schedule.full_rank_share, updates(cell, len(trainer.train_dataset)))
        checkpoint = trunk / f"checkpoint-{step}"
        checkpoint = str(checkpoint) if checkpoint.exists() else None
    if cell.trained.adalora:
        trainer.add_callback(Allocate())
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    if trunk and cell.is_trunk:
        trainer.save_model(str(trunk))
    facts = {"steps": trainer.state.global_step, "seconds": round(seconds, 1), "commit": commit()}
    facts |= {"precision": precision(), "device": device()}
    return facts | ({"from": "lora-8"} if checkpoint else {})


def precision() -> str:
    """What a run computes in: fp32 with TF32 products on CUDA, bf16 autocast on a processor that has its products, else
    fp32."""
    import torch

    if torch.accelerator.is_available():
        return "tf32" if torch.cuda.is_available() else "fp32"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def device() -> str:
    """What a run computes on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.accelerator.current_accelerator() or "cpu")


def repeatable() -> None:
    """On CUDA: deterministic kernels alone; torch raises where an operation has none."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False


def part_of(share: float, steps: int) -> int:
    """The update before which the first part of the training ends."""
    return replace(MIXED, full_rank_share=share).resolve(R_MAX, "alpha/r", steps).full_steps


class SaveParts(TrainerCallback):
    """Saves a checkpoint wherever a method's first part may end."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in {part_of(share, state.max_steps) for share in PARTS}


def record(cell: Cell, trainer, loaded: Loaded) -> dict:
    """The scores (0-100; losses as they are) of every rank of the model as it is."""
    start = time.perf_counter()
    if loaded.metric == "loss":
        metrics, factor = trainer.evaluate(loaded.measured, metric_key_prefix="x"), 1
    else:
        metrics, factor = trainer.predict(loaded.measured, metric_key_prefix="x").metrics, 100
    seconds = time.perf_counter() - start
    names = {b: f"x_r{b}_{loaded.metric}" for b in trainer.eval_ranks} or {cell.trained.r: f"x_{loaded.metric}"}
    scores = {str(b): round(factor * metrics[name], 4) for b, name in names.items()}
    return {**vars(cell), "metric": loaded.metric, "scores": scores, "evaluation_seconds": round(seconds, 1)}


def reduced(cell: Cell, by: str, trainer, loaded: Loaded) -> dict:
    """The record of the model with as many components as at ranks 1, 2, 4 and 8, chosen over all layers, or at these
    ranks with what each gets for itself."""
    found, private = {}, by == "heads"
    examples = trainer.train_dataset.shuffle(seed=0)
    if private:
        levels = with_heads(trainer.model, trainer.get_eval_dataloader(examples), trainer.accelerator.autocast)
    else:
        looked_at = examples.select(range(min(LOOKED_AT, len(examples))))
        kept = to_keep(trainer.model, by, SHOWN, trainer.get_eval_dataloader(looked_at))
        levels = with_components(trainer.model, kept)
    for b in levels:
        trainer.eval_ranks = [b if private else R_MAX]
        found[b] = record(cell, trainer, loaded)
    scores = {str(b): each["scores"][str(b if private else R_MAX)] for b, each in found.items()}
    seconds = sum(each["evaluation_seconds"] for each in found.values())
    return found[R_MAX] | {"scores": scores, "evaluation_seconds": round(seconds, 1)}


def fitted(cell: Cell, trainer, loaded: Loaded, facts: dict, before: dict) -> dict:
    """The record of every rank once strengths of each rank's own are learnt, the time of that counted, with the scores
    of the same weights ``before``; the model is then as it was."""
    restore, start = as_trained(trainer.model), time.perf_counter()
    trainer.fit_strengths()
    seconds = round(facts["seconds"] + time.perf_counter() - start, 1)
    trainer.eval_ranks = list(shown_up_to(cell.r_max))
    found = record(cell, trainer, loaded) | facts | {"seconds": seconds, "before": before}
    restore()
    return found


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def run_all(cells: list[Cell], options) -> None:
    """Run what has no line yet, in order, in ``options.processes`` processes of one thread; one is this process."""
    file = Path(options.results) / "runs.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not cell.done(read_records(file))]
    print(f"{len(cells) - len(missing)} of {len(cells)} runs are there", flush=True)
    several = options.processes > 1
    with ProcessPoolExecutor(options.processes, get_context("spawn")) if several else ThreadPoolExecutor(1) as pool:
        waiting = {pool.submit(run_cell, cell, options.base, options.data, options.keep): cell for cell in missing}
        for number, future in enumerate(as_completed(waiting), 1):
            records = future.result()
            with open(file, "a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(found, separators=(",", ":")) + "\n" for found in records)
            cell, found = waiting[future], records[0]
            print(
                f"{number}/{len(missing)} {cell.task} {cell.method} seed {cell.seed} rate {cell.rate:g} {cell.split}: "
                f"AURAC {area(found['scores']):.1f}, {found['seconds']:.0f} s",
                flush=True,
            )
