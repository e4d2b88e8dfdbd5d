"""What a command line says of its own files, its outputs' names and its starts, before anything is trained."""

import json

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification
from transformers_dylora.arguments import parse
from transformers_dylora.errors import UsageError
from transformers_dylora.identity import settings_of
from transformers_dylora.output_dir import resume_point
from transformers_dylora.results import write_predictions
from transformers_dylora.run_glue import load_data
from transformers_dylora.tasks import TASKS, Task

import loralib as lora

ROWS = [{"text": f"w{i} w{i + 1}", "label": ("no", "yes")[i % 2]} for i in range(6)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def parts(checkpoint, tmp_path, *flags):
    usual = ["--model_name_or_path", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    return parse([*usual, "--report_to", "none", *flags])


def test_a_head_without_names_is_not_measured_by_the_alphabet(roberta_checkpoint, tmp_path):
    file = write(tmp_path / "v.jsonl", ROWS)

    def load(*flags):
        model, data, training = parts(roberta_checkpoint, tmp_path, "--do_eval", "--validation_file", file, *flags)
        return load_data(data, model, training)

    with pytest.raises(UsageError, match="tells no names of its outputs, and the labels are no, yes: name them"):
        load()
    _, raw, notes = load("--labels", "yes,no")
    assert raw["validation"]["label"] == [1, 0] * 3 and "the texts: text; 2 labels: yes, no" in notes


def test_a_validation_file_needs_labels_before_training(roberta_checkpoint, tmp_path):
    train = write(tmp_path / "t.jsonl", ROWS)
    validation = write(tmp_path / "v.jsonl", [{"text": row["text"]} for row in ROWS])
    flags = ["--do_train", "--do_eval", "--train_file", train, "--validation_file", validation]
    model, data, training = parts(roberta_checkpoint, tmp_path, *flags)
    with pytest.raises(UsageError, match="has no column 'label' to measure by"):
        load_data(data, model, training)


def test_alpha_is_that_of_the_adapter_to_start_from(roberta_checkpoint, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint)
    lora.save_adapter(lora.inject(model, ["query"], r=4, lora_alpha=20), tmp_path / "a")
    flags = ["--task_name", "rte", "--do_train", "--apply_lora", "--lora_r", "4"]
    assert parts(roberta_checkpoint, tmp_path, *flags)[0].lora_alpha == 8
    assert parts(roberta_checkpoint, tmp_path, *flags, "--lora_path", str(tmp_path / "a"))[0].lora_alpha == 20


def test_another_tokenizer_is_another_run(roberta_checkpoint, tmp_path):
    file = write(tmp_path / "t.jsonl", ROWS)
    found = []
    for more in ([], ["--tokenizer_name", str(tmp_path)]):
        flags = ["--do_train", "--train_file", file, *more]
        model, data, training = parts(roberta_checkpoint, tmp_path, *flags)
        task, raw, _ = load_data(data, model, training)
        found.append(settings_of(model, data, training, task, raw["train"]))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"tokenizer_name"}


def test_a_checkpoint_of_another_run_does_not_go_over_one_that_has_ended(roberta_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_results.json").write_text("{}")
    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setattr("transformers_dylora.output_dir.damage_of", lambda _: None)
    flags = ["--task_name", "rte", "--do_train", "--resume_from_checkpoint", str(tmp_path / "other" / "checkpoint-3")]
    with pytest.raises(UsageError, match="holds another run, which has ended"):
        resume_point(parts(roberta_checkpoint, tmp_path, *flags)[2])
    flags.append("--overwrite_output_dir")
    assert resume_point(parts(roberta_checkpoint, tmp_path, *flags)[2])[0].endswith("checkpoint-3")


@pytest.mark.parametrize(
    ("task", "shown"), [(TASKS["stsb"], "0.000"), (Task("custom", ("text",), (), ("pearson",)), "0.0001234568")]
)
def test_small_values_are_not_rounded_away_but_for_glues_server(task, shown, tmp_path):
    write_predictions(str(tmp_path), "x", task, [1], np.full((1, 1, 1), 1.2345678e-4, np.float32))
    assert (tmp_path / "test_results_x_r1.txt").read_text() == f"index\tprediction\n0\t{shown}\n"
