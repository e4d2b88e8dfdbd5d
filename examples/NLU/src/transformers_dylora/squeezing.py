"""What an adapter that was trained elsewhere gives at every rank on one's own data, and how much its components matter
there: the half of dylora squeeze that runs the model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments

import loralib as lora
from loralib.adapters.card import AUTO
from loralib.adapters.directory import AdapterFiles, read_directory, write_adapter
from loralib.adapters.hub import base_of
from loralib.adapters.keys import is_of_base
from loralib.adapters.kinds import head_outputs
from loralib.adapters.labels import told
from loralib.report.results import RankResults
from loralib.sampling import RankSampler
from loralib.schedule import FACTS
from loralib.titles import title_of
from loralib.trainer import DyLoRATrainer

from .data import load_files, read_rows, tokenize
from .errors import UsageError
from .metrics import metrics_function
from .modeling import known_columns, positions

ALL_RANKS = 16  # up to this r_max every rank is measured, above it 1, 2, 4, .. r_max
MAX_LENGTH = 512  # tokens of an example, for a model that does not say how many it takes
# What saving an adapter tells by itself, of dylora.json's facts.
FOUND_ANEW = (
    *("rank", "r_max", "lora_alpha", "scaling", "labels", "num_labels", "made_by", "files"),
    *("base_sample", "base_sample_of", "projections", "components_at", "strength_at", "spread"),
)
OF_BASE = ("base_model_name_or_path", "revision")  # of adapter_config.json's fields
LOOKED_AT = 1024  # examples that importance is measured on, at most
FITTED_WITH, FITTED_WITH_OF_TEXT = 32, 8  # examples in a batch that strengths are fitted on


@dataclass
class Adapted:
    """An adapter's directory, loaded into its base model; ``names``: a classifier's labels, in the order of its
    outputs."""

    directory: Path
    model: Any
    tokenizer: Any
    names: tuple[str, ...] | None
    given: AdapterFiles  # as they were: what is saved after running has their precision, and is for their base

    @classmethod
    def load(cls, directory: str | Path, base: str | None = None, labels: tuple[str, ...] = ()) -> "Adapted":
        """
        Args:
            base: the base model; default: the one that the adapter names.
            labels: a classifier's label names in the order of its outputs, where neither the adapter nor the base tells
                them.

        Raises UsageError.
        """
        files = read_directory(directory)
        kind = files.config.get("task_type") or ""
        base, of_base = base_of(files.config, base)
        if kind not in ("SEQ_CLS", "CAUSAL_LM"):
            raise UsageError(
                f"{directory} is a {kind or 'nameless'} adapter; classifiers and language models are measured."
            )
        if base is None:
            raise UsageError(f"{directory} names no base model; give it with --base.")
        classifier = kind == "SEQ_CLS"
        if labels and not classifier:
            raise UsageError("--labels are a classifier's; this adapter is of a language model, leave them out.")
        if classifier and outputs(files) == 1:
            raise UsageError(
                "The adapter is a regression: give --rank alone, or measure it with dylora train --do_eval."
            )
        options = {"num_labels": outputs(files), "ignore_mismatched_sizes": True} if classifier else {}
        transformers.utils.logging.set_verbosity_error()
        try:
            model = getattr(transformers, AUTO[kind]).from_pretrained(base, dtype=torch.float32, **of_base, **options)
            tokenizer = AutoTokenizer.from_pretrained(base, **of_base)
        except SafetensorError as error:
            raise UsageError(f"The weights of the base model {base!r} cannot be read ({error}).") from None
        except OSError:
            raise UsageError(
                f"The base model {base!r} is no directory here and not on the hub; name it with --base."
            ) from None
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        stored = files.facts.get("labels")
        names = told(labels, stored or ()) or told(stored, labels) or told((model.config.id2label or {}).values())
        names = names or tuple(map(str, range(options.get("num_labels", 0))))
        if classifier and len(names) != options["num_labels"]:
            raise UsageError(
                f"The labels are {', '.join(names)}, and the head of {directory} has {options['num_labels']} outputs; "
                "name each with --labels."
            )
        if classifier and told(names):
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: i for i, name in enumerate(names)}
        lora.load_adapter(model, directory)
        return cls(Path(directory), model, tokenizer, names if classifier else None, files)

    @property
    def facts(self) -> dict:
        return self.given.facts

    def examples(self, data: str):
        """A file's examples as tokens, what puts them into batches, and a classifier's metrics. CSV or JSON lines; for
        a classifier one or two text columns and ``label``, for a language model ``prompt`` and ``completion`` (the loss
        counts the completion) or ``text``."""
        if self.names is None:
            return completing(data, self.tokenizer, longest(self.tokenizer, self.model.config))
        columns = known_columns(self.facts)
        most = longest(self.tokenizer, self.model.config)
        length = min(self.facts.get("max_seq_length") or MAX_LENGTH, most)  # as it was trained
        return classifying(data, self.tokenizer, self.names, length, columns)

    def kept_facts(self) -> dict:
        """What ``dylora.json`` told, but for what saving finds anew."""
        return {name: value for name, value in self.facts.items() if name not in FOUND_ANEW}

    def spread_by_importance(self, data: str) -> None:
        """Spread the ranks over the layers by the importance of components on a file of examples, and save that."""
        lora.order_by_importance(self.model, self.batches(data, 1, LOOKED_AT))
        self._save()

    def fit_strengths(self, data: str) -> None:
        """Learn strengths of each rank's own on a file of examples, and save them."""
        lora.fit_strengths(self.model, self.batches(data, FITTED_WITH if self.names else FITTED_WITH_OF_TEXT))
        self._save()

    def batches(self, data: str, size: int, most: int | None = None) -> Iterator[dict]:
        """A file's examples in random order, at most so many, as the model takes them, which is moved to where it
        runs fastest; the last batch may be smaller."""
        self.model.to(torch.accelerator.current_accelerator() or "cpu")
        dataset, collate, _ = self.examples(data)
        chosen = dataset.shuffle(seed=0).select(range(min(most or len(dataset), len(dataset))))
        wanted = {"input_ids", "attention_mask", "token_type_ids", "label", "labels"} & set(chosen.column_names)
        rows = chosen.select_columns(sorted(wanted))
        return (
            dict(collate([rows[i] for i in range(at, min(at + size, len(rows)))])) for at in range(0, len(rows), size)
        )

    def _save(self) -> None:
        lora.save_adapter(self.model, self.directory, extra=self.kept_facts())
        self._keep()

    def measure(self, data: str) -> RankResults:
        """Measure every rank on a file of examples, and leave ``rank_results.json`` in the directory."""
        dataset, collator, compute = self.examples(data)
        r_max = lora.max_rank(self.model)
        trainer = DyLoRATrainer(
            model=self.model,
            args=TrainingArguments(str(self.directory), report_to="none", use_cpu=not torch.accelerator.is_available()),
            eval_dataset=dataset,
            data_collator=collator,
            compute_metrics=compute,
            schedule=lora.RankSchedule("fixed"),
            adapter_facts=self.kept_facts(),
            eval_ranks=None if r_max <= ALL_RANKS else RankSampler(r_max).ladder(),
        )
        results = trainer.measure_ranks(task=Path(data).stem)
        self._keep()
        told = {name: self.facts.get(name) for name in FACTS}
        return replace(
            results, method=title_of(self.facts, r_max, bool(results.fitted)), seed=self.facts.get("seed"), **told
        )

    def _keep(self) -> None:
        """Write what was saved in the precision of what was given, and for its base model, wherever that was run."""
        files, given = read_directory(self.directory), self.given.tensors
        tensors = {
            key: value.to(given[key].dtype if key in given else value.dtype) for key, value in files.tensors.items()
        }
        # Weights of the base's own that came beside (embeddings): saving leaves them to the base.
        tensors |= {key: value for key, value in given.items() if is_of_base(key)}
        named = {name: value for name in OF_BASE if (value := self.given.config.get(name))}
        write_adapter(self.directory, tensors, files.config | named, files.facts | {"scaling": files.scaling})


