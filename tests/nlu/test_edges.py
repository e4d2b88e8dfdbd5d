"""Labels that are numbers, columns of GLUE's tasks, directories that hold another adapter, and flags beside flags."""

import json

import pytest
from transformers import AutoModelForSequenceClassification
from transformers_dylora.arguments import line_parser, parse
from transformers_dylora.data import load_files
from transformers_dylora.errors import UsageError
from transformers_dylora.identity import settings_of
from transformers_dylora.output_dir import LEFT, check_output_dir
from transformers_dylora.run_glue import load_data, train
from transformers_dylora.settings import expanded, given, store_config
from transformers_dylora.squeezing import Adapted

import loralib as lora
from loralib.adapters.labels import told

from .test_own_files import parts, write


def adapter(checkpoint, path, names, **facts):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, id2label=dict(enumerate(names)))
    lora.inject(model, ["query"], r=2)
    lora.save_adapter(model, path, extra={"labels": list(names)} | facts)
    return model.eval()


@pytest.mark.parametrize(
    ("names", "beside", "found"),
    [
        (["LABEL_0", "LABEL_1"], (), ()),
        (["0", "1"], (), ()),
        (["0", "1"], ("1", "0"), ("0", "1")),
        (["0", "1"], ("no", "yes"), ()),
        (["1", "0"], (), ("1", "0")),
        (["1", "3"], (), ("1", "3")),
        (None, (), ()),
    ],
)
def test_numbers_are_names_where_they_are_not_the_outputs_own(names, beside, found):
    assert told(names, beside) == found


@pytest.mark.parametrize(("trained", "asked"), [(("1", "0"), ("0", "1")), (("0", "1"), ("1", "0"))])
def test_labels_that_are_numbers_are_matched_by_name_too(trained, asked, roberta_checkpoint, tmp_path):
    model = adapter(roberta_checkpoint, tmp_path / "a", trained)
    again = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, id2label=dict(enumerate(asked)))
    lora.load_adapter(again, tmp_path / "a")
    assert again.classifier.out_proj.weight.equal(model.classifier.out_proj.weight[[1, 0]])


def test_squeezing_knows_labels_that_are_numbers_and_keeps_them(roberta_checkpoint, tmp_path):
    adapter(roberta_checkpoint, tmp_path / "a", ("1", "3"))
    loaded = Adapted.load(tmp_path / "a", str(roberta_checkpoint))
    assert loaded.names == ("1", "3")
    lora.save_adapter(loaded.model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "dylora.json").read_text())["labels"] == ["1", "3"]


@pytest.mark.parametrize("order", [("premise", "hypothesis"), ("hypothesis", "premise")])
def test_an_adapter_of_a_glue_pair_reads_its_own_columns_whatever_their_order(order, roberta_checkpoint, tmp_path):
    names = ("entailment", "neutral", "contradiction")
    adapter(roberta_checkpoint, tmp_path / "a", names, task="mnli")
    rows = [{order[0]: f"{order[0]} {i}", order[1]: f"{order[1]} {i}", "label": names[i % 3]} for i in range(6)]
    file = write(tmp_path / "v.jsonl", rows)
    flags = [
        "--apply_lora",
        "--lora_r",
        "2",
        "--lora_path",
        str(tmp_path / "a"),
        "--do_eval",
        "--validation_file",
        file,
    ]
    model, data, training = parts(roberta_checkpoint, tmp_path, *flags)
    assert load_data(data, model, training)[0].columns == ("premise", "hypothesis")


def test_another_adapters_tables_are_not_replaced(roberta_checkpoint, tmp_path):
    for name in ("a", "b"):
        adapter(roberta_checkpoint, tmp_path / name, ("no", "yes"))
    (tmp_path / "b" / "adapter_model.safetensors").write_bytes(b"another")

    def check(path, *flags):
        flags = ("--task_name", "rte", "--do_eval", "--output_dir", str(tmp_path / "b"), *flags)
        training = parts(roberta_checkpoint, tmp_path, *flags)[2]
        check_output_dir(training, {"--lora_path": str(tmp_path / path)})

    check("b")
    check("a", "--overwrite_output_dir")
    with pytest.raises(UsageError, match=r"holds another adapter than --lora_path .* would be replaced"):
        check("a")
    assert {"report.html", "rank_curve.*"} <= set(LEFT)


