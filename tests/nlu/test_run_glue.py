"""The real commands, end to end, on tiny data: main(argv) in this process, the recipes and launchers as a user types them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers_dylora.errors import UsageError
from transformers_dylora.output_dir import check_output_dir
from transformers_dylora.tasks import TASKS

import loralib as lora
from loralib.report.results import RankResults

from .test_data import rows, write

pytestmark = pytest.mark.slow


NLU = Path(__file__).parents[2] / "examples" / "NLU"
SCRIPT = NLU / "examples" / "text-classification" / "run_glue.py"


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """All nine tasks with a few examples each."""
    directory = tmp_path_factory.mktemp("glue")
    for task in TASKS.values():
        write(directory / task.name, task)
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def run_glue():
    """The script as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(checkpoint, glue, output, task="rte", *more):
    return [
        "--model_name_or_path", str(checkpoint), "--dataset_dir", str(glue), "--task_name", task, "--output_dir", str(output),
        "--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--do_train", "--do_eval", "--max_seq_length", "32",
        "--per_device_train_batch_size", "2", "--num_train_epochs", "1", "--apply_lora", "--lora_r", "3", "--save_strategy", "no",
        *more,
    ]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_every_task_trains_evaluates_and_predicts_at_every_rank(name, roberta_checkpoint, glue, tmp_path):
    task = TASKS[name]
    out = tmp_path / "out"
    found = run_glue().main(command(roberta_checkpoint, glue, out, name, "--do_predict"))
    assert found.metric == task.main_metric and found.max_rank == 3
    stored = json.loads((out / "rank_results.json").read_text())
    assert list(stored["splits"]) == list(task.splits("validation"))
    for split, table in stored["splits"].items():
        assert [row["rank"] for row in table] == [1, 2, 3] and {row["samples"] for row in table} == {6}
        assert [row["adapter_parameters"] for row in table] == [b * 2 * 2 * (16 + 16) for b in (1, 2, 3)]
        arrays = np.load(out / f"predictions_{split}.npz")
        assert arrays["logits"].shape == (6, 3, task.num_labels) and arrays["idx"].tolist() == list(range(6))
    prefixes = ["eval", "eval_mm"] if name == "mnli" else ["eval"]
    wanted = {f"{p}_r{b}_results.json" for p in prefixes for b in (1, 2, 3)} | {"rank_curve.png", "rank_results.md"}
    tests = {"mnli", "mnli-mm"} if name == "mnli" else {name}
    wanted |= {f"test_results_{t}_r{b}.txt" for t in tests for b in (1, 2, 3)}
    assert wanted <= {p.name for p in out.iterdir()}
    lines = (out / f"test_results_{name}_r2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(6)]
    shown = {line.split("\t")[1] for line in lines[1:]}
    assert all(re.fullmatch(r"-?\d+\.\d{3}", v) for v in shown) if task.regression else shown <= set(task.labels)
    with open(out / "rank_results.csv") as file:
        assert len(list(csv.DictReader(file))) == 3 * len(prefixes)
    assert not list(out.glob("**/model.safetensors"))
    assert {k.split(".")[2] for k in load_file(out / "adapter_model.safetensors") if "lora_" not in k} == {"classifier"}


def strong_adapter(checkpoint, glue, path, task="mnli"):
    """A run whose adapter is then made strong and different at every rank, so that ranks disagree."""
    run_glue().main(command(checkpoint, glue, path, task))
    from transformers import RobertaConfig
    from transformers_dylora.models.roberta import RobertaForSequenceClassification

    config = RobertaConfig.from_pretrained(
        checkpoint, num_labels=TASKS[task].num_labels, apply_lora=True, lora_r=3, lora_alpha=16
    )
    config.apply_lora, config.lora_r, config.lora_alpha, config.lora_scaling = True, 3, 16, "alpha/r"
    model = RobertaForSequenceClassification.from_pretrained(checkpoint, config=config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "classifier" in name:
            nn.init.normal_(parameter, std=2.0)
    lora.save_adapter(model, path)
    return model.eval()


def test_predictions_of_each_rank_are_that_ranks(roberta_checkpoint, glue, tmp_path):
    """Bug 1 of the released code: all files held the predictions of one rank. Bug 2: mismatched overwrote matched."""
    data = tmp_path / "glue" / "mnli"
    shutil.copytree(glue / "mnli", data)
    generator = np.random.default_rng(0)
    text = lambda: " ".join(f"w{i}" for i in generator.integers(0, 100, 9))  # noqa: E731
    for split in ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched"):
        label = (lambda i: -1) if "test" in split else (lambda i: i % 3)
        content = [{"premise": text(), "hypothesis": text(), "label": label(i), "idx": i} for i in range(40)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    model = strong_adapter(roberta_checkpoint, glue, tmp_path / "adapter")
    argv = command(
        roberta_checkpoint,
        tmp_path / "glue",
        tmp_path / "out",
        "mnli",
        "--do_predict",
        "--lora_path",
        str(tmp_path / "adapter"),
    )
    run_glue().main([a for a in argv if a != "--do_train"])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    seen = set()
    for name, split in (("mnli", "test_matched"), ("mnli-mm", "test_mismatched")):
        content = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        inputs = tokenizer(
            [r["premise"] for r in content], [r["hypothesis"] for r in content], padding=True, return_tensors="pt"
        )
        for b in (1, 2, 3):
            model.set_rank(b)
            with torch.no_grad():
                wanted = [TASKS["mnli"].labels[i] for i in model(**inputs).logits.argmax(-1)]
            lines = (tmp_path / "out" / f"test_results_{name}_r{b}.txt").read_text().splitlines()[1:]
            assert [line.split("\t")[1] for line in lines] == wanted
            seen.add(tuple(wanted))
    assert len(seen) == 6
    first, second = (
        np.load(tmp_path / "out" / f"predictions_validation_{m}matched.npz")["logits"] for m in ("", "mis")
    )
    assert not np.allclose(first, second)


def test_the_released_command_line_word_for_word(roberta_checkpoint, glue, tmp_path):
    """The MNLI recipe of the released code but for the model, the data, a step limit, and two processes for eight."""
    line = f"""-m torch.distributed.launch --nproc_per_node=2 {SCRIPT} --model_name_or_path {roberta_checkpoint} --task_name mnli
      --do_train --do_eval --max_seq_length 512 --per_device_train_batch_size 16 --learning_rate 5e-4 --num_train_epochs 30 --output_dir ./mnli/model
      --overwrite_output_dir --logging_steps 10 --logging_dir ./mnli/log --evaluation_strategy epoch --save_strategy epoch --warmup_ratio 0.06
      --apply_lora --lora_r 8 --lora_alpha 16 --seed 0 --weight_decay 0.1 --dataset_dir {glue} --max_steps 2"""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = RankResults.read(tmp_path / "mnli/model/rank_results.json")
    assert [row.samples for row in found.splits["validation_mismatched"]] == [6] * 8
    assert done.stdout.count("mnli, validation_matched") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_recipe(processes, roberta_checkpoint, glue, tmp_path):
    """bash roberta_base_mnli.sh with overrides, as one process and as two: the same global batch, one table."""
    overrides = [
        "--model_name_or_path", roberta_checkpoint, "--dataset_dir", glue, "--max_steps", "2", "--per_device_train_batch_size", "8",
        "--lora_r", "2", "--use_cpu", "true", "--disable_tqdm", "true",
    ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "NPROC": str(processes), "PYTHON": sys.executable, "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", NLU / "roberta_base_mnli.sh", *map(str, overrides)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    steps = 128 // (8 * processes)
    assert (
        done.stdout.count(f"global batch 128 = 8 per device x {processes} processes x {steps} accumulation steps") == 1
    )
    assert done.stdout.count("mnli, validation_mismatched") == 1
    found = RankResults.read(tmp_path / "mnli/model/rank_results.json")
    assert [row.samples for row in found.splits["validation_matched"]] == [6, 6]
    state = json.loads((tmp_path / "mnli/model/trainer_state.json").read_text())
    assert state["global_step"] == 2


RECIPES = sorted(p.name for p in NLU.glob("roberta_*.sh"))


def test_there_is_a_recipe_for_every_task():
    assert (
        sorted([*(f"roberta_base_{t}.sh" for t in TASKS), *(f"roberta_large_{t}.sh" for t in TASKS if t != "wnli")])
        == RECIPES
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_settings_parse(recipe, tmp_path):
    """The command that a recipe makes, caught by a stand-in for python, is one that run_glue understands."""
    from transformers_dylora.arguments import parse

    task = recipe.split("_")[-1][:-3]
    (tmp_path / "python").write_text('#!/bin/sh\nshift\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "mnli/model").mkdir(parents=True)
    (tmp_path / "mnli/model/adapter_config.json").write_text("{}")
    environment = os.environ | {"NPROC": "1", "PYTHON": str(tmp_path / "python")}
    done = subprocess.run(
        ["bash", NLU / recipe, "--seed", "7"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    argv = done.stdout.splitlines()
    starts = task in ("mrpc", "rte", "stsb")
    assert ("--lora_path" in argv) == starts
    model, data, training = parse([*argv, "--lora_path", "none"])
    assert (data.task_name, training.output_dir, training.seed) == (task, f"./{task}/model", 7)
    assert (model.apply_lora, model.lora_r, model.lora_alpha) == (True, 8, 16)
    assert training.global_batch_size == training.per_device_train_batch_size * training.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("processes", "more", "batch"),
    [
        (1, [], 16),
        (8, [], 16),
        (16, [], 8),
        (2, ["--global_batch_size", "32"], 16),
        (4, ["--global_batch_size=32"], 8),
        (4, ["--per_device_train_batch_size", "4"], 4),
    ],
)
def test_a_recipe_keeps_the_global_batch_on_any_number_of_gpus(processes, more, batch, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"NPROC": str(processes), "PYTHON": str(tmp_path / "python")}
    recipe = ["bash", NLU / "roberta_base_mnli.sh", *more]
    done = subprocess.run(recipe, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    argv = [part for argument in done.stdout.splitlines() for part in argument.split("=")]
    last = [
        int(argv[max(i for i, a in enumerate(argv) if a == flag) + 1])
        for flag in ("--per_device_train_batch_size", "--global_batch_size")
    ]
    assert last[0] == batch and last[1] == (32 if "32" in "".join(more) else 128)
    assert last[1] % (batch * processes) == 0
    assert ("--nproc_per_node" in argv) == (processes > 1)


def test_recipes_that_start_from_mnli_say_what_to_run(tmp_path):
    environment = os.environ | {"NPROC": "1", "PYTHON": "true"}
    done = subprocess.run(
        ["bash", NLU / "roberta_base_rte.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "roberta_base_mnli.sh" in done.stderr and "--lora_path none" in done.stderr
    assert (
        subprocess.run(
            ["bash", NLU / "roberta_base_rte.sh", "--lora_path", "none"], cwd=tmp_path, env=environment
        ).returncode
        == 0
    )


def test_starting_from_another_tasks_adapter_keeps_the_factors_and_a_fresh_head(
    roberta_checkpoint, glue, tmp_path, capsys
):
    model = strong_adapter(roberta_checkpoint, glue, tmp_path / "mnli")
    more = ["--lora_path", str(tmp_path / "mnli"), "--learning_rate", "0", "--full_rank_share", "0"]
    argv = command(roberta_checkpoint, glue, tmp_path / "rte", "rte", *more)
    run_glue().main(argv)
    assert capsys.readouterr().out.count("fresh, since the file has none of this shape: classifier") == 1
    tensors = load_file(tmp_path / "rte/adapter_model.safetensors")
    key = "roberta.encoder.layer.0.attention.self.query.lora_A"
    assert torch.equal(tensors[f"base_model.model.{key}.weight"], model.state_dict()[key])
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "measured")
    with pytest.raises(UsageError, match="number of labels"):
        run_glue().main([a for a in argv if a != "--do_train"])


def test_a_run_goes_on_where_it_was_interrupted(roberta_checkpoint, glue, tmp_path, capsys):
    options = ["--save_strategy", "steps", "--save_steps", "1", "--rank_sampling", "step"]
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "whole", "rte", *options))
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "part", "rte", *options))
    for name in ("checkpoint-3", "checkpoint-2", "adapter_model.safetensors", "rank_results.json"):
        target = tmp_path / "part" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    capsys.readouterr()
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "part", "rte", *options))
    assert "going on from" in capsys.readouterr().out
    whole, part = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("whole", "part"))
    assert all(torch.equal(whole[k], part[k]) for k in whole)


def test_a_training_of_no_epoch_is_called_what_it_is(roberta_checkpoint, glue, tmp_path):
    found = run_glue().main(command(roberta_checkpoint, glue, tmp_path, "rte", "--num_train_epochs", "0"))
    assert found.method == "DyLoRA, before its components were ordered"


def test_an_interrupted_recipe_goes_on_although_it_overwrites(roberta_checkpoint, glue, tmp_path, capsys):
    options = ["--save_strategy", "steps", "--save_steps", "1", "--overwrite_output_dir"]
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "out", "rte", *options))
    wanted = load_file(tmp_path / "out/adapter_model.safetensors")
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    capsys.readouterr()
    run_glue().main(
        command(roberta_checkpoint, glue, tmp_path / "out", "rte", *options, "--resume_from_checkpoint", "true")
    )
    assert "checkpoint-2" in capsys.readouterr().out
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("sampling", ["step", "matryoshka", "fixed"])
def test_the_other_samplings_and_settings(sampling, roberta_checkpoint, glue, tmp_path):
    more = ["--rank_sampling", sampling, "--lora_scaling", "alpha/sqrt(b)", "--eval_ranks", "1,3", "--bf16", "true"]
    found = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "out", "rte", *more))
    assert [row.rank for row in found.splits["validation"]] == [1, 3]
    assert (found.sampling, found.scaling) == (sampling, "alpha/sqrt(b)")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["use_rslora"]


