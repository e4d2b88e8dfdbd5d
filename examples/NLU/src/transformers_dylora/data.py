"""Loading a task's splits, from the hub, a local directory or one's own files, and tokenising them."""

import csv
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np

from .errors import UsageError
from .labels import any_fraction, as_numbers, is_number, label_names, names_in, refuse_doubtful, refuse_missing
from .tasks import Task, glue_task

HUB_NAME = "nyu-mll/glue"
ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
csv.field_size_limit(2**31 - 1)  # for the whole process: a document is often longer than Python's limit, 131,072


def load_glue(task: Task, dataset_dir: str | None, cache_dir: str | None = None) -> datasets.DatasetDict:
    """The splits of a GLUE task that are there, checked. Raises UsageError."""
    splits = _from_directory(task, Path(dataset_dir), cache_dir) if dataset_dir else _from_hub(task, cache_dir)
    for name, split in splits.items():
        if "test" in name and "label" in split.column_names:
            split = split.remove_columns("label")  # predictions do not need it, and it may be hidden
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
    wanted = [name for kind in ("train", "validation", "test") for name in task.splits(kind)]
    found = {}
    for name in wanted:
        file = next((own / (name + ending) for ending in ENDINGS if (own / (name + ending)).exists()), None)
        if file is not None:
            found[name] = read_rows(file, cache_dir)
        elif _saved_files(own / name):
            found[name] = read_rows(own / name, cache_dir)
    if not found:
        raise UsageError(
            f"{own} holds none of {', '.join(wanted)} as .jsonl, .parquet, .csv or what save_to_disk writes; "
            f"put {task.name}'s splits there."
        )
    return datasets.DatasetDict(found)


def read_rows(file: Path, cache_dir: str | None = None) -> datasets.Dataset:
    """The rows of a file, or of a split's directory from save_to_disk. What is made of them goes to the cache, not
    beside."""
    options: dict = {}
    kind = "arrow" if file.is_dir() else ENDINGS.get(file.suffix, "")
    if not kind:
        raise UsageError(f"{file} ends in {file.suffix!r}; give one that ends in {', '.join(ENDINGS)}.")
    if kind != "arrow" and not file.stat().st_size:
        raise UsageError(f"{file} is empty; it needs at least one example.")
    try:
        if kind == "csv":
            options = csv_as_text(file)
        elif kind == "json":
            with open(file, encoding="utf-8") as lines:
                for _ in lines:  # what is no UTF-8 would be met later, where the texts are used
                    pass
        files = _saved_files(file) if kind == "arrow" else [str(file)]
        options |= {"name": content_name(files)}
        return datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache_dir, **options)
    except UsageError:
        raise
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, csv.Error) as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UsageError(
            f"{file} cannot be read as {file.suffix[1:] or kind} ({reason[0] if reason else 'empty'}); mend the file."
        ) from error


