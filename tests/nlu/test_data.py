"""Tasks, local data in every form, and one sentence for every mistake in it."""

import json

import datasets
import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers_dylora.data import load_files, load_glue, padding_share, tokenize
from transformers_dylora.errors import UsageError
from transformers_dylora.tasks import TASKS, glue_task


def rows(task, n=6, label=None):
    kinds = task.num_labels
    found = [dict.fromkeys(task.columns, f"w{i} w{i + 1}") | {"idx": i} for i in range(n)]
    return [
        r | {"label": label if label is not None else (0.5 * i if task.regression else i % kinds)}
        for i, r in enumerate(found)
    ]


def write(directory, task, form="jsonl"):
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for kind in ("train", "validation", "test"):
        for name in task.splits(kind):
            splits[name] = rows(task, label=-1 if kind == "test" and not task.regression else None)
    for name, content in splits.items():
        data = datasets.Dataset.from_list(content)
        if form == "jsonl":
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
        elif form == "parquet":
            data.to_parquet(directory / f"{name}.parquet")
    if form == "disk":
        datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(directory)
    return directory


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "disk"])
def test_every_task_from_every_form(name, form, tmp_path):
    task = TASKS[name]
    write(tmp_path / name, task, form)
    for directory in (tmp_path, tmp_path / name):
        splits = load_glue(task, str(directory), str(tmp_path / "cache"))
        assert set(splits) == {s for kind in ("train", "validation", "test") for s in task.splits(kind)}
        assert splits["train"].num_rows == 6
        assert splits["train"]["label"][:3] == ([0.0, 0.5, 1.0] if task.regression else [0, 1, 2 % task.num_labels])


def test_label_names_become_numbers(tmp_path):
    content = [r | {"label": ("entailment", "not_entailment")[i % 2]} for i, r in enumerate(rows(TASKS["rte"]))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    assert load_glue(TASKS["rte"], str(tmp_path), str(tmp_path / "cache"))["train"]["label"] == [0, 1] * 3


def test_missing_and_empty_directories_and_broken_files(tmp_path):
    with pytest.raises(UsageError, match="no directory"):
        load_glue(TASKS["rte"], str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="holds none of train, validation, test"):
        load_glue(TASKS["rte"], str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"sentence1": ')
    with pytest.raises(UsageError, match=r"train\.jsonl cannot be read"):
        load_glue(TASKS["rte"], str(tmp_path), str(tmp_path / "cache"))


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(UsageError, match="'ax'; choose one of cola, mnli"):
        glue_task("ax")


def test_an_unreachable_hub_names_the_way_out(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UsageError, match=r"--dataset_dir DIR, .* scripts/quickstart\.sh"):
        load_glue(TASKS["rte"], None)


def test_own_files(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nw1 w2,good\nw3,bad\nw4,good\n")
    (tmp_path / "test.csv").write_text("text\nw1\n")
    task, splits = load_files(
        {"train": str(tmp_path / "train.csv"), "validation": None, "test": str(tmp_path / "test.csv")},
        str(tmp_path / "c"),
    )
    assert (task.columns, task.labels) == (("text",), ("bad", "good")) and splits["train"]["label"] == [1, 0, 1]
    (tmp_path / "pair.jsonl").write_text('{"sentence2": "b", "sentence1": "a", "label": 0.5}\n')
    task, _ = load_files({"train": str(tmp_path / "pair.jsonl")}, str(tmp_path / "c"))
    assert task.columns == ("sentence1", "sentence2") and task.regression
    (tmp_path / "numbers.jsonl").write_text('{"a": "x", "label": 4}\n{"a": "y", "label": 2}\n')
    task, splits = load_files({"train": str(tmp_path / "numbers.jsonl")}, str(tmp_path / "c"))
    assert task.labels == ("2", "4") and splits["train"]["label"] == [1, 0]
    with pytest.raises(UsageError, match="does not exist"):
        load_files({"train": str(tmp_path / "none.csv")})


def test_tokens_are_cut_counted_and_padded_on_request(roberta_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    split = datasets.Dataset.from_list(rows(TASKS["rte"]))
    free = tokenize(split, TASKS["rte"], tokenizer, 64, False, True)
    assert free["length"] == [len(ids) for ids in free["input_ids"]] == [7] * 6
    assert {len(ids) for ids in tokenize(split, TASKS["rte"], tokenizer, 10, True, True)["input_ids"]} == {10}
    assert tokenize(split, TASKS["rte"], tokenizer, 5, False, True)["length"] == [5] * 6


def test_padding_share():
    assert padding_share([4, 2, 3, 3], [[0, 1], [2, 3]]) == pytest.approx(2 / 14)


@pytest.mark.parametrize("name", TASKS)
def test_the_metric_needs_no_download_and_gives_the_tasks_scores(name):
    from transformers_dylora.metrics import GlueMetric

    task = TASKS[name]
    generator = np.random.default_rng(0)
    labels = generator.random(50) if task.regression else generator.integers(0, task.num_labels, 50)
    predictions = (
        labels + generator.normal(size=50) if task.regression else np.where(generator.random(50) < 0.7, labels, 0)
    )
    found = GlueMetric(task).compute(predictions=predictions, references=labels)
    assert set(found) == {*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])}
    assert task.main_metric in found
    if name == "cola":
        assert found["matthews_correlation"] == pytest.approx(matthews_corrcoef(labels, predictions))
    if name == "stsb":
        assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    if name in ("mrpc", "qqp"):
        assert found["f1"] == pytest.approx(f1_score(labels, predictions))
        assert found["combined_score"] == pytest.approx((found["f1"] + found["accuracy"]) / 2)


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"text": "a b {i}", "label_text": "{name}"}, ("text",)),
        ({"id": "{i}", "text": "a b {i}"}, ("text",)),
        ({"kind": "{name}", "text": "a b {i}"}, ("text",)),  # one value for each label, again and again
        ({"question": "q {i}", "context": "c {i}"}, ("question", "context")),
        ({"other": "o {i}", "sentence1": "q {i}", "sentence2": "c {i}"}, ("sentence1", "sentence2")),
    ],
)
def test_texts_are_columns_that_neither_count_nor_say_the_label(columns, wanted, tmp_path):
    lines = [",".join([*columns, "label"])]
    for i in range(12):
        name = ("no", "yes")[i % 2]
        lines.append(",".join([*(cell.format(i=i, name=name) for cell in columns.values()), name]))
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    task, _ = load_files({"train": str(tmp_path / "t.csv")}, str(tmp_path / "cache"))
    assert task.columns == wanted


