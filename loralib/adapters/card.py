"""The model card of an exported adapter: what it is, how good it is at each rank, how to load it."""

import json

from ..report.results import RankResults
from ..report.tables import columns, markdown_table, table_rows

AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}


def base_options(config: dict, facts: dict) -> str:
    """What ``from_pretrained`` of the base model must be told: the number of labels of a classifier."""
    if config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return ""
    return f", num_labels={num_labels(facts)}"


def num_labels(facts: dict) -> int:
    """The outputs of the head; a regression has no label names and one output."""
    return facts.get("num_labels") or max(1, len(facts.get("labels", [])))


def _one_line(text) -> str:
    """Text from outside, which must not begin a new line of the card."""
    return " ".join(str(text).split())


def model_card(config: dict, facts: dict, results: RankResults | None, name: str, merged: bool = False) -> str:
    """Markdown with the hub's metadata.

    Args:
        config, facts: the contents of adapter_config.json and dylora.json.
        results: of the run, or None.
        name: where the reader finds the files: a directory or a repository on the hub.
        merged: the files are a whole model with the adapter merged in, not an adapter.
    """
    base, rank = _one_line(config.get("base_model_name_or_path") or "the base model"), facts["rank"]
    auto = AUTO.get(config.get("task_type") or "", "AutoModel")
    head = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {'transformers' if merged else 'peft'}",
        "tags: [dylora, lora]",
        "---",
        "",
    ]
    title = f"# {_one_line(facts.get('task', 'DyLoRA'))} at rank {rank}, on {base}"
    what = "A model with a LoRA adapter merged in" if merged else "A LoRA adapter"
    lines = [
        *head,
        title,
        "",
        f"{what}, cut to rank {rank} from one DyLoRA training that serves every rank from 1 to {facts['r_max']} "
        f"(lora_alpha {facts.get('lora_alpha', config['lora_alpha'])}, strength {facts['scaling']}).",
        "",
    ]
    if facts.get("labels"):
        lines += ["Labels: " + ", ".join(f"{i} {_one_line(text)}" for i, text in enumerate(facts["labels"])) + ".", ""]
    lines += ["## Loading", "", "```python"]
    if merged:
        lines += [f"from transformers import {auto}", f"model = {auto}.from_pretrained({json.dumps(name)})"]
    else:
        lines += [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            f"model = {auto}.from_pretrained({json.dumps(base)}{base_options(config, facts)})",
            f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
        ]
    lines += ["```", ""]
    if results is not None:
        lines += ["## Quality at every rank", ""]
        for split in results.splits:
            table = markdown_table(columns(results), table_rows(results, split))
            scale = " (0-100 scale)" if results.factor(results.metric) > 1 else ""
            lines += [f"{results.task}, {split}{scale}:", "", table, ""]
        chosen = results.selected_rank
        if chosen:
            lines += [f"Selected on {chosen.split}: rank {chosen.rank}, the {chosen.rule}.", ""]
    lines += ["Method: DyLoRA, [arXiv 2210.07558](https://arxiv.org/abs/2210.07558).", ""]
    return "\n".join(lines)