def test_what_decides_the_end_of_a_run_is_compared(roberta_checkpoint, tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": f"w{i}", "label": "ab"[i % 2]} for i in range(4)])

    def settings(*flags):
        model, data, training = parts(roberta_checkpoint, tmp_path, "--do_train", "--train_file", file, *flags)
        task, raw, _ = load_data(data, model, training)
        return settings_of(model, data, training, task, raw["train"])

    best = ["--load_best_model_at_end", "true", "--eval_strategy", "epoch", "--save_strategy", "epoch"]
    for flags in (best, ["--apply_lora"]):
        one, other = settings(), settings(*flags)
        assert {name for name in one if one[name] != other[name]} & {"load_best_model_at_end", "apply_lora"}


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [([], 0), (["--warmup_ratio", "0.1"], 0.1), (["--warmup_ratio", "0.1", "--warmup_steps", "0"], 0),
     (["--warmup_ratio", "0.1", "--warmup_steps", "3"], 3), (["--warmup_steps", "0.2"], 0.2)],
)  # fmt: skip
def test_the_users_warm_up_counts_before_a_recipes(flags, warmup, roberta_checkpoint, tmp_path):
    assert parts(roberta_checkpoint, tmp_path, "--task_name", "rte", *flags)[2].warmup_steps == warmup


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--global_batch_size", "32", "--gradient_accumulation_steps", "3"], "asks for 4; leave out one of them"),
        (["--text_columns", "text", "text"], "name columns of text, each once"),
        (["--text_columns", "label"], "name columns of text, each once"),
        (["--label_names", "foo"], "the labels are the column label here"),
        (["--accelerator_config", "foo.json"], "foo.json"),
        (["--dataset_dir", "glue"], "is not read beside t.csv"),
        (["--lora_r", "4"], "--lora_r is about an adapter; add --apply_lora"),
        (["--eval_ranks", "1,2"], "--eval_ranks is about an adapter; add --apply_lora"),
        (["--rank_sampling", "step"], "--rank_sampling is about an adapter; add --apply_lora"),
    ],
)
def test_flags_that_cannot_be_are_one_sentence(flags, sentence, roberta_checkpoint, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        parts(roberta_checkpoint, tmp_path, "--train_file", "t.csv", *flags)


def test_what_a_glue_task_says_itself_is_not_asked(roberta_checkpoint, tmp_path):
    with pytest.raises(UsageError, match="--regression is for your own files; rte has its own labels"):
        parts(roberta_checkpoint, tmp_path, "--task_name", "rte", "--regression", "true")


@pytest.mark.parametrize(
    ("flags", "asked"),
    [([], (True, True)), (["--do_eval", "false"], (True, False)), (["--do_eval=false"], (True, False)),
     (["--do_eval"], (False, True)), (["--do_train", "true", "--do_eval", "no"], (True, False))],
)  # fmt: skip
def test_measuring_is_left_out_where_it_is_turned_off(flags, asked, monkeypatch):
    seen = []
    monkeypatch.setattr("transformers_dylora.run_glue.main", lambda argv, program: seen.append(parse(argv)[2]))
    train(["--model_name_or_path", "m", "--output_dir", "o", "--task_name", "rte", *flags])
    assert (seen[0].do_train, seen[0].do_eval) == asked


@pytest.mark.parametrize("flag", ["--labels=-1,0,1", "--lora_path="])
def test_a_settings_file_repeats_values_that_begin_with_a_dash_or_are_empty(flag, tmp_path):
    argv = ["--model_name_or_path", "m", "--output_dir", "o", "--train_file", "t.csv", flag]
    store_config(tmp_path, given(argv, line_parser()))
    for one, other in zip(parse(argv), parse(expanded([str(tmp_path / "config.yaml")])), strict=True):
        assert one == other


def test_a_label_with_a_tab_would_break_the_predictions_lines(tmp_path):
    file = write(tmp_path / "t.jsonl", [{"text": f"w{i}", "label": "a\tb"} for i in range(4)])
    with pytest.raises(UsageError, match="give a name in one line, without tabs"):
        load_files({"train": file}, str(tmp_path / "cache"))
