import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loralib.adapters.card import model_card
from loralib.report.curves import averages, curves
from loralib.report.plots import plot_curves
from loralib.report.results import RankResults
from loralib.report.scores import decide, score
from loralib.report.tables import print_table
from loralib.report.writing import write_report, write_run


def results(**changes):
    rows = [
        {"rank": b, "accuracy": None if math.isnan(a) else a, "loss": 0.5, "samples": 4, "adapter_parameters": 10 * b}
        for b, a in ((1, 0.5), (2, 0.75), (4, math.nan))
    ]
    return {
        "task": "rte", "method": "DyLoRA", "max_rank": 4, "metric": "accuracy", "command": "run", "splits": {"validation": rows},
        "aurac": {"validation": 0.6}, "selected_rank": {"rank": 2, "rule": "why", "split": "validation"},
    } | changes  # fmt: skip


def as_results(**changes):
    return RankResults.from_json(results(**changes))


def test_the_files(tmp_path):
    write_run(as_results(), tmp_path)
    stored = json.loads(
        (tmp_path / "rank_results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON")
    )
    assert stored["splits"]["validation"][2]["accuracy"] is None
    lines = (tmp_path / "rank_results.csv").read_text().splitlines()
    assert lines[0] == "split,rank,accuracy,loss,samples,adapter_parameters" and lines[1] == "validation,1,0.5,0.5,4,10"
    assert "| 2 | 75.00 | 0.5000 | 4 | 20 |" in (tmp_path / "rank_results.md").read_text()
    assert (tmp_path / "rank_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {
        "rank_results.json",
        "rank_results.csv",
        "rank_results.md",
        "rank_curve.png",
    }


def test_the_terminal_table_marks_the_selected_rank():
    console = Console(record=True, width=120, file=io.StringIO())
    print_table(as_results(), console)
    text = console.export_text()
    assert "→ 2" in text and "75.00" in text and "nan" in text


