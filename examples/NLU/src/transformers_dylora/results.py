"""What a run leaves in its output directory: the per-rank tables, the logits, the test predictions."""

import importlib.metadata
import json
import platform
import shlex
from pathlib import Path

import numpy as np

import loralib as lora
from loralib.adapters.directory import read_facts
from loralib.files import write_atomically, write_text
from loralib.model import has_lora, lora_layers
from loralib.report.scores import decide, score
from loralib.report.tables import aurac, bootstrap, select_rank, without_nan, write_report

from .tasks import Task

METHODS = {
    "example": "DyLoRA, a rank per example",
    "step": "DyLoRA, a rank per step",
    "matryoshka": "MatryoshkaLoRA's gate",
    "fixed": "LoRA trained at r_max",
}


def adapter_parameters(model, rank: int) -> int:
    """How many numbers the adapter has when cut to ``rank``."""
    sizes = [layer.first_components(min(rank, layer.r)) for _, layer in lora_layers(model)]
    return sum(A.numel() + B.numel() for A, B in sizes)


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def rank_rows(metrics: dict, prefix: str, ranks: list[int], task: Task, samples: int, model) -> list[dict]:
    """One row a rank from the trainer's flat ``<prefix>_r<b>_<name>`` metrics; rank 0 is a model without adapter."""
    rows = []
    for b in ranks or [0]:
        start = f"{prefix}_r{b}_" if ranks else f"{prefix}_"
        names = [*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else []), "loss"]
        row = {"rank": b} | {name: metrics[start + name] for name in names if start + name in metrics}
        rows.append(row | {"samples": samples, "adapter_parameters": adapter_parameters(model, b) if ranks else 0})
    return rows


def how_trained(model_args, training_args, trainer) -> dict:
    """The trainer's facts of this run, or those that the adapter it only measures was saved with (None where it tells none)."""
    facts = trainer.training_facts()
    if training_args.do_train:
        return facts
    told = read_facts(model_args.lora_path)
    return {name: told.get(name) for name in facts}


def called(facts: dict) -> str:
    """The method's name in tables and legends."""
    method = METHODS.get(facts["sampling"], "an adapter") + (", frozen" if facts["frozen"] else "")
    if facts["distribution"] not in (None, "uniform"):
        method += f", {facts['distribution']}"
    if facts["full_rank_share"]:
        method += f", ordered at {facts['full_rank_share']:g}"
    return method


def assemble(model_args, training_args, task: Task, trainer, splits: dict[str, dict], argv: list[str]) -> dict:
    """The content of rank_results.json. ``splits``: {name: {"rows", "logits", "labels"}}, the first one chooses the rank."""
    ranks = trainer.eval_ranks or [0]
    facts = how_trained(model_args, training_args, trainer) if has_lora(trainer.model) else {}
    metric = task.main_metric
    curves = {name: [row[metric] for row in split["rows"]] for name, split in splits.items()}
    first = next(iter(splits))
    predictions, labels = decide(splits[first]["logits"]), splits[first]["labels"]
    resampled = bootstrap(predictions, labels, lambda p, y: score(metric, p, y, task.metrics))
    return {
        "task": task.name,
        "model_name_or_path": model_args.model_name_or_path,
        "method": called(facts) if facts else "full fine-tuning",
        "seed": training_args.seed,
        **{name: facts.get(name) for name in ("sampling", "distribution", "full_rank_share", "frozen", "r_min")},
        "scaling": model_args.lora_scaling if model_args.apply_lora else None,
        "max_rank": lora.max_rank(trainer.model) if trainer.eval_ranks else 0,
        "lora_alpha": model_args.lora_alpha,
        "command": shlex.join(["run_glue.py", *argv]),
        "versions": versions(),
        "metric": metric,
        "metrics": list(task.metrics),
        "splits": {name: split["rows"] for name, split in splits.items()},
        "aurac": {name: aurac(ranks, curve) for name, curve in curves.items()},
        "selected_rank": select_rank(ranks, curves[first], resampled) | {"split": first},
    }


def write_results(output_dir: str, results: dict, splits: dict[str, dict]) -> None:
    """Write the tables, the curve, the logits and one eval_r<b>_results.json a rank (MNLI's second split: eval_mm_r<b>)."""
    directory = Path(output_dir)
    write_report(results, directory)
    for name, split in splits.items():
        arrays = {"logits": split["logits"], "labels": split["labels"], "idx": split["idx"]}
        save_npz(directory / f"predictions_{name}.npz", arrays)
        prefix = "eval_mm" if name.endswith("mismatched") else "eval"
        for row in split["rows"]:
            values = {f"eval_{key}" if key not in ("rank", "adapter_parameters") else key: v for key, v in row.items()}
            text = json.dumps(without_nan(values), indent=2) + "\n"
            write_text(directory / f"{prefix}_r{row['rank']}_results.json", text)


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def write_predictions(output_dir: str, name: str, task: Task, ranks: list[int], logits: np.ndarray) -> None:
    """``test_results_<name>_r<b>.txt`` for every rank: a header, then "index<TAB>prediction"."""
    for k, b in enumerate(ranks or [0]):
        predictions = decide(logits[:, k])
        shown = [f"{v:.3f}" if task.regression else task.labels[v] for v in predictions]
        lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(shown))]
        write_text(Path(output_dir) / f"test_results_{name}_r{b}.txt", "\n".join(lines) + "\n")
