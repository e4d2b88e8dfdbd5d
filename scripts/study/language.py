"""A language model on WebNLG: facts as the prompt, a text as the completion, the loss of the completion's tokens.

The data's directory holds webnlg/train.jsonl and webnlg/validation.jsonl, a line {"triples": [[subject, property,
object], ..], "references": [text, ..]} for each entry; of the references the first counts. The model's directory holds
a checkpoint of transformers', or one GGUF file.
"""

from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import loralib as lora

from .cells import Cell

NOT_COUNTED = -100


def load_language(cell: Cell, directory: str, data: str | None) -> tuple:
    """As in ``loading.Loaded``: model, tokenizer, training and measured examples, collator, metric."""
    if data is None:
        raise ValueError("WebNLG is read from files: give --data, a directory that holds webnlg/train.jsonl.")
    gguf = [] if list(Path(directory).glob("*.safetensors")) else sorted(Path(directory).glob("*.gguf"))
    options = {"gguf_file": gguf[0].name} if gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    method = cell.trained
    lora.inject(model, cell.targets, r=method.r, lora_alpha=method.alpha, scaling=method.scaling)
    lora.mark_only_lora_as_trainable(model)
    train, measured = (tokenised(part, tokenizer, cell.budget.max_length) for part in entries(cell, data))
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NOT_COUNTED)
    return model, tokenizer, train, measured, collator, "loss"


def entries(cell: Cell, data: str) -> tuple[Dataset, Dataset]:
    """Those to train on, and those to measure: of validation, or held out, the next of train."""
    budget = cell.budget
    files = {split: str(Path(data) / "webnlg" / f"{split}.jsonl") for split in ("train", "validation")}
    raw = load_dataset("json", data_files=files).shuffle(seed=0)
    train = raw["train"].select(range(budget.train))
    if cell.split == "held_out":
        return train, raw["train"].select(range(budget.train, budget.train + budget.validation))
    return train, raw["validation"].select(range(budget.validation))


def prompt_of(entry: dict) -> str:
    return "Facts: " + "; ".join(" | ".join(triple) for triple in entry["triples"]) + "\nText: "


def tokenised(part: Dataset, tokenizer, max_length: int) -> Dataset:
    """The prompt's tokens are not counted. An entry whose completion does not begin within ``max_length`` tokens is
    left out."""

    def encode(entry: dict) -> dict:
        prompt = tokenizer(prompt_of(entry), add_special_tokens=False)["input_ids"]
        completion = tokenizer(entry["references"][0] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        tokens = (prompt + completion)[:max_length]
        return {"input_ids": tokens, "labels": ([NOT_COUNTED] * len(prompt) + completion)[:max_length]}

    encoded = part.map(encode, remove_columns=part.column_names, desc="tokenise")
    return encoded.filter(lambda entry: entry["labels"][-1] != NOT_COUNTED)
