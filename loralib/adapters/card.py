"""The model card of an exported adapter: what it is, how good it is at each rank, how to load it."""

from __future__ import annotations

import json
from pathlib import Path

from ..report.results import LOWER, RankResults
from ..report.tables import columns, markdown_table, table_rows
from ..titles import before_ordering
from .labels import told

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
# The hub's names: of what a model does, of GLUE's tasks, of scores.
PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
}
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
METRICS = {"pearson": "pearsonr"}


def num_labels(facts: dict) -> int:
    """The outputs of the head; a regression has no label names and one output."""
    return facts.get("num_labels") or max(1, len(facts.get("labels", [])))


def _one_line(text) -> str:
    """Text from outside, which must not begin a new line of the card."""
    return " ".join(str(text).split())


def model_card(
    config: dict,
    facts: dict,
    results: RankResults | None,
    name: str,
    merged: bool = False,
    license: str | None = None,
    tokenizer: str | None = None,
) -> str:
    """Markdown with the hub's metadata (``huggingface_hub.ModelCardData``).

    Args:
        config, facts: the contents of adapter_config.json and dylora.json.
        results: of the run, or None.
        name: where the reader finds the files: a directory or a repository on the hub.
        merged: the files are a whole model with the adapter merged in, not an adapter.
        license: the hub's name of a licence, as in apache-2.0; None: the card says none.
        tokenizer: where it is; default: with the base model.
    """
    base = _one_line(config.get("base_model_name_or_path") or "the base model")
    facts = facts | {"num_labels": num_labels(facts), "labels": told(facts.get("labels"))}  # LABEL_0 is no name
    lines = [
        "---",
        _metadata(config, facts, results, name, merged, license),
        "---",
        "",
        f"# {_title(config, facts, results)}",
        "",
        _what(config, facts, base, merged),
        "",
    ]
    if facts.get("labels"):
        lines += ["Labels: " + ", ".join(f"{i} {_one_line(text)}" for i, text in enumerate(facts["labels"])) + ".", ""]
    lines += ["## Loading", "", "```python", *_loading(config, facts, base, name, merged, tokenizer or base), "```", ""]
    if results is not None:
        lines += ["## Quality at every rank", ""]
        for split in results.splits:
            table = markdown_table(columns(results), table_rows(results, split))
            scale = " (0-100 scale)" if results.factor(results.metric) > 1 else ""
            lines += [f"{_one_line(results.task)}, {_one_line(split)}{scale}:", "", table, ""]
        chosen = results.selected_rank
        if chosen:
            lines += [f"Selected on {_one_line(chosen.split)}: rank {chosen.rank}, {_with_article(chosen.rule)}.", ""]
    if facts.get("squeezed") or _drew_ranks(facts):
        lines += ["Method: DyLoRA, [arXiv 2210.07558](https://arxiv.org/abs/2210.07558).", ""]
    return "\n".join(lines)


def _drew_ranks(facts: dict) -> bool:
    """Whether the adapter is known to be trained for all its ranks; PEFT's own files tell nothing of their training."""
    drawn = facts.get("sampling") not in (None, "fixed")
    return drawn and not before_ordering(facts) and not facts.get("cut_short")


def _with_article(rule: str) -> str:
    return rule if rule.startswith("the ") else f"the {rule}"


def _title(config: dict, facts: dict, results: RankResults | None) -> str:
    """The task, or for one's own data what the model does, the rank and the base."""
    task = facts.get("task") or (results.task if results else None)
    what = {"SEQ_CLS": "Text classifier", "CAUSAL_LM": "Language model"}.get(
        config.get("task_type") or "", "LoRA adapter"
    )
    if task in (None, "custom"):
        labels = facts.get("labels") or []
        task = f"{what} ({', '.join(labels)})" if 0 < len(labels) <= 4 and what == "Text classifier" else what
    elif task in GLUE:
        task = f"GLUE {task}"
    base = Path(str(config.get("base_model_name_or_path") or "its base model")).name
    return _one_line(f"{task} at rank {facts['rank']}, on {base}")


