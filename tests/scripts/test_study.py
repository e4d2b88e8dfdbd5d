"""The study's draws, its choice of a rate, and its commands from end to end on tiny data."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers_dylora.tasks import TASKS

import loralib as lora
from scripts.study import __main__ as study
from scripts.study import cells, running
from scripts.study import methods as study_methods
from scripts.study import tables as study_tables

from ..nlu.test_data import write


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), st.integers(1, 70), st.integers(0, 99))
def test_an_even_draw_gives_each_rank_its_share(weights, n, seed):
    ranks = study_methods.even_draw(weights, n, str(seed))
    assert len(ranks) == n and torch.equal(ranks, study_methods.even_draw(weights, n, str(seed)))
    for b, weight in enumerate(weights, 1):
        assert abs(int((ranks == b).sum()) - n * weight / sum(weights)) < 1 + 1e-9


def lines_of(method, *scores):
    """Held-out records of a method, ``scores`` by rate, the same for every task and seed."""
    return [
        {"method": method, "rate": rate, "task": task, "aurac": score, "split": "held_out", "seed": seed}
        for task, seed in cells.RATE_RUNS
        for rate, score in zip(cells.RATES, scores, strict=True)
    ]


def test_the_rate_is_the_best_over_tasks_and_one_for_the_sweep():
    _, middle, high = cells.RATES
    lines = lines_of("example", 1, 3, 2) + lines_of("lora-1", 5, 1, 0)
    assert cells.chosen_rates(lines) == {"example": middle}  # lora-8 is not there yet
    lines += lines_of("lora-8", 0, 1, 9)
    assert cells.chosen_rates(lines) == {"example": middle, **{f"lora-{r}": high for r in (1, 2, 4, 8)}}


def test_two_seeds_of_a_task_weigh_as_much_as_one_of_another():
    low, middle, _ = cells.RATES
    lines = lines_of("example", 0, 0, 0)
    for record in lines:
        if record["task"] == "cola":
            record["aurac"] = 10.0 if record["rate"] == low else 0.0
        if record["task"] == "rte":
            record["aurac"] = 11.0 if record["rate"] == middle else 0.0
    assert cells.chosen_rates(lines) == {"example": middle}


def test_the_sweep_is_one_method_and_differences_are_paired_by_seed():
    lines = []
    for seed, extra in ((0, 0.0), (1, 10.0)):
        for r in (1, 2, 4, 8):
            lines.append(
                {
                    "task": "rte",
                    "method": f"lora-{r}",
                    "seed": seed,
                    "split": "validation",
                    "scores": {str(r): 50 + extra + r},
                }
            )
        lines.append(
            {"task": "rte", "method": "example", "seed": seed, "split": "validation",
             "scores": {str(b): 51 + extra + b for b in range(1, 9)}}
        )  # fmt: skip
    lines.append({"task": "rte", "method": "lora-1", "seed": 2, "split": "validation", "scores": {"1": 0.0}})
    found = study_tables.scores(lines)
    assert set(found["rte", "sweep"]) == {0, 1}
    row = next(text for text in study_tables.average_table(found)[0].splitlines() if "per example" in text)
    assert "57.0 ± 5.0" in row and row.endswith("| 1.0 ± 0.0 / 1.0 ± 0.0 / 1.0 ± 0.0 / 1.0 ± 0.0 |")


def curve_lines(method, seed, curve, steps=100):
    return [
        {"task": task, "method": method, "seed": seed, "split": "validation", "steps": steps,
         "scores": {str(b): score for b, score in curve.items()}}
        for task in ("rte", "cola")
    ]  # fmt: skip


@pytest.mark.parametrize(("gain", "reached"), [((0.0, 2.0), "yes"), ((-3.0, -3.1), "no")])
def test_the_aim_is_reached_or_not(gain, reached):
    lines = []
    for seed in (0, 1):
        for r in (1, 2, 4, 8):
            lines += curve_lines(f"lora-{r}", seed, {r: 50.0 + r})
        lines += curve_lines(study_methods.DEFAULT, seed, {b: 50.0 + b + gain[seed] for b in range(1, 9)}, steps=111)
        lines += curve_lines("example", seed, dict.fromkeys(range(1, 9), 51.0))
    rows = "\n".join(study_tables.target(study_tables.scores(lines), lines)).splitlines()
    at = {row.split(" |")[0].removeprefix("| "): row for row in rows if row.startswith("| ")}
    assert all(at[f"rank {b}"].endswith(f"| {reached} |") for b in (1, 2, 4, 8))
    assert at["mean of the ranks"].endswith(f"| {reached} |")
    assert at["AURAC, beside: DyLoRA, per example"].endswith("| yes |")
    assert "1.11" in at["optimizer steps / one LoRA run's"] and at["optimizer steps / one LoRA run's"].endswith(
        "| no |"
    )


def test_the_reduction_by_svd_is_pefts_at_every_rank(roberta_checkpoint, tmp_path):
    from peft import PeftModel, convert_to_lora
    from transformers import AutoModelForSequenceClassification

    stock = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    model = lora.inject(stock, ["query", "value"], r=8, lora_alpha=16)
    lora.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    found = running.svd_components(model, str(roberta_checkpoint), str(tmp_path), TASKS["rte"])
    base = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert len(found) == 4
    for b in (1, 3, 8):
        config, state = convert_to_lora(adapted, rank=b)
        for path, (A, B) in found.items():
            key = f"base_model.model.{path}.lora_"
            wanted = config.lora_alpha / config.r * state[f"{key}B.weight"] @ state[f"{key}A.weight"]
            torch.testing.assert_close(B[:, :b] @ A[:b], wanted, rtol=1e-3, atol=1e-4)


@pytest.fixture
def tiny(tmp_path, monkeypatch, roberta_checkpoint):
    """Options of the commands, on rte and cola with a few examples each."""
    for task in ("rte", "cola"):
        write(tmp_path / "glue" / task, TASKS[task])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return ["--encoder", str(roberta_checkpoint), "--data", str(tmp_path / "glue"), "--results", str(tmp_path / "results"),
            "--processes", "1"]  # fmt: skip


@pytest.mark.slow
def test_rates_runs_tables_and_a_cell_again(tiny, tmp_path, capfd):
    few = ["--methods", "lora-1", "lora-8", "example"]
    study.main(["rates", *tiny, *few])
    study.main(["rates", *tiny, *few])
    assert "27 of 27 runs are there" in capfd.readouterr().out  # 3 methods x 3 rates x 3 tasks and seeds, none repeated
    study.main(["runs", *tiny, *few, "--tasks", "rte", "cola", "--seeds", "0"])
    lines = cells.read_records(tmp_path / "results" / "runs.jsonl")
    runs = {(r["task"], r["method"]): r for r in lines if r["split"] == "validation"}
    assert {method for _, method in runs} == {"lora-1", "lora-8", "example", *study_methods.CUTS}
    for task in ("rte", "cola"):
        whole = runs[task, "lora-8"]["scores"]["8"]
        assert all(runs[task, cut]["scores"]["8"] == whole for cut in study_methods.CUTS)  # at rank 8 nothing is cut
    capfd.readouterr()
    study.main(["cell", "rte", "example", "0", *tiny])
    again = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert again["scores"] == runs["rte", "example"]["scores"] and again["rate"] == runs["rte", "example"]["rate"]
    study.main(["cell", "cola", "cut-svd", "0", *tiny])
    (again,) = [json.loads(text) for text in capfd.readouterr().out.splitlines() if text.startswith('{"')]
    assert again["scores"] == runs["cola", "cut-svd"]["scores"]
    study.main(["tried", *tiny, "--methods", "ordered-gate", "ordered-distil"])
    study.main(["tables", "--results", str(tmp_path / "results")])
    text = (tmp_path / "results" / "README.md").read_text()
    assert "ordered, then fixed gate" in text and "ordered, then distilled" in text
    assert "DyLoRA, per example" in text and (tmp_path / "results" / "curves.png").stat().st_size > 10_000


def test_runs_without_a_chosen_rate_say_what_to_do(tiny, capsys):
    with pytest.raises(SystemExit):
        study.main(["runs", *tiny, "--methods", "example"])
    assert "run `python -m scripts.study rates` first" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["rte", "example"], ["boolq", "example", "0"], ["rte", "none", "0"]])
def test_a_cell_that_is_none_says_which_there_are(given, tiny, capsys):
    with pytest.raises(SystemExit):
        study.main(["cell", *given, *tiny])
    assert "a task (cola, rte" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", study_methods.TRIED)
def test_every_variant_trains(name, tiny, tmp_path, roberta_checkpoint):
    (found,) = running.run_cell(
        cells.Cell("rte", name, 0, 1e-3, "held_out"), str(roberta_checkpoint), str(tmp_path / "glue")
    )
    assert list(found["scores"]) == [str(b) for b in range(1, 9)] and found["steps"] > 0