def test_a_report_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_run(as_results(), tmp_path)
    before = (tmp_path / "rank_curve.png").read_bytes()

    def broken(curves, path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("loralib.report.plots.plot_curves", broken)
    with pytest.raises(OSError, match="disk full"):
        write_run(as_results(), tmp_path)
    assert (tmp_path / "rank_curve.png").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_decisions_and_scores():
    assert decide(np.array([[[0.1, 0.9], [0.8, 0.2]]])).tolist() == [[1, 0]]
    assert decide(np.array([[[0.3], [2.5]]])).tolist() == [[0.3, 2.5]]
    assert score("combined_score", np.array([1, 1, 0]), np.array([1, 0, 0]), ("accuracy", "f1")) == pytest.approx(2 / 3)
    assert math.isnan(score("pearson", np.zeros(3), np.arange(3)))


HOSTILE = "a</script><!--<script> $x$ \n- injected: yes"


def test_text_from_outside_stays_text(tmp_path):
    results = as_results(task=HOSTILE, method="m $5 & $6")
    write_report([results], tmp_path)
    page = (tmp_path / "report.html").read_text()
    script = page[page.index('<script id="data"') :]
    data = script[script.index(">") + 1 : script.index("</script>")]
    assert "<" not in data and json.loads(data)[0]["task"] == HOSTILE
    assert (tmp_path / "rank_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_card_takes_no_lines_from_names():
    import yaml

    config = {"base_model_name_or_path": 'b"ase\nlicense: mine', "task_type": "SEQ_CLS", "lora_alpha": 1}
    facts = {"rank": 1, "r_max": 2, "scaling": "alpha/r", "task": HOSTILE, "labels": ["yes\n## no", "b"]}
    card = model_card(config, facts, None, 'di"r')
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == 'b"ase license: mine' and "license" not in head
    compile(card.split("```python")[1].split("```")[0], "card", "exec")
    assert "\n## no" not in card and "\n- injected" not in card


@pytest.mark.parametrize(
    ("facts", "said", "credited"),
    [
        ({"sampling": "example"}, ", from one DyLoRA training, whose adapter serves every rank from 1 to 4 (", True),
        ({"sampling": "fixed"}, "rank 2 for base, cut from an adapter of rank 4 (", False),
        ({}, "rank 2 for base, cut from an adapter of rank 4 (", False),  # PEFT's own
        ({"r_max": 2}, "rank 2 for base (", False),
        ({"squeezed": True}, ", made from a LoRA of rank 4, whose components", True),
    ],
)
def test_a_card_tells_of_a_training_what_is_known(facts, said, credited):
    facts = {"rank": 2, "r_max": 4, "scaling": "alpha/r"} | facts
    card = model_card({"base_model_name_or_path": "base", "lora_alpha": 8}, facts, None, "x")
    assert said in card and ("Method: DyLoRA" in card) == credited


@pytest.mark.parametrize("count", [1, 2, 4])
def test_there_is_a_panel_for_each_task_and_no_empty_one(count, tmp_path):
    runs = [as_results(task=f"task {i}") for i in range(count)]
    plot_curves(curves(runs), tmp_path / "c.svg")
    svg = (tmp_path / "c.svg").read_text()
    assert svg.count(">rank<") == count  # one axis label a panel
    assert svg.count('id="axes_') == count


def run_in(directory, seed, settings=None, **changes):
    directory.mkdir()
    if settings is not None:
        (directory / "run_settings.json").write_text(json.dumps({"seed": seed, "learning_rate": 1e-3} | settings))
    return dataclasses.replace(as_results(seed=seed, **changes), directory=str(directory))


def test_a_number_is_the_same_setting_however_it_is_written(tmp_path):
    runs = [run_in(tmp_path / str(seed), seed, {"lora_alpha": alpha}) for seed, alpha in ((0, 16), (1, 16.0))]
    (curve,) = curves(runs)
    assert curve.seeds == 2


@pytest.mark.parametrize("stored", ["[1, 2]", "7", "{"])
def test_stored_settings_that_are_none_separate_no_runs(stored, tmp_path):
    runs = [run_in(tmp_path / str(seed), seed) for seed in (0, 1)]
    for run in runs:
        (Path(run.directory) / "run_settings.json").write_text(stored)
    assert [curve.seeds for curve in curves(runs)] == [2]


def test_runs_that_differ_in_more_than_the_seed_are_no_seeds_of_one(tmp_path):
    alike = [run_in(tmp_path / str(seed), seed, {}) for seed in (0, 1)]
    assert [curve.seeds for curve in curves(alike)] == [2]
    other = run_in(tmp_path / "other", 2, {"learning_rate": 0.1})
    found = curves([*alike, other])
    assert [curve.seeds for curve in found] == [2, 1] and found[1].method.endswith("learning_rate 0.1")
    older = run_in(tmp_path / "older", 2, {"lora_paced": None, "rank_distribution": None})  # what the method tells
    newer = run_in(tmp_path / "newer", 3, {"lora_paced": False, "rank_distribution": "mixed"})
    assert [curve.seeds for curve in curves([*alike, older, newer])] == [4]
    again = run_in(tmp_path / "again", 0, {})
    found = curves([*alike, again])
    assert [curve.seeds for curve in found] == [2, 1] and found[1].method.endswith(f"run {tmp_path / 'again'}")


def test_seeds_of_a_metric_on_its_own_scale_are_on_one_scale(tmp_path):
    def run(seed, value):
        row = {"rank": 1, "mine": value, "loss": 0.5, "samples": 4, "adapter_parameters": 10}
        return run_in(tmp_path / str(seed), seed, metric="mine", splits={"validation": [row]})

    (curve,) = curves([run(0, 0.9), run(1, 1.1)])
    assert curve.means == pytest.approx((1.0,)) and curve.errors == pytest.approx((0.1,))


def test_runs_that_were_measured_on_other_examples_are_no_seeds_of_one(tmp_path):
    runs = [run_in(tmp_path / str(seed), seed, data={"validation": "4 examples, a"}) for seed in (0, 1)]
    assert [curve.seeds for curve in curves(runs)] == [2]
    other = run_in(tmp_path / "other", 2, data={"validation": "4 examples, b"})
    assert [curve.seeds for curve in curves([*runs, other])] == [2, 1]
    assert as_results(data={"validation": "4 examples, a"}).to_json()["data"] == {"validation": "4 examples, a"}
    with pytest.raises(ValueError, match="its data are no table"):
        as_results(data=[1])


def test_no_average_is_taken_of_losses_and_scores(tmp_path):
    row = {"rank": 1, "perplexity": 9.0, "loss": 2.2, "samples": 4, "adapter_parameters": 10}
    language = run_in(tmp_path / "a", 0, task="lm", metric="loss", splits={"validation": [row]})
    score = {"rank": 1, "accuracy": 0.5, "loss": 0.5, "samples": 4, "adapter_parameters": 10}
    classifiers = [run_in(tmp_path / task, 0, task=task, splits={"validation": [score]}) for task in ("rte", "cola")]
    (average,) = averages(curves(classifiers))
    assert average.means == pytest.approx((50.0,))
    assert averages(curves([*classifiers, language])) == []


def test_what_is_no_seed_of_one_training_stands_apart(tmp_path):
    unknown = [run_in(tmp_path / f"u{i}", None) for i in range(2)]
    assert [curve.seeds for curve in curves(unknown)] == [1, 1]
    elsewhere = [run_in(tmp_path / f"e{seed}", seed, adapter=f"hash {seed}") for seed in (0, 1)]
    assert [curve.seeds for curve in curves(elsewhere)] == [1, 1]  # of adapters whose trainings nothing tells of
    for run in elsewhere:
        (Path(run.directory) / "adapter_model.safetensors").touch()
    assert [curve.seeds for curve in curves(elsewhere)] == [2]