def _what(config: dict, facts: dict, base: str, merged: bool) -> str:
    rank, r_max = facts["rank"], facts["r_max"]
    strength = f"(lora_alpha {facts.get('lora_alpha', config['lora_alpha'])}, strength {facts['scaling']})"
    what = (
        f"{base} with a LoRA adapter of rank {rank} merged in"
        if merged
        else f"A LoRA adapter of rank {rank} for {base}"
    )
    if facts.get("squeezed"):
        how = f", made from a LoRA of rank {r_max}, whose components were put in the order of their importance"
    elif _drew_ranks(facts):
        how = ", from one DyLoRA training"
        how += f", whose adapter serves every rank from 1 to {r_max}" if r_max > 1 else ""
    else:
        how = f", cut from an adapter of rank {r_max}" if rank < r_max else ""
    spread = " It keeps the components of all layers that matter most, as many numbers as at one rank in every layer."
    fitted = " How strong each layer's update is at this rank was learnt once the training was over."
    return f"{what}{how} {strength}." + spread * bool(facts.get("spread")) + fitted * bool(facts.get("strength_at"))


def _loading(config: dict, facts: dict, base: str, name: str, merged: bool, tokenizer: str) -> list[str]:
    """Python that loads the model and, for a classifier, names its first prediction."""
    kind = config.get("task_type") or ""
    auto = AUTO.get(kind, "AutoModel")
    labels = [_one_line(label) for label in facts.get("labels") or []]
    revised = f", revision={json.dumps(_one_line(config['revision']))}" if config.get("revision") else ""
    if merged:
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f"model = {auto}.from_pretrained({json.dumps(name)})",
        ]
    else:
        lines = ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", ""]
        options = revised
        if kind in ("SEQ_CLS", "TOKEN_CLS"):
            options += f", num_labels={num_labels(facts)}"
            if labels:
                lines += [f"labels = {json.dumps(labels)}"]
                options = (
                    revised + ", id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}"
                )
        call = f"model = {auto}.from_pretrained({json.dumps(base)}{options})"
        if len(call) > 100:
            call = call.replace("(", "(\n    ", 1).replace(", id2label", ",\n    id2label")
            call = call.replace(", label2id", ",\n    label2id")[:-1] + ",\n)"
        lines += [
            call,
            f"model = PeftModel.from_pretrained(model, {json.dumps(name)}).eval()",
        ]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(tokenizer)}{revised if tokenizer == base else ''})"
    ]
    if kind == "SEQ_CLS":
        score = "model(**inputs).logits" + (".argmax(-1).item()" if num_labels(facts) > 1 else ".item()")
        score = f"model.config.id2label[{score}]" if labels else score
        lines += ['inputs = tokenizer("A text.", return_tensors="pt")', f"print({score})"]
    elif kind == "CAUSAL_LM":
        lines += [
            'inputs = tokenizer("A text", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        ]
    return lines


def _metadata(
    config: dict, facts: dict, results: RankResults | None, name: str, merged: bool, license: str | None
) -> str:
    """The hub's table above a card. A base model that is a local directory is left out: its path says nothing
    elsewhere."""
    from huggingface_hub import EvalResult, ModelCardData

    base = config.get("base_model_name_or_path")
    local = base is None or Path(base).exists() or base.startswith((".", "/", "~"))
    kind = config.get("task_type") or ""
    task = facts.get("task") or (results.task if results else None)
    glue = task if task in GLUE else None
    found = []
    for split, rows in results.splits.items() if results else ():
        row = next((row for row in rows if row.rank == facts["rank"]), None)
        for metric, value in (row.scores if row else {}).items():
            if value == value and metric not in ("combined_score", *LOWER):
                found.append(
                    EvalResult(
                        task_type=PIPELINES.get(kind, "other"),
                        dataset_type="nyu-mll/glue" if glue else "custom",
                        dataset_name=f"GLUE {glue}" if glue else "own data",
                        dataset_config=glue,
                        dataset_split=_one_line(split),
                        metric_type=METRICS.get(metric, metric),
                        metric_value=round(value, 4),
                    )
                )
    data = ModelCardData(
        base_model=None if local else _one_line(base),
        library_name="transformers" if merged else "peft",
        license=license,
        tags=["dylora", "lora"],
        pipeline_tag=PIPELINES.get(kind),
        datasets=["nyu-mll/glue"] if glue else None,
        metrics=list(dict.fromkeys(result.metric_type for result in found)) or None,
        model_name=_one_line(Path(name).name) if found else None,
        eval_results=found or None,
    )
    return data.to_yaml().strip()