def test_as_released_is_four_flags(roberta_checkpoint, glue, tmp_path):
    """... and the default is none of them."""
    four = ["--rank_sampling", "step", "--lora_frozen", "--full_rank_share", "0", "--lora_scaling", "alpha/b"]
    found = {
        name: run_glue().main(command(roberta_checkpoint, glue, tmp_path / name, "rte", *more))
        for name, more in {"one": ["--as_released"], "four": four, "default": []}.items()
    }
    told = ("sampling", "distribution", "frozen", "full_rank_share", "scaling")
    assert [getattr(found["one"], key) for key in told] == ["step", "uniform", True, 0.0, "alpha/b"]
    assert [getattr(found["default"], key) for key in told] == ["example", "mixed", False, 0.8, "alpha/r"]
    one, four, default = (load_file(tmp_path / name / "adapter_model.safetensors") for name in found)
    assert all(torch.equal(one[key], four[key]) for key in one)
    assert not all(torch.equal(one[key], default[key]) for key in one)


def test_the_papers_way_has_the_papers_strength_and_a_loaded_adapter_its_own(roberta_checkpoint, glue, tmp_path):
    options = ["--lora_scaling", "alpha/b"]  # ranks are then drawn from the first step on
    paper = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "paper", "rte", *options))
    assert paper.scaling == "alpha/b" and paper.method == "DyLoRA, a rank for each example"
    again = ["--lora_path", str(tmp_path / "paper")]
    argv = [a for a in command(roberta_checkpoint, glue, tmp_path / "again", "rte", *again) if a != "--do_train"]
    found = run_glue().main(argv)
    told = ("scaling", "method", "sampling", "distribution", "full_rank_share", "splits")
    assert found.scaling == "alpha/b" and all(getattr(found, key) == getattr(paper, key) for key in told)
    more = command(roberta_checkpoint, glue, tmp_path / "more", "rte", *again)
    assert run_glue().main(more).full_rank_share == 0  # components are ordered at one strength