def outputs(files: AdapterFiles) -> int:
    """How many labels the classifier's head has. Raises UsageError where there is none."""
    found = files.facts.get("num_labels") or head_outputs(files.tensors)
    if not found:
        raise UsageError(f"{files.path} holds no trained head; a classifier's adapter has one in modules_to_save.")
    return found


def longest(tokenizer, config) -> int:
    """How many tokens a text may have: what the model takes, where it says so."""
    return min(tokenizer.model_max_length, positions(config) or MAX_LENGTH)


def classifying(data: str, tokenizer, names: tuple[str, ...], max_length: int, columns: dict):
    task, splits = load_files({"validation": data}, None, names, **columns)
    dataset = tokenize(splits["validation"], task, tokenizer, max_length, False, False)
    return dataset, DataCollatorWithPadding(tokenizer), metrics_function(task)


def completing(data: str, tokenizer, max_length: int):
    """Tokens with labels of -100 where the loss does not look. Raises UsageError for an example of which nothing counts
    within ``max_length`` tokens."""
    rows = read_rows(Path(data))
    pairs = {"prompt", "completion"} <= set(rows.column_names)
    if not pairs and "text" not in rows.column_names:
        raise UsageError(
            f"{data} has the columns {', '.join(rows.column_names)}; a language model needs prompt and completion, or "
            "text."
        )

    wanted = ("prompt", "completion") if pairs else ("text",)
    for name in wanted:
        bad = next((i for i, value in enumerate(rows[name]) if not isinstance(value, str) or not value.strip()), None)
        if bad is not None:
            raise UsageError(
                f"{data} has {rows[name][bad]!r} for {name} in example {bad}; every example needs text there."
            )

    def encode(row):
        if not pairs:
            ids = tokenizer(row["text"])["input_ids"][:max_length]
            return {"input_ids": ids, "labels": ids}
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, marks = prompt + answer, [-100] * len(prompt) + answer
        return {"input_ids": ids[:max_length], "labels": marks[:max_length]}

    examples = rows.map(encode, remove_columns=rows.column_names)
    for i, example in enumerate(examples):
        if all(label == -100 for label in example["labels"]):
            raise UsageError(
                f"{data} has in example {i} a prompt of {max_length} tokens or more, the most that the model takes, so "
                "that nothing of its completion would count; shorten it or leave it out."
            )
    return examples, DataCollatorForSeq2Seq(tokenizer), None
