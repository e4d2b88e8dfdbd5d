"""What a run leaves in its output directory: the per-rank tables, the logits, the test predictions."""

import importlib.metadata
import json
import platform
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np

import loralib as lora
from loralib.adapters.directory import hash_of_weights, read_facts
from loralib.files import save_npz, write_text
from loralib.model import adapter_parameters, has_lora
from loralib.report.choice import aurac, bootstrap, nothing_learnt, select_rank
from loralib.report.results import RankResults, RankRow
from loralib.report.scores import decide, score
from loralib.report.writing import write_run
from loralib.schedule import FACTS
from loralib.strengths import has_strengths
from loralib.titles import title_of
from loralib.training.metrics import by_rank

from .settings import without_tokens
from .tasks import Task


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def eval_prefix(split: str) -> str:
    """How metrics and files of a validation split are named: "eval", MNLI's second split "eval_mm"."""
    return "eval_mm" if split.endswith("mismatched") else "eval"


def rank_rows(metrics: dict, prefix: str, ranks: list[int], task: Task, samples: int, model) -> list[RankRow]:
    """One row a rank from a trainer's flat metrics; rank 0 is a model without adapter."""
    of_ranks = by_rank(metrics, prefix)
    rows = []
    for b in ranks or [0]:
        found = of_ranks[b] if ranks else {key.removeprefix(f"{prefix}_"): value for key, value in metrics.items()}
        names = [*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])]
        scores = {name: found[name] for name in names if name in found}
        rows.append(RankRow(b, scores, found.get("loss"), samples, adapter_parameters(model, b) if ranks else 0))
    return rows


def how_trained(model_args, training_args, trainer) -> dict:
    """The trainer's facts of this run, or those that the adapter it only measures was saved with."""
    if training_args.do_train:
        return trainer.training_facts()
    told = read_facts(model_args.lora_path)
    names = (*FACTS, "p", "reduce", "gate_ranks", "ordered", "cut_short", "seed")
    return {name: told[name] for name in names if name in told}


def assemble(
    model_args, training_args, task: Task, trainer, splits: dict[str, dict], scaling: str | None, words: list[str]
) -> RankResults:
    """The run's results. ``splits``: {name: {"rows", "logits", "labels"}}, the first one chooses the rank; ``scaling``:
    the rule in use; ``words``: the command."""
    ranks = trainer.eval_ranks or [0]
    adapted = has_lora(trainer.model)
    facts = how_trained(model_args, training_args, trainer) if adapted else {}
    r_max = lora.max_rank(trainer.model) if adapted else 0
    fitted = adapted and has_strengths(trainer.model)
    metric = task.main_metric
    curves = {name: [row.scores[metric] for row in split["rows"]] for name, split in splits.items()}
    first = next(iter(splits))
    predictions, labels = decide(splits[first]["logits"]), splits[first]["labels"]
    reason = nothing_learnt(predictions, labels, curves[first], metric, () if task.regression else task.labels)
    selected = None
    if reason is None:
        resampled = bootstrap(predictions, labels, lambda p, y: score(metric, p, y, task.metrics))
        selected = replace(select_rank(ranks, curves[first], resampled), split=first)
    return RankResults(
        task=task.name,
        model_name_or_path=model_args.model_name_or_path,
        method=title_of(facts, r_max, fitted) if adapted else "full fine-tuning",
        fitted=fitted or None,
        seed=training_args.seed if training_args.do_train or not adapted else facts.get("seed"),
        **{name: facts.get(name) for name in FACTS},
        scaling=scaling,
        max_rank=r_max,
        lora_alpha=model_args.lora_alpha,
        command=shlex.join(without_tokens(words)),
        adapter=hash_of_weights(training_args.output_dir if training_args.do_train else model_args.lora_path or "")
        if adapted
        else None,
        versions=versions(),
        metric=metric,
        metrics=task.metrics,
        splits={name: split["rows"] for name, split in splits.items()},
        aurac={name: aurac(ranks, curve) for name, curve in curves.items()},
        selected_rank=selected,
        selected_rank_reason=reason,
    )


def write_results(output_dir: str, results: RankResults, splits: dict[str, dict]) -> None:
    """Write the tables, the curve, the logits and one eval_r<b>_results.json a rank (MNLI's second split:
    eval_mm_r<b>)."""
    directory = Path(output_dir)
    for name, split in splits.items():
        save_npz(directory / f"predictions_{name}.npz", {key: split[key] for key in ("logits", "labels", "idx")})
    write_run(results, directory)
    for name, split in splits.items():
        for row in split["rows"]:
            values = {
                key if key in ("rank", "adapter_parameters") else f"eval_{key}": value
                for key, value in row.to_json().items()
            }
            text = json.dumps(values, indent=2) + "\n"
            write_text(directory / f"{eval_prefix(name)}_r{row.rank}_results.json", text)


def write_predictions(output_dir: str, name: str, task: Task, ranks: list[int], logits: np.ndarray) -> None:
    """``test_results_<name>_r<b>.txt`` for every rank: a header, then "index<TAB>prediction".

    Values of a GLUE task have three decimals, as its server takes them; of one's own data seven digits.
    """
    number = ".7g" if task.name == "custom" else ".3f"
    for k, b in enumerate(ranks or [0]):
        predictions = decide(logits[:, k])
        shown = [format(v, number) if task.regression else task.labels[v] for v in predictions]
        lines = ["index\tprediction", *(f"{i}\t{text}" for i, text in enumerate(shown))]
        write_text(Path(output_dir) / f"test_results_{name}_r{b}.txt", "\n".join(lines) + "\n")