def test_frozen_geometric_and_other_target_modules(roberta_checkpoint, glue, tmp_path):
    more = [
        "--lora_frozen",
        "--rank_distribution",
        "geometric",
        "--lora_r_min",
        "2",
        "--lora_target_modules",
        "key",
        "dense",
    ]
    found = run_glue().main(command(roberta_checkpoint, glue, tmp_path / "out", "rte", *more))
    assert found.frozen and found.r_min == 2
    assert set(json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"]) == {"classifier"}


def test_without_apply_lora_the_whole_model_trains(roberta_checkpoint, glue, tmp_path):
    argv = [
        a
        for a in command(roberta_checkpoint, glue, tmp_path / "out", "stsb")
        if a not in ("--apply_lora", "--lora_r", "3")
    ]
    found = run_glue().main(argv)
    assert found.method == "full fine-tuning" and len(found.splits["validation"]) == 1
    assert (tmp_path / "out/model.safetensors").exists()


def test_own_files(roberta_checkpoint, tmp_path):
    content = [{"text": r["sentence"], "label": ["no", "yes"][r["label"]]} for r in rows(TASKS["cola"])]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    argv = command(roberta_checkpoint, tmp_path, tmp_path / "out")
    start = argv.index("--dataset_dir")
    argv[start : start + 4] = [
        "--train_file",
        str(tmp_path / "train.jsonl"),
        "--validation_file",
        str(tmp_path / "valid.jsonl"),
    ]
    assert run_glue().main(argv).task == "custom"


def test_a_warmup_ratio_and_earlier_names_mean_what_they_did(roberta_checkpoint, glue, tmp_path):
    from transformers_dylora.arguments import parse

    _, _, steps = parse(
        [*command(roberta_checkpoint, glue, tmp_path), "--warmup_ratio", "0.06", "--warmup_steps", "30"]
    )
    assert steps.get_warmup_steps(100) == 30
    more = "--warmup_ratio 0.1 --evaluation_strategy steps --no_cuda --pad_to_max_length False --use_auth_token --max_val_samples 5 --group_by_length false"
    model, data, training = parse([*command(roberta_checkpoint, glue, tmp_path), *more.split()])
    assert training.get_warmup_steps(100) == 10 and training.eval_strategy == "steps"
    assert (model.use_auth_token, data.max_val_samples, data.pad_to_max_length, data.group_by_length) == (
        True,
        5,
        False,
        False,
    )


def test_own_test_file_alone_with_an_adapter(roberta_checkpoint, tmp_path):
    """The adapter knows its labels and their order."""
    content = [
        {"id": i, "text": r["sentence"], "label": ["yes", "no"][r["label"]]} for i, r in enumerate(rows(TASKS["cola"]))
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in content))
    argv = command(roberta_checkpoint, tmp_path, tmp_path / "out")
    start = argv.index("--dataset_dir")
    argv[start : start + 4] = ["--train_file", str(tmp_path / "train.jsonl")]
    run_glue().main([a for a in argv if a != "--do_eval"])
    argv[start : start + 2] = [
        "--test_file",
        str(tmp_path / "test.jsonl"),
        "--lora_path",
        str(tmp_path / "out"),
        "--do_predict",
    ]
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "predicted")
    run_glue().main([a for a in argv if a not in ("--do_eval", "--do_train")])
    lines = (tmp_path / "predicted" / "test_results_custom_r1.txt").read_text().splitlines()[1:]
    assert len(lines) == 6 and {line.split("\t")[1] for line in lines} <= {"yes", "no"}


