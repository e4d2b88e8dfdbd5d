"""A class number means something only with the names of its source: permuted heads and data give the scores of the unpermuted."""

import json

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification
from transformers_dylora.data import load_files, load_glue
from transformers_dylora.errors import UsageError
from transformers_dylora.labels import any_fraction, label_names
from transformers_dylora.tasks import TASKS

import loralib as lora
from loralib.adapters.labels import places, told

from .test_run_glue import run_glue

NAMES = TASKS["mnli"].labels
ORDER = [2, 1, 0]  # contradiction, neutral, entailment, as a well-known checkpoint has it
PERMUTED = tuple(NAMES[i].upper() for i in ORDER)
SPLITS = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")


@pytest.fixture(scope="module")
def world(roberta_checkpoint, tmp_path_factory):
    """A classifier with strong weights, data that it answers rightly in most cases, and both once more in other orders."""
    folder = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    config = RobertaConfig.from_pretrained(roberta_checkpoint, num_labels=3)
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    model = RobertaForSequenceClassification.from_pretrained(roberta_checkpoint, config=config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0) if parameter.ndim == 2 else nn.init.ones_(parameter)
    nn.init.zeros_(model.classifier.out_proj.bias)
    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    generator = np.random.default_rng(0)
    for split in SPLITS:
        rows = []
        for i in range(40):
            premise, hypothesis = (" ".join(f"w{k}" for k in generator.integers(0, 100, 6)) for _ in "ab")
            with torch.no_grad():
                label = int(model(**tokenizer(premise, hypothesis, return_tensors="pt")).logits.argmax())
            label = label if i % 10 else (label + 1) % 3
            rows.append(
                {"premise": premise, "hypothesis": hypothesis, "label": -1 if "test" in split else label, "idx": i}
            )
        for kind in ("jsonl", "disk", "parquet"):
            (folder / kind / "mnli").mkdir(parents=True, exist_ok=True)
        (folder / "jsonl" / "mnli" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        other = [row | {"label": -1 if row["label"] < 0 else ORDER.index(row["label"])} for row in rows]
        features = datasets.Features(
            {"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
             "label": datasets.ClassLabel(names=list(PERMUTED)), "idx": datasets.Value("int64")}
        )  # fmt: skip
        data = datasets.Dataset.from_list(other, features=features)
        data.save_to_disk(folder / "disk" / "mnli" / split)
        data.to_parquet(folder / "parquet" / "mnli" / f"{split}.parquet")
        if "validation" in split:
            named = [{"a": r["premise"], "b": r["hypothesis"], "label": NAMES[r["label"]]} for r in rows]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    model.save_pretrained(folder / "plain")
    out = model.classifier.out_proj
    with torch.no_grad():
        out.weight.copy_(out.weight[ORDER].clone())
        out.bias.copy_(out.bias[ORDER].clone())
    model.config.id2label, model.config.label2id = dict(enumerate(PERMUTED)), {n: i for i, n in enumerate(PERMUTED)}
    model.save_pretrained(folder / "permuted")
    lora.inject(model, ["query", "value"], r=3, lora_alpha=16)
    model.config._name_or_path = str(folder / "plain")
    lora.save_adapter(model, folder / "adapter", extra={"task": "mnli"})
    for name in ("plain", "permuted"):
        tokenizer.save_pretrained(folder / name)
    return folder


def run(world, out, *flags, model="permuted", data="jsonl"):
    found = run_glue().main([
        "--model_name_or_path", str(world / model), "--output_dir", str(out), "--max_seq_length",
        "32", "--report_to", "none", "--disable_tqdm", "true", "--do_eval",
        *(["--task_name", "mnli", "--dataset_dir", str(world / data)] if data else []), *flags,
    ])  # fmt: skip
    return next(iter(found.splits.values()))[-1].scores["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["jsonl", "disk", "parquet"])
def test_a_whole_model_in_another_order_and_data_in_another_order(data, world, tmp_path):
    assert run(world, tmp_path / "a", "--do_predict", model="plain", data=data) == pytest.approx(0.9)
    assert run(world, tmp_path / "b", "--do_predict", model="permuted", data=data) == pytest.approx(0.9)
    tests = [(tmp_path / name / "test_results_mnli_r0.txt").read_text() for name in "ab"]
    assert tests[0] == tests[1] and "entailment" in tests[0]


ADAPTED = ["--apply_lora", "--lora_r", "3", "--lora_alpha", "16"]


@pytest.mark.slow
def test_an_adapter_in_another_order_and_a_start_of_training(world, tmp_path):
    flags = [*ADAPTED, "--lora_path", str(world / "adapter")]
    assert run(world, tmp_path / "a", *flags, model="plain") == pytest.approx(0.9)
    assert run(world, tmp_path / "b", *flags, "--do_train", "--learning_rate", "0", model="plain") == pytest.approx(0.9)
    assert run(world, tmp_path / "c", *ADAPTED, "--do_train", "--learning_rate", "0") == pytest.approx(0.9)


@pytest.mark.slow
def test_own_files_of_names(world, tmp_path):
    file = ["--validation_file", str(world / "validation_matched.jsonl")]
    assert run(world, tmp_path / "a", *file, data=None) == pytest.approx(0.9)
    flags = [*ADAPTED, "--lora_path", str(world / "adapter"), *file]
    assert run(world, tmp_path / "b", *flags, model="plain", data=None) == pytest.approx(0.9)
    rows = [json.loads(line) for line in (world / "validation_matched.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["label"] != "neutral"]  # a class that does not occur
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(world, tmp_path / "c", "--validation_file", str(tmp_path / "two.jsonl"), data=None) > 0.7


@pytest.mark.slow
def test_other_names_are_refused_where_the_head_answers_and_a_start_in_training(
    world, roberta_checkpoint, tmp_path, capsys
):
    for name in ("rte", "qnli"):
        for split in ("train", "validation"):
            rows = [dict.fromkeys(TASKS[name].columns, "w1 w2") | {"label": i % 2, "idx": i} for i in range(8)]
            (tmp_path / "glue" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "glue" / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--dataset_dir", str(tmp_path / "glue")]
    rte = ["--task_name", "rte", *common]
    with pytest.raises(UsageError, match="head of another size"):
        run(world, tmp_path / "a", *rte, data=None)
    # Trained on a base with a head of three for a task of two: measured later, it is the training run's.
    trained = run(world, tmp_path / "rte", *rte, *ADAPTED, "--do_train", data=None)
    again = [*ADAPTED, "--lora_path", str(tmp_path / "rte")]
    assert run(world, tmp_path / "b", *rte, *again, data=None) == trained
    capsys.readouterr()
    run(world, tmp_path / "c", "--task_name", "qnli", *common, *again, data=None)
    assert "the adapter was trained on rte, whose labels have the same names: scored on qnli" in capsys.readouterr().out
    (tmp_path / "glue" / "mrpc").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "glue" / "mrpc" / f"{split}.jsonl").write_text(
            (tmp_path / "glue" / "rte" / f"{split}.jsonl").read_text()
        )
    mrpc = ["--task_name", "mrpc", *common, *again]
    with pytest.raises(
        UsageError, match="knows the labels entailment, not_entailment, the model not_equivalent, equivalent"
    ):
        run(world, tmp_path / "d", *mrpc, data=None)
    run(world, tmp_path / "e", *mrpc, "--do_train", data=None)
    assert "no more than a start" in capsys.readouterr().out


def test_names_that_tell_something_and_where_they_stand():
    assert told(["LABEL_0", "LABEL_1"]) == told(["0", "1"]) == told(None) == () and told(["no", "yes"]) == ("no", "yes")
    assert places(("b", "A"), ("a", "B")) == [1, 0] and places(("a", "b"), ("a", "c")) is None
    assert places(("a", "A"), ("A", "a")) == [1, 0]  # two names that differ in nothing but the case


def test_label_names_of_ones_own_data():
    assert label_names([10, 9, 2.0]) == ("2", "9", "10") and label_names(["b", "a"]) == ("a", "b")
    assert any_fraction([1.0, 2.5]) and not any_fraction([1.0, 2.0]) and not any_fraction(["a", 0.5])


CSV = 'text,label\n"a, b",NA\nNone,None\nn/a,01\nnull,1\n"",NA\n'


def test_cells_of_a_csv_are_text_as_in_json_lines(tmp_path):
    rows = [("a, b", "NA"), ("None", "None"), ("n/a", "01"), ("null", "1"), ("", "NA")]
    (tmp_path / "d.csv").write_text(CSV)
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in rows))
    found = []
    for name in ("d.csv", "d.jsonl"):
        task, splits = load_files({"train": str(tmp_path / name)}, str(tmp_path / "cache"))
        found.append((task, splits["train"]["text"][:], splits["train"]["label"][:]))
    assert found[0] == found[1] and found[0][0].labels == ("01", "1", "NA", "None")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], "no label in example 1"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": None}], "no label in example 1"),
        ([{"text": "a", "label": [1]}], r"label \[1\] in example 0"),
        ([{"text": "a", "label": {"k": 1}}], r"label \{'k': 1\} in example 0"),
        ([{"text": "a", "label": "x"}], "the label 'x' alone"),
        ([], r"is empty"),
    ],
)
def test_a_cell_that_is_no_label_is_one_sentence(rows, message, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=message):
        load_files({"train": str(tmp_path / "d.jsonl")}, str(tmp_path / "cache"))


