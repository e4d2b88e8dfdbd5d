"""What is measured, gone on with or averaged a second time is what it was the first time, or it is said."""

import json
import shutil

import pytest
from transformers import AutoTokenizer
from transformers_dylora.data import load_files
from transformers_dylora.errors import UsageError
from transformers_dylora.output_dir import resume_point
from transformers_dylora.squeezing import completing
from transformers_dylora.stopping import _how_to_go_on

from loralib.adapters.directory import read_facts

from .test_own_files import parts, write
from .test_run_glue import cache, command, glue, run_glue

__all__ = ["cache", "glue"]  # fixtures
LONG = [{"text": f"w{i} " * 30, "label": ("no", "yes")[i % 2]} for i in range(12)]


def rows_of(directory):
    return json.loads((directory / "rank_results.json").read_text())["splits"]


def own_files(checkpoint, tmp_path, *more):
    return ["--model_name_or_path", str(checkpoint), "--train_file", write(tmp_path / "t.jsonl", LONG),
            "--validation_file", write(tmp_path / "v.jsonl", LONG), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
            "--report_to", "none", "--apply_lora", "--lora_r", "2", "--learning_rate", "1e-2", *more]  # fmt: skip


@pytest.mark.slow
def test_an_adapter_is_measured_again_at_the_length_that_it_was_trained_at(roberta_checkpoint, tmp_path, capsys):
    start = own_files(roberta_checkpoint, tmp_path)
    run_glue().main([*start, "--do_train", "--do_eval", "--max_seq_length", "9"])
    assert "9 at most; 12 have these 9, or had more and are cut" in capsys.readouterr().out
    first = rows_of(tmp_path / "out")
    again = [*start, "--do_eval", "--lora_path", str(tmp_path / "out")]
    run_glue().main(again)
    assert rows_of(tmp_path / "out") == first and "in the adapter's training" not in capsys.readouterr().out
    run_glue().main([*again, "--max_seq_length", "20"])
    assert "cut to 20 tokens, in the adapter's training to 9" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_goes_on_only_as_its_own_run(roberta_checkpoint, glue, tmp_path):
    each = ["--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "4"]
    out = tmp_path / "out"
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *each))
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(last, tmp_path / "copied" / last.name)
    elsewhere = command(roberta_checkpoint, glue, tmp_path / "other", "rte", *each, "--learning_rate", "1e-5")
    elsewhere += ["--resume_from_checkpoint", str(tmp_path / "copied" / last.name)]
    with pytest.raises(UsageError, match=r"holds no run_settings\.json"):
        run_glue().main(elsewhere)
    run_glue().main([*elsewhere, "--resume_anyway"])
    settings = (out / "run_settings.json").read_text()
    with pytest.raises(UsageError, match="after the end of --num_train_epochs 1"):
        run_glue().main(command(roberta_checkpoint, glue, out, "rte", *each, "--num_train_epochs", "1"))
    with pytest.raises(UsageError, match="after the end of --max_steps 2"):
        run_glue().main(command(roberta_checkpoint, glue, out, "rte", *each, "--max_steps", "2"))
    assert (out / "run_settings.json").read_text() == settings


@pytest.mark.slow
def test_what_was_made_of_the_weights_before_makes_way(roberta_checkpoint, glue, tmp_path):
    each = ["--save_strategy", "epoch", "--do_predict"]
    out = tmp_path / "out"
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *each))
    (out / "report.html").write_text("of these weights")
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *each))  # it has ended, and is measured again
    assert (out / "report.html").exists()
    longer = ["--num_train_epochs", "2", "--eval_ranks", "2", "--save_strategy", "epoch"]
    run_glue().main(command(roberta_checkpoint, glue, out, "rte", *longer))
    assert not (out / "report.html").exists() and not list(out.glob("test_results_*"))
    assert [file.name for file in out.glob("eval_r*_results.json")] == ["eval_r2_results.json"]