def test_more_than_two_texts_are_to_be_named(tmp_path):
    (tmp_path / "t.csv").write_text("a,b,c,label\nx y,z 1,u v,no\nx w,z 2,u t,yes\n")
    files = {"train": str(tmp_path / "t.csv")}
    with pytest.raises(UsageError, match="text columns a, b, c, and a classifier reads one or two: name them"):
        load_files(files, str(tmp_path / "cache"))
    task, splits = load_files(files, str(tmp_path / "cache"), columns=("c", "a"))
    assert task.columns == ("c", "a") and splits["train"][0]["c"] == "u v"


def test_what_datasets_caches_beside_saved_data_is_not_read(tmp_path):
    write(tmp_path / "glue", TASKS["rte"], "disk")
    loaded = datasets.load_from_disk(str(next((tmp_path / "glue").rglob("train")).parent / "train"))
    loaded.map(lambda row: {"label": 1 - row["label"]})
    assert list((tmp_path / "glue").rglob("cache-*.arrow"))
    found = load_glue(TASKS["rte"], str(tmp_path / "glue"), str(tmp_path / "cache"))
    assert len(found["train"]) == len(loaded) and found["train"]["label"] == loaded["label"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("text,text,label\na b,c d,no\ne f,g h,yes\n", "has two columns 'text'; rename or remove one"),
        ("text\na b\n  \nc d\n", "has a blank cell in line 3, its only one"),
    ],
)
def test_a_csv_that_would_be_read_otherwise_than_it_stands(content, sentence, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UsageError, match=sentence):
        load_files({"test": str(tmp_path / "t.csv")}, str(tmp_path / "cache"), ("no", "yes"))