def test_an_empty_cell_of_a_csv_is_a_missing_label(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\na,x\nb,\n")
    with pytest.raises(UsageError, match="no label in example 1"):
        load_files({"train": str(tmp_path / "d.csv")}, str(tmp_path / "cache"))


@pytest.mark.parametrize("values", [[0, 1], [0.0, 1.0], [False, True], ["0", "1"], ["entailment", "not_entailment"]])
def test_glue_labels_however_they_are_written(values, tmp_path):
    for split in ("train", "validation"):
        rows = [{"sentence1": "a", "sentence2": "b", "label": v, "position_ids": [1, 2]} for v in values]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_glue(TASKS["rte"], str(tmp_path), str(tmp_path / "cache"))
    for split in splits.values():
        assert split["label"][:] == [0, 1] and split.column_names == ["sentence1", "sentence2", "label"]


def test_regression_is_a_stored_fact(tmp_path):
    (tmp_path / "whole.jsonl").write_text('{"a": "x", "label": 5}\n{"a": "y", "label": 0}\n')
    for told_so, labels in ((True, ()), (None, ("0", "5")), (False, ("0", "5"))):
        task, splits = load_files(
            {"validation": str(tmp_path / "whole.jsonl")}, str(tmp_path / "c"), regression=told_so
        )
        assert task.labels == labels and splits["validation"]["label"][:] == ([5.0, 0.0] if told_so else [1, 0])
    (tmp_path / "none.jsonl").write_text('{"a": "x"}\n')
    assert load_files({"test": str(tmp_path / "none.jsonl")}, str(tmp_path / "c"), regression=True)[0].regression
    (tmp_path / "nan.jsonl").write_text('{"a": "x", "label": 0.5}\n{"a": "y", "label": NaN}\n')
    with pytest.raises(UsageError, match=r"in example 1|cannot be read"):
        load_files({"train": str(tmp_path / "nan.jsonl")}, str(tmp_path / "c"))
