"""``dylora train``: settings from a file and back, what it does without being told, data without a validation file."""

import csv
import json
import os

import pytest
import yaml
from hypothesis import given as forall
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification
from transformers_dylora.arguments import line_parser, parse
from transformers_dylora.data import held_out, load_files
from transformers_dylora.errors import UsageError
from transformers_dylora.run_glue import train
from transformers_dylora.settings import expanded, given, store_config, without_tokens

import loralib as lora
from loralib.cli import main

from .test_run_glue import cache, glue  # noqa: F401

SETTINGS = {
    "learning_rate": st.floats(1e-7, 1.0),
    "num_train_epochs": st.floats(0.1, 50),
    "seed": st.integers(0, 2**31),
    "lora_r": st.integers(1, 64),
    "apply_lora": st.just(True),
    "bf16": st.booleans(),
    "group_by_length": st.booleans(),
    "lora_target_modules": st.lists(st.sampled_from(["query", "value", "key"]), min_size=1, max_size=3, unique=True),
    "eval_ranks": st.just("1"),
    "output_dir": st.text("abcXYZ09 _-/", min_size=1).filter(lambda text: not text.startswith("-")),
    "train_file": st.just("0012.csv"),
    "lora_scaling": st.sampled_from(["alpha/b", "alpha/r"]),
    "hub_model_id": st.sampled_from(["007", "true", "1e-3", "me/model"]),
}
NEEDED = {"model_name_or_path": "some/model", "train_file": "0012.csv", "apply_lora": True}


@forall(st.fixed_dictionaries({}, optional=SETTINGS))
def test_what_is_stored_means_what_was_given(tmp_path_factory, settings):
    directory = tmp_path_factory.mktemp("run")
    file = directory / "mine.yaml"
    file.write_text(yaml.safe_dump(NEEDED | settings))
    argv = expanded([str(file)])
    store_config(directory, given(argv, line_parser()))
    again = expanded([str(directory / "config.yaml")])
    for one, other in zip(parse(argv), parse(again), strict=True):
        assert one == other
    for name, value in (NEEDED | settings).items():
        assert value in [getattr(part, name, None) for part in parse(argv)]


@pytest.mark.parametrize("flag", ["lora_paced", "lora_frozen", "regression"])
def test_a_switch_alone_is_on_and_left_out_is_neither(flag):
    line = ["--model_name_or_path", "m", "--train_file", "t.csv", "--output_dir", "o", "--apply_lora"]
    for given_flag, value in (([f"--{flag}"], True), ([f"--{flag}", "False"], False), ([], None)):
        (found,) = [getattr(part, flag) for part in parse([*line, *given_flag]) if hasattr(part, flag)]
        assert found is value