def test_a_half_written_checkpoint_is_passed_over(roberta_checkpoint, glue, tmp_path, capsys):
    options = ["--save_strategy", "steps", "--save_steps", "1"]
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "out", "rte", *options))
    (tmp_path / "out/checkpoint-3/trainer_state.json").unlink()
    capsys.readouterr()
    run_glue().main(command(roberta_checkpoint, glue, tmp_path / "out", "rte", *options))
    assert "checkpoint-2" in capsys.readouterr().out


def test_overwriting_leaves_no_table_of_the_earlier_run(roberta_checkpoint, glue, tmp_path):
    argv = command(roberta_checkpoint, glue, tmp_path / "out", "rte", "--overwrite_output_dir")
    run_glue().main(argv)
    run_glue().main([*argv, "--lora_r", "2"])
    assert {p.name for p in (tmp_path / "out").glob("eval_r*")} == {"eval_r1_results.json", "eval_r2_results.json"}


def test_a_directory_with_other_files_is_not_overwritten_by_accident(roberta_checkpoint, glue, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "out" / "predictions_2023.npz").write_text("mine")
    argv = command(roberta_checkpoint, glue, tmp_path / "out")
    with pytest.raises(UsageError, match="--overwrite_output_dir"):
        run_glue().main(argv)
    run_glue().main([*argv, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "out" / "predictions_2023.npz").read_text() == "mine"


@pytest.mark.parametrize("inside", [".", "checkpoint-2"])
@pytest.mark.parametrize("flag", ["model_name_or_path", "tokenizer_name", "lora_path"])
def test_what_a_training_starts_from_is_not_overwritten(flag, inside, tmp_path):
    start = tmp_path / "out" / inside
    start.mkdir(parents=True)
    (start / "model.safetensors").write_text("weights")
    args = SimpleNamespace(output_dir=str(tmp_path / "out"), do_train=True, overwrite_output_dir=True)
    with pytest.raises(UsageError, match=f"would remove --{flag} {re.escape(str(start))}"):
        check_output_dir(args, {f"--{flag}": str(start), "--other": "roberta-base"})
    check_output_dir(args, {"--other": str(tmp_path), "--none": None})


@pytest.mark.parametrize("spelling", ["--do-eval", "--do_ev", "--do_eval"])
def test_the_short_command_does_not_train_where_told_to_evaluate(spelling, monkeypatch):
    seen = []
    monkeypatch.setattr("transformers_dylora.run_glue.main", lambda argv, program: seen.append(argv))
    from transformers_dylora.run_glue import train

    train([spelling, "--lora-path", "adapter", "--apply_lora", "--task_name", "rte"])
    assert "--do_train" not in seen[0] and seen[0].count("--apply_lora") == 1
    train(["--lora-path", "adapter", "--nonsense"])
    assert seen[1][:3] == ["--do_train", "--do_eval", "--apply_lora"]


def test_a_trained_adapter_is_needed_to_evaluate_alone(roberta_checkpoint, glue, tmp_path):
    with pytest.raises(UsageError, match="--lora_path"):
        run_glue().main([a for a in command(roberta_checkpoint, glue, tmp_path / "out") if a != "--do_train"])


def test_the_command_ends_with_a_sentence_and_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model_name_or_path", "x", "--output_dir", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 1
        and "run_glue.py: Give either --task_name" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_headless_checkpoint_is_not_evaluated(roberta_checkpoint, glue, tmp_path):
    left_out = ("--do_train", "--apply_lora", "--lora_r", "3")
    with pytest.raises(UsageError, match="no trained head"):
        run_glue().main([a for a in command(roberta_checkpoint, glue, tmp_path / "out") if a not in left_out])


def test_text_that_is_missing(roberta_checkpoint, tmp_path):
    content = rows(TASKS["rte"])
    content[2]["sentence2"] = None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in content))
    with pytest.raises(UsageError, match="None for sentence2 in example 2"):
        run_glue().main(command(roberta_checkpoint, tmp_path, tmp_path / "out"))


