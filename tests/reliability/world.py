"""The small world that cases are tried in: a base, data, a strong adapter with its run, a classifier. All weights are random.

The labels of the data are what the adapter answers at rank 3, so that a right evaluation scores 1.0 there, and a wrong one
does not.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification

import loralib as lora

NLU = Path(__file__).parents[2] / "examples" / "NLU"
SCRIPT = NLU / "examples" / "text-classification" / "run_glue.py"
LABELS = ("entailment", "not_entailment")
R = 3


def run_glue() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def build(folder: Path, encoder: Path) -> Path:
    """folder/base, /rte (data), /adapter (strong), /whole (a classifier), /run (a training with checkpoints that started from
    the adapter); moved to a template, of which each case gets a copy at the same place."""
    shutil.copytree(encoder, folder / "base")
    torch.manual_seed(1)
    config = RobertaConfig.from_pretrained(encoder, num_labels=2)
    config.id2label, config.label2id = dict(enumerate(LABELS)), {name: i for i, name in enumerate(LABELS)}
    model = RobertaForSequenceClassification.from_pretrained(encoder, config=config).eval()
    for parameter in model.classifier.parameters():
        nn.init.normal_(parameter, std=2.0)
    lora.inject(model, ["query", "value"], r=R, lora_alpha=16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=1.0)
    model.config._name_or_path = str(folder / "base")
    lora.save_adapter(model, folder / "adapter", extra={"task": "rte", "labels": list(LABELS), "regression": False})
    tokenizer, generator = AutoTokenizer.from_pretrained(encoder), np.random.default_rng(0)
    texts = [[" ".join(f"w{k}" for k in generator.integers(0, 100, 6)) for _ in "ab"] for _ in range(24)]
    with torch.no_grad():
        logits = model(**tokenizer(*map(list, zip(*texts, strict=True)), return_tensors="pt")).logits
    middle = logits.diff(dim=1)[:, 0].sort().values[11:13].mean()  # both answers are given equally often
    with torch.no_grad():
        model.classifier.out_proj.bias[1] -= middle
    lora.save_adapter(model, folder / "adapter", extra={"task": "rte", "labels": list(LABELS), "regression": False})
    answers = (logits.diff(dim=1)[:, 0] > middle).long().tolist()
    rows = [
        {"sentence1": a, "sentence2": b, "label": label, "idx": i}
        for i, ((a, b), label) in enumerate(zip(texts, answers, strict=True))
    ]
    for split in ("train", "validation", "test"):
        hidden = [row | {"label": -1} for row in rows] if split == "test" else rows
        write_rows(folder / "rte" / f"{split}.jsonl", hidden)
    plain = lora.merge(model, R)
    plain.save_pretrained(folder / "whole")
    tokenizer.save_pretrained(folder / "whole")
    run_glue().main([*train(folder, folder / "run"), "--save_strategy", "steps", "--save_steps", "2"])
    return folder.rename(folder.with_name("template"))


def common(folder: Path, out: Path, data: Path | None = None, model: str = "base") -> list[str]:
    return [
        *("--model_name_or_path", str(folder / model), "--output_dir", str(out), "--report_to", "none"),
        *(
            "--use_cpu",
            "true",
            "--disable_tqdm",
            "true",
            "--max_seq_length",
            "32",
            "--per_device_eval_batch_size",
            "16",
        ),
        *(["--task_name", "rte", "--dataset_dir", str(data or folder / "rte")]),
    ]


ADAPTER = ["--apply_lora", "--lora_r", str(R), "--lora_alpha", "16"]


def train(folder: Path, out: Path, data: Path | None = None, model: str = "base") -> list[str]:
    return [
        *common(folder, out, data, model), *ADAPTER, "--do_train", "--do_eval", "--per_device_train_batch_size", "8",
        "--max_steps", "4", "--save_strategy", "no", "--seed", "3", "--lora_path", str(folder / "adapter"),
    ]  # fmt: skip


def evaluate(
    folder: Path, out: Path, adapter: Path | None = None, data: Path | None = None, model: str = "base"
) -> list[str]:
    return [*common(folder, out, data, model), *ADAPTER, "--do_eval", "--lora_path", str(adapter or folder / "adapter")]