def test_flags_after_the_file_count_and_abbreviations_are_stored_whole(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("learning_rate: 1e-3\nlora_r: 4\nlora_dropout:\n")
    argv = expanded([str(file), "--lora_r=2", "--learning-rate", "0.5", "--no_group_by_length", "--weight_d", "0.1"])
    assert given(argv, line_parser()) == {
        "learning_rate": 0.5, "lora_r": 2, "group_by_length": False, "weight_decay": 0.1
    }  # fmt: skip


def test_a_word_in_a_file_is_a_word(tmp_path):
    """YAML 1.1 has no and off for false, 010 for eight, and 1e-5 for text."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "report_to: [no, off]\nsave_strategy: no\nseed: 010\nlr_scheduler_kwargs: {min_lr: 1e-5, a: [no]}\n"
    )
    assert expanded([str(file)]) == [
        "--report_to", "no", "off", "--save_strategy", "no", "--seed", "010",
        "--lr_scheduler_kwargs", '{"min_lr": 1e-05, "a": ["no"]}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "no table of settings"),
        ("a: [1", "is no YAML"),
        ("1: 2\n", "no table of settings"),
        ("", "no table"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(text, sentence, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        expanded([str(tmp_path / "a.yaml")])
    with pytest.raises(UsageError, match="does not exist"):
        expanded([str(tmp_path / "b.yaml")])


@pytest.mark.parametrize("flag", ["--token", "--hub_token", "--push_to_hub_token", "--hub-token", "--hub_tok"])
def test_no_token_is_written_down(flag):
    for words in ([flag, "secret", "--seed", "1"], [f"{flag}=secret", "--seed", "1"]):
        assert "secret" not in " ".join(without_tokens(words)) and "--seed 1" in " ".join(without_tokens(words))
        if flag != "--push_to_hub_token":  # transformers 5 has no such flag
            assert given(words, line_parser()) == {"seed": 1}


def test_transformers_names_work_beside_the_released_ones():
    words = ["--model_name_or_path", "m", "--task_name", "rte", "--output_dir", "o"]
    _, data, _ = parse([*words, "--max_eval_samples", "3", "--max_predict_samples", "4"])
    assert (data.max_val_samples, data.max_test_samples) == (3, 4)
    _, data, _ = parse([*words, "--max_val_samples", "3", "--max_test_samples", "4"])
    assert (data.max_val_samples, data.max_test_samples) == (3, 4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "The following arguments are required: --model_name_or_path; --help lists all flags."),
        (["--model_name_or_path", "m", "--lora_r", "two", "--task_name", "rte"], "Argument --lora_r: invalid int value: 'two'"),
        (["--model_name_or_path", "m", "--task_name", "rte", "--lerning_rate", "1"], "did you mean --learning_rate?"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_one_sentence(words, sentence, capsys):
    assert main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1 and said.startswith("dylora train: ")


def test_a_tenth_is_held_out_always_the_same():
    import datasets

    data = datasets.Dataset.from_dict({"sentence": list(map(str, range(47))), "label": [0] * 47})
    one, other = held_out(data), held_out(data)
    assert one["validation"]["sentence"] == other["validation"]["sentence"] and len(one["validation"]) == 5
    assert sorted([*one["train"]["sentence"], *one["validation"]["sentence"]]) == sorted(data["sentence"])
    assert len(held_out(data.select(range(2)))["train"]) == 1
    with pytest.raises(UsageError, match="--validation_file"):
        held_out(data.select(range(1)))


def test_how_a_run_was_started_is_no_setting_of_it():
    words = ["--seed", "3", "--resume_from_checkpoint", "true", "--resume-anyway", "--overwrite_output_dir", "true"]
    assert given(words, line_parser()) == {"seed": 3}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.csv", ",text,label\n0,w1,yes\n", "has a column without a name"),
        ("a.csv", 'text,label\nw1,"yes\nw2,no\n', "cannot be read as csv"),
        ("a.csv", 'text,label\n"w1,yes\nw2,no\n', "^[^ ]*a.csv, line 3: 2 columns, but cells: 1; .*close each quote"),
        ("a.csv", "text,label\nw1, w2,yes\n", "^[^ ]*a.csv, line 2: 2 columns, but cells: 3; quote a cell"),
        ("a.tsv", "text\tlabel\n", "ends in '.tsv'; give one that ends in"),
        (
            "a.json",
            '{"text": "w1", "label": "2020-01-01"}\n{"text": "w2", "label": "2020-01-01"}\n',
            "has the label '2020-01-01 00:00:00' in example 0",
        ),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(name, text, sentence, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_files({"train": str(tmp_path / name)}, str(tmp_path / "cache"))


def test_a_csvs_texts_may_be_as_long_as_they_like(tmp_path):
    long = "w " * 200_000
    (tmp_path / "a.csv").write_text(f"text,label\n{long},yes\nw1,no\n")
    _, splits = load_files({"train": str(tmp_path / "a.csv")}, str(tmp_path / "cache"))
    assert splits["train"]["text"] == [long, "w1"]


def test_a_file_with_other_contents_is_read_anew_whatever_its_time(tmp_path):
    found = []
    for text in ("one", "two"):
        (tmp_path / "a.csv").write_text(f"text,label\n{text},yes\n{text},no\n")
        os.utime(tmp_path / "a.csv", (1e9, 1e9))
        found.append(load_files({"train": str(tmp_path / "a.csv")}, str(tmp_path / "cache"))[1]["train"]["text"][0])
    assert found == ["one", "two"]


def test_an_adapters_columns_are_those_that_it_was_trained_on(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n7,w1\n")
    task, _ = load_files({"test": str(tmp_path / "a.csv")}, str(tmp_path / "cache"), ("no", "yes"), None, ("text",))
    assert task.columns == ("text",)
    with pytest.raises(UsageError, match="has no column 'body'"):
        load_files({"test": str(tmp_path / "a.csv")}, str(tmp_path / "cache"), ("no", "yes"), None, ("body",))


def rows_of(path, n=30):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"w{i}", "yes" if i % 2 else "no"] for i in range(n)])


@pytest.mark.slow
def test_own_data_without_a_word_more_and_again_from_its_config(roberta_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows_of("my.csv")
    words = ["--model_name_or_path", str(roberta_checkpoint), "--train_file", "my.csv", "--report_to", "none", "--use_cpu",
             "--disable_tqdm", "true", "--token", "secret", "--lora_r", "3", "--num_train_epochs", "2", "--learning_rate",
             "1e-2"]  # fmt: skip
    found = train([*words, "--output_dir", "one"])
    assert "3 of the 30 examples of my.csv, drawn at random, are held out" in capsys.readouterr().out
    assert found.max_rank == 3 and {row.samples for row in found.splits["validation"]} == {3}
    assert found.command.startswith("dylora train --do_train --do_eval --apply_lora ")
    for file in ("config.yaml", "rank_results.json", "README.md", "run_settings.json"):
        assert "secret" not in (tmp_path / "one" / file).read_text()
    assert main(["train", "one/config.yaml", "--output_dir", "two"]) == 0
    one, two = (json.loads((tmp_path / run / "rank_results.json").read_text()) for run in ("one", "two"))
    assert one["splits"] == two["splits"]
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("one", "two")]
    assert weights[0] == weights[1]
    stored = [yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("one", "two")]
    assert stored[0] | {"output_dir": "two"} == stored[1]


def test_the_adapter_to_start_from_says_its_rank_and_whether_it_can_go_on_as_released(tmp_path, roberta_checkpoint):
    model = lora.inject(AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint), ["query"], r=3)
    lora.save_adapter(model, tmp_path / "adapter")
    words = ["--model_name_or_path", "m", "--task_name", "rte", "--output_dir", "o", "--apply_lora", "--lora_path"]
    found, _, _ = parse([*words, str(tmp_path / "adapter")])
    assert (found.lora_r, found.lora_alpha, found.measured_ranks()) == (3, 6, [1, 2, 3])
    assert parse([*words[:-1]])[0].lora_r == 8
    with pytest.raises(UsageError, match="was trained at alpha/r: train that one with --as_released too"):
        parse([*words, str(tmp_path / "adapter"), "--as_released"])[0].scaling()


def test_help_tells_what_dylora_train_does_by_itself(capsys):
    with pytest.raises(SystemExit):
        train(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    line_parser().set_defaults(apply_lora=False, do_train=False, do_eval=False)
    assert told.startswith("usage: dylora train [FILE.yaml] FLAGS")
    assert "trains the whole model. (default: True)" in told
