"""Loading a task's splits, from the hub, a local directory or one's own files, and tokenising them."""

from pathlib import Path

import datasets
import numpy as np

from .errors import UsageError
from .tasks import Task, glue_task

HUB_NAME = "nyu-mll/glue"
ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_glue(task: Task, dataset_dir: str | None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """The splits of a GLUE task that are there, checked. Raises UsageError."""
    splits = _from_directory(task, Path(dataset_dir), cache_dir) if dataset_dir else _from_hub(task, cache_dir)
    for name, split in splits.items():
        splits[name] = _checked(split, task, f"{dataset_dir or HUB_NAME} ({task.name}, {name})", "test" not in name)
    return splits


def _from_hub(task: Task, cache_dir: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(HUB_NAME, task.name, cache_dir=cache_dir)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UsageError(
            f"GLUE's {task.name} cannot be fetched from the hub ({type(error).__name__}); give local data with "
            f"--dataset_dir DIR, or try the project without any: bash scripts/quickstart.sh"
        ) from error


def _from_directory(task: Task, directory: Path, cache_dir: str | None) -> datasets.DatasetDict:
    if not directory.is_dir():
        raise UsageError(f"--dataset_dir {directory} is no directory; give the one that holds {task.name}'s splits.")
    own = directory / task.name if (directory / task.name).is_dir() else directory
    if (own / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(own))
    wanted = [name for kind in ("train", "validation", "test") for name in task.splits(kind)]
    found = {}
    for name in wanted:
        file = next((own / (name + ending) for ending in ENDINGS if (own / (name + ending)).exists()), None)
        if file is not None:
            found[name] = _read(file, cache_dir)
        elif (own / name).is_dir():
            found[name] = datasets.load_from_disk(str(own / name))
    if not found:
        raise UsageError(
            f"{own} holds none of {', '.join(wanted)} as .jsonl, .parquet, .csv or what save_to_disk writes; "
            f"put {task.name}'s splits there."
        )
    return datasets.DatasetDict(found)


def _read(file: Path, cache_dir: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(ENDINGS[file.suffix], data_files=str(file), split="train", cache_dir=cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UsageError(
            f"{file} cannot be read as {file.suffix[1:]} ({reason[0] if reason else 'empty'}); mend the file."
        ) from error


def _checked(split: datasets.Dataset, task: Task, where: str, labelled: bool) -> datasets.Dataset:
    """Raise UsageError for a missing column or an unknown label; turn label names into numbers."""
    missing = [c for c in (*task.columns, *(["label"] if labelled else [])) if c not in split.column_names]
    if missing:
        raise UsageError(
            f"{where} has no column {missing[0]!r}, only {', '.join(split.column_names)}; {task.name} needs "
            f"{', '.join(task.columns)} and label."
        )
    if not len(split):
        raise UsageError(f"{where} is empty; it needs at least one example.")
    for column in task.columns:
        bad = next((i for i, text in enumerate(split[column]) if not isinstance(text, str)), None)
        if bad is not None:
            raise UsageError(
                f"{where} has {split[column][bad]!r} for {column} in example {bad}; every example needs text there."
            )
    if "label" not in split.column_names:
        return split
    labels = split["label"]
    if task.regression:
        if not all(isinstance(v, (int, float)) for v in labels):
            raise UsageError(f"{where} has a label that is no number; {task.name} is a regression.")
        return split.cast_column("label", datasets.Value("float32"))
    if all(isinstance(v, str) for v in labels):
        unknown = sorted(set(labels) - set(task.labels))
        if not unknown:
            numbers = {name: i for i, name in enumerate(task.labels)}
            labels = [numbers[v] for v in labels]
            return split.remove_columns("label").add_column("label", labels)
    else:
        allowed = {*range(len(task.labels)), *(() if labelled else (-1,))}
        unknown = sorted({v for v in labels if v not in allowed}, key=str)
    if unknown:
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
        raise UsageError(f"{where} has the label {unknown[0]!r}; {task.name} knows {names}.")
    return split


def load_files(
    files: dict[str, str | None], cache_dir: str | None = None, labels: tuple[str, ...] = ()
) -> tuple[Task, datasets.DatasetDict]:
    """One's own data: the task it makes (columns, labels) and its splits. Raises UsageError.

    The text columns are sentence1 and sentence2 if both are there, else the first one or two others. A label of floats
    is a regression. ``labels`` are those of an adapter to evaluate, which its head knows in this order; else they are the
    sorted ones of the data.
    """
    splits = datasets.DatasetDict()
    for name, file in files.items():
        if file:
            if not Path(file).exists():
                raise UsageError(f"--{name}_file {file} does not exist; give a CSV or JSON-lines file.")
            splits[name] = _read(Path(file), cache_dir)
    first = next(iter(splits.values()))
    texts = [
        c
        for c, kind in first.features.items()
        if c not in ("label", "idx", "index") and kind.dtype in ("string", "large_string")
    ]
    if {"sentence1", "sentence2"} <= set(texts):
        texts = ["sentence1", "sentence2"]
    if not texts:
        raise UsageError(f"The files have no text column, only {', '.join(first.column_names)}; add one or two.")
    labelled = [split for name, split in splits.items() if name != "test" and "label" in split.column_names]
    if not labelled and not labels:
        raise UsageError(
            "The training or validation file needs a column 'label', or --lora_path an adapter that knows its labels."
        )
    found = labelled[0]["label"] if labelled else []
    regression = bool(found) and isinstance(found[0], float)
    names = () if regression else labels or tuple(str(v) for v in sorted(set(found), key=lambda v: (str(type(v)), v)))
    metrics = ("pearson", "spearmanr") if regression else ("accuracy",)
    task = Task("custom", tuple(texts[:2]), names, metrics)
    for name, split in splits.items():
        if "label" in split.column_names and not regression:
            # As text, so that numbers that do not start at 0 get the same treatment as names.
            split = split.map(lambda row: {"label": str(row["label"])}, features=_with_text_label(split))
            if name == "test" and not set(split["label"]) <= set(names):
                split = split.remove_columns("label")
        splits[name] = _checked(split, task, str(files[name]), name != "test")
    return task, splits


def _with_text_label(split: datasets.Dataset) -> datasets.Features:
    return datasets.Features({**split.features, "label": datasets.Value("string")})


def tokenize(
    split: datasets.Dataset, task: Task, tokenizer, max_length: int, pad: bool, fresh: bool
) -> datasets.Dataset:
    """Add the tokenizer's columns and ``length`` (tokens per example); cached between runs unless ``fresh``."""

    def encode(batch):
        out = tokenizer(
            *(batch[column] for column in task.columns),
            padding="max_length" if pad else False,
            max_length=max_length,
            truncation=True,
        )
        out["length"] = [len(ids) for ids in out["input_ids"]]
        return out

    return split.map(encode, batched=True, load_from_cache_file=not fresh, desc="tokenise")


def padding_share(lengths: list[int], batches) -> float:
    """Which share of the tokens in ``batches`` (lists of indices) is padding."""
    lengths = np.asarray(lengths)
    sizes = [(len(batch) * lengths[batch].max(), lengths[batch].sum()) for batch in batches]
    padded, real = map(sum, zip(*sizes, strict=True))
    return 1 - real / padded


__all__ = ["glue_task", "load_files", "load_glue", "padding_share", "tokenize"]