@pytest.mark.parametrize(("kind", "layers"), [("distilbert", 12), ("electra", 4), ("gpt2", 2)])
def test_any_encoder_trains_without_target_modules(kind, layers, roberta_checkpoint, glue, tmp_path, capsys):
    """DistilBERT is not in PEFT's table (all linear layers), ELECTRA has query and value, GPT-2 is in the table."""
    import transformers

    sizes = {
        "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "electra": {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 24},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    }[kind]  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=120, pad_token_id=0, **sizes)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(roberta_checkpoint).save_pretrained(tmp_path / "base")
    found = run_glue().main(command(tmp_path / "base", glue, tmp_path / "out"))
    assert found.max_rank == 3 and len(found.splits["validation"]) == 3
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("lora_A" in name for name in weights) == layers
    assert ("all linear layers" in capsys.readouterr().out) == (kind == "distilbert")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_that_the_processor_does_not_have_is_said(has_bf16, monkeypatch, tmp_path):
    from transformers_dylora import arguments

    monkeypatch.setattr(arguments, "cpu_multiplies_bf16", lambda: has_bf16)
    options = arguments.GlueTrainingArguments(str(tmp_path), bf16=True, no_cuda=True, report_to="none")
    assert any("no instructions for it" in note for note in options.notes) != has_bf16