def _saved_files(directory: Path) -> list[str]:
    """The files that save_to_disk wrote there. Others may be what datasets keeps of a map or a filter, beside them."""
    try:
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        return [str(directory / entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def content_name(files: list[str]) -> str:
    """A name for these files' contents. The cache tells files apart by path and time alone, and a copy may keep its
    time."""
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"content-{digest.hexdigest()[:16]}"


def csv_as_text(file: Path) -> dict:
    """Options for reading a CSV, of which all cells are text: NA, None and an empty cell are no missing values, 01 is
    not 1.

    Raises UsageError for a file without rows, for two columns of one name, and for a row with more or fewer cells than
    there are columns, or with a blank one where there is one column: pandas would pass it over.
    """
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        columns, empty = next(rows, []), True
        for row in rows:
            empty = empty and not row
            if len(columns) == 1 and row and not row[0].strip():
                raise UsageError(f"{file} has a blank cell in line {rows.line_num}, its only one; fill or remove it.")
            if row and len(row) != len(columns):
                raise UsageError(
                    f"{file}, line {rows.line_num}: {len(columns)} columns, but cells: {len(row)}; quote a cell that "
                    "holds a comma, and close each quote."
                )
    if empty:
        raise UsageError(f"{file} is empty; it needs at least one example.")
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice:
        raise UsageError(f"{file} has two columns {twice!r}; rename or remove one.")
    if "" in columns:
        raise UsageError(f"{file} has a column without a name (a table's index?); name it, or leave it out.")
    text = datasets.Features({name: datasets.Value("string") for name in columns})
    return {"features": text, "keep_default_na": False, "na_filter": False}


def _checked(split: datasets.Dataset, task: Task, where: str, labelled: bool) -> datasets.Dataset:
    """The task's columns with labels as the task numbers them. Raises UsageError for a missing column, text or label.

    Other columns are left out: nothing of them may reach the model.
    """
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
    kept = [c for c in (*task.columns, "label", "idx") if c in split.column_names]
    split = split.select_columns(kept)
    if "label" not in kept:
        return split
    numbers = as_numbers(split["label"], task, where, names_in(split.features["label"]))
    kind = datasets.Value("float32" if task.regression else "int64")
    return split.remove_columns("label").add_column("label", numbers, feature=kind)


def load_files(
    files: dict[str, str | None],
    cache_dir: str | None = None,
    labels: tuple[str, ...] = (),
    regression: bool | None = None,
    columns: tuple[str, ...] = (),
    usual: tuple[str, ...] = (),
) -> tuple[Task, datasets.DatasetDict]:
    """One's own data: the task it makes (columns, labels) and its splits. Raises UsageError.

    The text columns are sentence1 and sentence2 if both are there, else the one or two others (``_text_columns``).

    Args:
        labels: those that a model to evaluate knows, in its order; else they are the sorted ones of the first labelled
            file.
        columns: the text columns that such a model was trained on; without, those of the first file.
        usual: text columns to prefer where that file has them all (a GLUE task's).
        regression: whether labels are values; None: they are if any of that file's is a number with a fraction.
    """
    splits = datasets.DatasetDict()
    for name, file in files.items():
        if file:
            if not Path(file).exists():
                raise UsageError(f"--{name}_file {file} does not exist; give a CSV or JSON-lines file.")
            splits[name] = read_rows(Path(file), cache_dir)
            if not len(splits[name]):
                raise UsageError(f"{file} is empty; it needs at least one example.")
    first_file = next(iter(splits.values()))
    there = usual if set(usual) <= set(first_file.column_names) else ()
    texts = columns or there or _text_columns(first_file)
    labelled = [name for name, split in splits.items() if name != "test" and "label" in split.column_names]
    if not labelled and not labels and regression is None:
        raise UsageError(
            "The training or validation file needs a column 'label', or --lora_path an adapter that knows its labels."
        )
    first = splits[labelled[0]] if labelled else None
    values = [] if first is None else first["label"]
    where = str(files[labelled[0]]) if labelled else ""
    if first is not None:
        refuse_missing(values, where)
        if regression is None and not labels and not names_in(first.features["label"]):
            refuse_doubtful(values, where)
    if regression is None:
        regression = not labels and any_fraction(values)
    names = () if regression else labels or names_in(first.features["label"]) or label_names(values)
    if labelled and not regression and len(names) < 2:
        raise UsageError(f"{where} has the label {names[0]!r} alone; a classifier needs two labels or more.")
    task = Task("custom", texts, names, ("pearson", "spearmanr") if regression else ("accuracy",))
    for name, split in splits.items():
        if name == "test" and "label" in split.column_names:
            split = split.remove_columns("label")
        is_labelled = "label" in split.column_names
        if name == "train" and not is_labelled:
            raise UsageError(f"{files[name]} has no column 'label', only {', '.join(split.column_names)}.")
        splits[name] = _checked(split, task, str(files[name]), is_labelled)
    return task, splits


HELD_OUT = 0.1


def held_out(train: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """A tenth of the examples, drawn at random and always the same, as "validation", the others as "train".

    Raises UsageError where there are too few for both.
    """
    if len(train) < 2:
        raise UsageError(f"The training file has {len(train)} example, none to hold out; give a --validation_file.")
    size = max(1, round(HELD_OUT * len(train)))
    parts = train.train_test_split(test_size=size, seed=0)
    return {"train": parts["train"], "validation": parts["test"]}


def _text_columns(split: datasets.Dataset) -> tuple[str, ...]:
    """sentence1 and sentence2, else the columns of texts, if they are one or two: none of numbers, and none that says
    the label (SetFit's label_text). Raises UsageError for none, and for more than two."""
    kinds = {name: getattr(kind, "dtype", None) for name, kind in split.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if {"sentence1", "sentence2"} <= set(strings):
        return "sentence1", "sentence2"
    texts = [name for name in strings if name not in ("idx", "index") and not _says_label(split, name)]
    texts = [name for name in texts if not all(map(is_number, split[name]))]
    if not texts:
        raise UsageError(
            f"The files have no text column, only {', '.join(split.column_names)}; add one or two, or name them with "
            "--text_columns."
        )
    if len(texts) > 2:
        raise UsageError(
            f"The files have the text columns {', '.join(texts)}, and a classifier reads one or two: name them, as in "
            f"--text_columns {texts[0]}."
        )
    return tuple(texts)


def _says_label(split: datasets.Dataset, column: str) -> bool:
    """Whether a column is the label, goes by such a name, or has one value for each label, again and again."""
    if column.startswith("label") or column.endswith("_label"):
        return True
    if "label" not in split.column_names:
        return False
    values, labels = split[column], split["label"]
    pairs = len(set(zip(values, map(str, labels), strict=True)))
    return pairs == len(set(values)) == len(set(map(str, labels))) and 2 * pairs <= len(values)


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


__all__ = ["glue_task", "held_out", "load_files", "load_glue", "padding_share", "tokenize"]
