"""The study's table of what fitted strengths add: after minus before, paired within a run."""

import pytest

from scripts.study import fitted
from scripts.study.shown import AVERAGED


def record(task, seed, added, split="validation", method="mixed-0.8-strengths", before=60.0):
    scores = {str(b): before + gain for b, gain in zip((1, 2, 4, 8), added, strict=True)}
    return {
        "task": task, "method": method, "seed": seed, "rate": 1e-3, "split": split, "scores": scores,
        "before": dict.fromkeys(scores, before),
    }  # fmt: skip


def test_a_row_is_the_mean_over_tasks_of_each_seed_and_its_interval_over_seeds():
    lines = [record(task, seed, (1 + seed, 0, 0, 0)) for task in AVERAGED for seed in (0, 2)]
    lines += [record("cola", 4, (50, 0, 0, 0))]  # a seed that one task has alone
    lines += [record("cola", 0, (90, 0, 0, 0))]  # a second line of a run
    (table,) = (line for line in fitted.fitted_tables(lines, []) if line.startswith("|"))
    head, _, first, without = table.splitlines()
    assert head.split("|")[3].strip() == "rank 1"
    # 1 and 3 on every task: mean 2, t(0.975, 1) = 12.706 times the standard error 1
    assert [cell.strip() for cell in first.split("|")[1:5]] == [
        "DyLoRA (our default)", "validation", "+2.00 ± 12.71", "+0.00 ± 0.00",
    ]  # fmt: skip
    assert "+0.50 ± 3.18" in first and "2 seeds" in first and "without CoLA" in without


def test_held_out_runs_and_a_language_model_stand_apart():
    lines = [record(task, 0, (gain, 0, 0, 4), "held_out", "cut-strengths") for task, gain in (("mnli", 1), ("qqp", 3))]
    lines += [record("cola", 0, (99, 0, 0, 0), "held_out", "cut-strengths")]  # rates were chosen there
    language = [record("webnlg", seed, (-0.01 * (1 + seed), 0, 0, 0), before=1.0) for seed in (0, 1)]
    text = "\n".join(fitted.fitted_tables(lines, language))
    assert "| LoRA r=8, reduced by SVD | held out | +2.00 ± 1.00 | +0.00 ± 0.00 |" in " ".join(text.split(" " * 2))
    assert "-0.0150 ± 0.0050" in text and "nats" in text
    assert not fitted.fitted_tables([], [])


@pytest.mark.parametrize(("steps", "told"), [((564, 1072), ", 6 to 11 percent of a training's"), ((), "")])
def test_the_cost_is_told_in_updates(steps, told):
    lines = [
        {"split": "validation", "method": "lora-8", "task": task, "steps": n}
        for task, n in zip(("qqp", "cola"), steps, strict=False)
    ]
    assert fitted.share(lines) == told
