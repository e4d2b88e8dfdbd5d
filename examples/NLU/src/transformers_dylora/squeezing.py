"""What an adapter that was trained elsewhere gives at every rank on one's own data: the measuring half of dylora
squeeze."""

from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments

import loralib as lora
from loralib.adapters.card import AUTO
from loralib.adapters.directory import AdapterFiles, read_directory
from loralib.adapters.labels import told
from loralib.report.results import RankResults
from loralib.sampling import RankSampler
from loralib.trainer import DyLoRATrainer

from .data import load_files, tokenize
from .errors import UsageError
from .metrics import metrics_function

ALL_RANKS = 16  # up to this r_max every rank is measured, above it 1, 2, 4, .. r_max


def measure_adapter(
    directory: str | Path, data: str, base: str | None = None, labels: tuple[str, ...] = (), max_length: int = 512
) -> RankResults:
    """Measure the adapter in ``directory`` at its ranks on a file of examples, and leave ``rank_results.json`` there.

    Args:
        data: CSV or JSON lines; for a classifier one or two text columns and ``label``, for a language model ``prompt``
            and ``completion`` (the loss counts the completion) or ``text``.
        base: the base model; default: the one that the adapter names.
        labels: a classifier's label names in the order of its outputs, where neither the adapter nor the base tells
            them.

    Raises UsageError.
    """
    files = read_directory(directory)
    kind = files.config.get("task_type") or ""
    base = base or files.config.get("base_model_name_or_path")
    if kind not in ("SEQ_CLS", "CAUSAL_LM"):
        raise UsageError(
            f"{directory} is a {kind or 'nameless'} adapter; classifiers and language models are measured."
        )
    if base is None:
        raise UsageError(f"{directory} names no base model; give it with --base.")
    classifier = kind == "SEQ_CLS"
    options = {"num_labels": outputs(files), "ignore_mismatched_sizes": True} if classifier else {}
    transformers.utils.logging.set_verbosity_error()
    try:
        model = getattr(transformers, AUTO[kind]).from_pretrained(base, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except OSError:
        raise UsageError(
            f"The base model {base!r} is no directory here and not on the hub; name it with --base."
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    names = labels or told(files.facts.get("labels")) or told((model.config.id2label or {}).values())
    names = names or tuple(map(str, range(options.get("num_labels", 0))))
    if classifier and len(names) != options["num_labels"]:
        raise UsageError(
            f"The labels are {', '.join(names)}, and the head of {directory} has {options['num_labels']} outputs; name "
            "each with --labels."
        )
    if classifier and not all(name.isdigit() for name in names):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: i for i, name in enumerate(names)}
    lora.load_adapter(model, directory)
    r_max = lora.max_rank(model)
    dataset, collator, compute = (
        classifying(data, tokenizer, names, max_length) if classifier else completing(data, tokenizer, max_length)
    )
    trainer = DyLoRATrainer(
        model=model,
        args=TrainingArguments(str(directory), report_to="none", use_cpu=not torch.accelerator.is_available()),
        eval_dataset=dataset,
        data_collator=collator,
        compute_metrics=compute,
        schedule=lora.RankSchedule("fixed"),
        adapter_facts={name: files.facts[name] for name in ("squeezed", "ordered") if name in files.facts},
        eval_ranks=None if r_max <= ALL_RANKS else RankSampler(r_max).ladder(),
    )
    return trainer.measure_ranks(task=Path(data).stem)


def outputs(files: AdapterFiles) -> int:
    """How many labels the classifier's head has: what the adapter tells, or else the rows of the narrowest matrix that
    was saved beside it (layers of the head before the last are as wide as the model)."""
    if files.facts.get("num_labels"):
        return files.facts["num_labels"]
    heads = [len(value) for key, value in files.tensors.items() if ".lora_" not in key and key.endswith("weight")]
    if not heads:
        raise UsageError(f"{files.path} holds no trained head; a classifier's adapter has one in modules_to_save.")
    return min(heads)


def classifying(data: str, tokenizer, names: tuple[str, ...], max_length: int):
    task, splits = load_files({"validation": data}, None, names)
    dataset = tokenize(splits["validation"], task, tokenizer, max_length, False, False)
    return dataset, DataCollatorWithPadding(tokenizer), metrics_function(task)


def completing(data: str, tokenizer, max_length: int):
    """Tokens with labels of -100 where the loss does not look."""
    import datasets

    try:
        rows = datasets.load_dataset("csv" if data.endswith(".csv") else "json", data_files=data, split="train")
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise UsageError(f"{data} cannot be read ({type(error).__name__}); give CSV or JSON lines.") from None
    if not {"prompt", "completion"} <= set(rows.column_names) and "text" not in rows.column_names:
        raise UsageError(
            f"{data} has the columns {', '.join(rows.column_names)}; a language model needs prompt and completion, or "
            "text."
        )

    def encode(row):
        if "completion" not in row:
            ids = tokenizer(row["text"])["input_ids"][:max_length]
            return {"input_ids": ids, "labels": ids}
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, marks = prompt + answer, [-100] * len(prompt) + answer
        return {"input_ids": ids[:max_length], "labels": marks[:max_length]}

    return rows.map(encode, remove_columns=rows.column_names), DataCollatorForSeq2Seq(tokenizer), None