@pytest.mark.slow
def test_other_validation_data_are_known(roberta_checkpoint, tmp_path):
    start = own_files(roberta_checkpoint, tmp_path, "--do_train", "--do_eval", "--eval_strategy", "epoch")
    start += ["--save_strategy", "epoch", "--load_best_model_at_end", "--metric_for_best_model", "r2_accuracy"]
    run_glue().main([*start, "--num_train_epochs", "1"])
    first = json.loads((tmp_path / "out" / "rank_results.json").read_text())["data"]
    other = write(tmp_path / "w.jsonl", [row | {"text": row["text"] + "w1"} for row in LONG])
    with pytest.raises(UsageError, match="validation data was"):
        run_glue().main([*start, "--num_train_epochs", "2", "--validation_file", other])
    flags = ["--num_train_epochs", "1", "--validation_file", other, "--output_dir", str(tmp_path / "apart")]
    run_glue().main([*start, *flags])
    second = json.loads((tmp_path / "apart" / "rank_results.json").read_text())["data"]
    assert first.keys() == second.keys() == {"validation"} and first != second


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (["0.25", "0.5", "NA", "0.75"], "the label 'NA' in example 2 beside values such as 0.25"),
        (["yes", "no", "yes "], "the labels 'yes' and 'yes ': write them alike"),
        (["yes", "no", "Yes"], "the labels 'yes' and 'Yes': write them alike"),
        (["yes", "no", " "], "no label in example 2"),
    ],
)
def test_labels_that_are_hardly_meant_so_are_refused(labels, sentence, tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": f"w{i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(UsageError, match=sentence):
        load_files({"train": file}, str(tmp_path / "cache"))


def test_labels_are_what_the_user_says_they_are(tmp_path):
    def task(labels, *given):
        file = write(tmp_path / "t.jsonl", [{"text": f"w{i}", "label": label} for i, label in enumerate(labels)])
        return load_files({"train": file}, str(tmp_path / "cache"), *given)[0]

    assert task(["1.5", "2.5", "other"], (), False).labels == ("1.5", "2.5", "other")
    assert task(["US", "us"], ("US", "us")).labels == ("US", "us")


def test_what_was_taken_for_labels_is_told(roberta_checkpoint, tmp_path):
    from transformers_dylora.run_glue import load_data

    def told(labels):
        file = write(tmp_path / "t.jsonl", [{"text": f"w{i}", "label": label} for i, label in enumerate(labels)])
        model, data, training = parts(roberta_checkpoint, tmp_path, "--do_train", "--train_file", file)
        return load_data(data, model, training)[2][0]

    assert told(["no", "yes", "no"]) == "the texts: text; 2 labels: no, yes"
    assert told([str(k) for k in range(12)]).endswith("12 labels: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ..")
    assert told([0.5, 2, 3]).endswith("the labels are values, 0.5 to 3")


def test_a_run_that_ended_without_checkpoints_is_measured_and_not_begun_anew(roberta_checkpoint, tmp_path):
    *_, training = parts(roberta_checkpoint, tmp_path, "--task_name", "rte", "--do_train")
    out = tmp_path / "out"
    assert _how_to_go_on(training).endswith("start again.")
    out.mkdir()
    (out / "train_results.json").write_text("{}")
    (out / "adapter_model.safetensors").touch()
    assert f"--do_eval --lora_path {out}" in _how_to_go_on(training)
    with pytest.raises(UsageError, match=f"holds a run that has ended; measure it with .* --lora_path {out}"):
        resume_point(training)


def test_a_prompt_that_leaves_no_room_for_its_completion_is_refused(roberta_checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    pairs = [{"prompt": "w1 " * n, "completion": "w2 w3"} for n in (3, 30)]
    file = write(tmp_path / "t.jsonl", pairs)
    with pytest.raises(UsageError, match="in example 1 a prompt of 10 tokens or more"):
        completing(file, tokenizer, 10)
    assert len(completing(file, tokenizer, 60)[0]) == 2


def test_other_encodings_are_one_sentence(tmp_path):
    (tmp_path / "t.jsonl").write_bytes('{"text": "café", "label": "a"}\n'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"t\.jsonl cannot be read as jsonl"):
        load_files({"train": str(tmp_path / "t.jsonl")}, str(tmp_path / "cache"))


def test_strengths_are_fitted_once_the_training_is_over(roberta_checkpoint, glue, tmp_path, capsys):
    """In the run itself, or by the same command with the flag once it is over; what it told of other weights goes."""
    saved = ["--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-2"]
    fitted = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "at once", "rte", *saved, "--fit_strengths"))
    assert "strengths of each rank's own are learnt" in capsys.readouterr().out
    plain = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "later", "rte", *saved))
    assert fitted.fitted and not plain.fitted
    assert fitted.method == plain.method + ", then strengths of each rank's own"
    later = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "later", "rte", *saved, "--fit_strengths"))
    one, other = (read_facts(tmp_path / name)["strength_at"] for name in ("at once", "later"))
    assert one == other and any(table[0] != 1 for table in one.values())
    assert [row.loss for row in later.splits["validation"]] == [row.loss for row in fitted.splits["validation"]]
    # measured again, alone, it is called the same
    alone = [a for a in command(roberta_checkpoint, glue, tmp_path / "again") if a != "--do_train"]
    again = run_glue().main([*alone, "--lora_path", str(tmp_path / "later")])
    assert again.method == fitted.method and again.fitted
    with pytest.raises(UsageError, match="dylora squeeze ADAPTER --strengths"):
        run_glue().main([*alone, "--lora_path", str(tmp_path / "later"), "--fit_strengths"])
