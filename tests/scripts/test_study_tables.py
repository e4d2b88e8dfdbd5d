"""What the study chooses and shows, from lines of runs."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralib.report.choice import aurac
from scripts.study import (
    averages,
    cells,
    choosing,
    headline,
    held_out,
    language_tables,
    naming,
    shown,
    wide,
)
from scripts.study import methods as study_methods
from scripts.study import tables as study_tables
from scripts.study.running import ROOT


def lines_of(method, scores):
    """Held-out records of a method, ``scores`` by rate, the same for every task and seed."""
    return [
        vars(cells.Cell(task, method, seed, rate, "held_out")) | {"scores": {"1": score}}
        for task, seed in cells.RATE_RUNS
        for rate, score in scores.items()
    ]


def searched(method, peak, most=99):
    """What the search for a method's rate finds, by rounds, where AURAC falls with the distance from ``peak``."""
    lines, rounds = [], 0
    while missing := cells.rate_cells([method], lines):
        lines += [vars(cell) | {"scores": {"1": -abs(math.log2(cell.rate / peak))}} for cell in missing]
        rounds += 1
        assert rounds < most
    return lines


@given(st.integers(-3, 5))
def test_a_grid_goes_on_until_its_best_is_inside(power):
    peak = 1e-3 * 2.0**power
    lines = searched("example", peak)
    rates = sorted({line["rate"] for line in lines})
    assert cells.chosen_rates(lines)["example"] == pytest.approx(peak)
    assert rates[0] < 0.9 * peak and rates[-1] > 1.1 * peak  # not at an edge
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(rates))


def test_no_rate_is_chosen_before_the_grid_is_closed():
    low, middle, high = cells.RATES
    assert not cells.chosen_rates(lines_of("example", {low: 1, middle: 2}))
    assert not cells.chosen_rates(lines_of("example", {low: 1, middle: 2, high: 3}))
    assert {cell.rate for cell in cells.rate_cells(["example"], lines_of("example", {low: 1, middle: 2, high: 3}))} == {
        2 * high
    }
    assert cells.chosen_rates(lines_of("example", {low: 1, middle: 3, high: 2})) == {"example": middle}


def test_the_sweep_takes_each_ranks_better_strength_at_its_own_rate():
    low, middle, high = cells.RATES
    lines = lines_of("lora-1", {low: 1, middle: 5, high: 2}) + lines_of("lora-8", {low: 1, middle: 2, high: 1})
    assert cells.chosen_strengths(lines) == {8: "lora-8"}  # rank 1's other strength is not measured yet
    lines += lines_of("lora-1-strength-2", {low: 1, middle: 3, high: 6, 2 * high: 1})
    assert cells.chosen_strengths(lines) == {1: "lora-1-strength-2", 8: "lora-8"}
    for score, name, rate in ((10.0, "lora-1", middle), (20.0, "lora-1-strength-2", high)):
        lines.append(
            {"task": "cola", "method": name, "seed": 0, "split": "validation", "rate": rate, "scores": {"1": score}}
        )
    lines += [
        {"task": "cola", "method": f"lora-{r}", "seed": 0, "split": "validation", "rate": 1e-3, "scores": {str(r): 1.0}}
        for r in (2, 4, 8)
    ]
    assert shown.scores_by_device(lines)["cpu"]["cola", "sweep"][0][1] == 20.0


def test_tables_show_runs_at_the_chosen_rate_once_there_are_three_seeds_and_until_then_at_the_one_of_most_runs():
    low, middle, high = cells.RATES

    def runs(method, rate, seeds, tasks=shown.AVERAGED):
        own = {"method": method, "split": "validation", "rate": rate, "scores": {"8": rate}}
        return [own | {"task": task, "seed": s} for s in seeds for task in tasks]

    def rates(lines):
        return {(r["method"], r["rate"]) for r in shown.at_their_rates(lines)}

    lines = runs("lora-8", middle, range(4)) + runs("cut-svd", middle, range(4)) + runs("step", low, (0, 1))
    lines += runs("lora-8", high, (0,)) + runs("cut-svd", high, (0,)) + runs("step", middle, (0,))
    until_then = {("lora-8", middle), ("cut-svd", middle), ("step", low)}
    assert rates(lines) == until_then and shown.not_yet_run(lines) == []
    lines += lines_of("lora-8", {middle: 1, high: 2, 2 * high: 1, low: 0})
    assert rates(lines) == until_then
    assert shown.not_yet_run(lines) == [
        "Not yet at its own best rate or strength: LoRA r=8, strength 2 at rate 0.002 (runs so far: 5 cpu). A choice "
        "counts from 15 runs on one device on, three seeds of every task.", ""
    ]  # fmt: skip
    lines += runs("lora-8", high, (1,)) + runs("cut-svd", high, (1,))
    assert rates(lines) == until_then
    lines += runs("lora-8", high, (2,)) + runs("cut-svd", high, (2,))
    assert rates(lines) == {("lora-8", high), ("cut-svd", high), ("step", low)}
    assert shown.not_yet_run(lines) == []


@pytest.mark.parametrize(("seeds", "name"), [(2, "lora-1"), (3, "lora-1-strength-2")])
def test_the_sweep_takes_the_chosen_strength_once_there_are_three_seeds_of_it(seeds, name):
    low, middle, high = cells.RATES
    lines = lines_of("lora-1", {low: 1, middle: 2, high: 1}) + lines_of(
        "lora-1-strength-2", {low: 1, middle: 3, high: 1}
    )
    for method, n in (("lora-1", 3), ("lora-1-strength-2", seeds)):
        for seed in range(n):
            lines += curve_lines(method, seed, {1: 50.0})
    assert shown.sweep_methods(lines)[1] == name


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
                    "rate": 1e-3,
                    "scores": {str(r): 50 + extra + r},
                }
            )
        lines.append(
            {"task": "rte", "method": "example", "seed": seed, "split": "validation", "rate": 1e-3,
             "scores": {str(b): 51 + extra + b for b in range(1, 9)}}
        )  # fmt: skip
    lines.append(
        {"task": "rte", "method": "lora-1", "seed": 2, "split": "validation", "rate": 1e-3, "scores": {"1": 0.0}}
    )
    founds = shown.scores_by_device(lines)
    assert set(founds["cpu"]["rte", "sweep"]) == {0, 1}
    row = next(
        text for text in "\n".join(study_tables.task_tables(founds, "rte", lines)).splitlines() if "per example" in text
    )
    assert "57.0 ± 5.0" in row and row.endswith("| 0-1 | 0.001 |")


def test_rows_of_a_task_are_over_the_seeds_that_the_peer_has():
    found = {
        ("rte", "sweep"): {0: {1: 50.0}},
        ("rte", "step"): {0: {1: 60.0}, 3: {1: 0.0}},
        ("rte", "mixed"): {3: {1: 9.0}},
    }
    assert averages.beside(found, "sweep", "step", "rte") == {0: {1: 60.0}}
    assert averages.beside(found, "sweep", "mixed", "rte") == {3: {1: 9.0}}  # alone, and its row says which
    assert averages.beside(found, "sweep", "example", "rte") == {}


def test_few_seeds_of_the_sweep_on_another_device_hide_none_of_the_others_there():
    gpu = {"device": "some GPU"}

    def run(method, seed, score, ranks=(1, 2, 4, 8), **more):
        return [line | more for line in curve_lines(method, seed, dict.fromkeys(ranks, score))]

    lines = [line for seed in (0, 1) for b in (1, 2, 4, 8) for line in run(f"lora-{b}", seed, 50.0, (b,))]
    lines += [line for seed in (0, 1) for line in run(study_methods.DEFAULT, seed, 50.0)]
    lines += [line for b in (1, 2, 4, 8) for line in run(f"lora-{b}", 0, 50.0, (b,), **gpu)]
    for seed in (0, 1, 2):
        lines += run("cut-svd", seed, 60.0, **gpu) + run(study_methods.DEFAULT, seed, 60.0 + seed, **gpu)
    text = "\n".join(study_tables.task_tables(shown.scores_by_device(lines), "cola", lines))
    first, second = text.split("on: some GPU")
    assert "(our default) | 50.0 ± 0.0 |" in first and "(our default) | 61.0 ± 0.6 |" in second
    assert [row.split(" | ")[-2] for row in second.splitlines() if row.startswith("| ")][2:] == ["0", "0-2", "0-2"]


def test_seeds_are_written_as_spans():
    assert [naming.spans(seeds) for seeds in ([], [3], [0, 1, 2], [4, 0, 1], [1, 3])] == [
        "", "3", "0-2", "0-1, 4", "1, 3"
    ]  # fmt: skip


def curve_lines(method, seed, curve):
    return [
        {
            "task": task,
            "method": method,
            "seed": seed,
            "split": "validation",
            "rate": 1e-3,
            "scores": {str(b): v for b, v in curve.items()},
        }
        for task in shown.AVERAGED
    ]


@pytest.mark.parametrize(("gain", "excluded"), [((0.0, 0.04), True), ((-3.0, -3.4), False), ((-4.0, 4.0), False)])
def test_the_headline_is_the_paired_difference_with_its_interval(gain, excluded):
    from scipy import stats

    lines = []
    for seed in (0, 1):
        for r in (1, 2, 4, 8):
            lines += curve_lines(f"lora-{r}", seed, {r: 50.0 + r + 10 * seed})  # seeds differ, their differences do not
        own = {b: 50.0 + b + 10 * seed + gain[seed] for b in range(1, 9)}
        lines += curve_lines(study_methods.DEFAULT, seed, own)
    rows = "\n".join(headline.headline(shown.scores_by_device(lines), lines)).splitlines()
    at = {row.split(" |")[0].removeprefix("| "): row for row in rows if row.startswith("| ")}
    low, high = stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    wanted = f"{sum(gain) / 2:+.2f} ± {(high - low) / 2:.2f}"
    for name in ("rank 1", "rank 2", "rank 4", "rank 8", "mean of the ranks", "mean, without CoLA"):
        assert at[name].endswith(f"| {wanted} ✓ |" if excluded else f"| {wanted} |")
    # Beside the reduction by SVD, over the seeds that both have.
    for seed in (0, 1, 2):
        lines += curve_lines("cut-svd", seed, {b: 49.0 + b + 10 * seed for b in range(1, 9)})
    lines += curve_lines(study_methods.DEFAULT, 2, {b: 71.0 + b for b in range(1, 9)})
    text = "\n".join(headline.headline(shown.scores_by_device(lines), lines))
    three = stats.ttest_1samp([1 + gain[0], 1 + gain[1], 2.0], 0).confidence_interval(0.95)
    assert "chosen rate and strength (2 seeds, cpu)" in text and "by SVD (3 seeds, cpu)" in text
    assert text.count(f"| {(three.low + three.high) / 2:+.2f} ± {(three.high - three.low) / 2:.2f}") == 6


def test_the_sweep_at_the_rate_of_the_default_stands_beside_that_at_its_own(monkeypatch):
    monkeypatch.setattr(shown, "run_enough", lambda *_: True)  # however few, the chosen runs are shown
    lines, ranks = [], (1, 2, 4, 8)
    for seed in (0, 1):
        lines += curve_lines(study_methods.DEFAULT, seed, dict.fromkeys(ranks, 50.0 + seed))
        for r in ranks:
            lines += curve_lines(f"lora-{r}", seed, {r: 51.0})
            lines += [
                line | {"rate": 2e-3, "scores": {str(r): 10.0}} for line in curve_lines(f"lora-{r}", seed, {r: 0})
            ]
    told = "\n".join(headline.headline(shown.scores_by_device(lines), lines))
    assert "alpha 16" not in told and "failed" not in told  # nothing is chosen: the tables show just that
    lines += searched("lora-1", 2e-3)
    founds = shown.scores_by_device(lines)
    told = "\n".join(headline.headline(founds, lines))
    assert "DyLoRA's rate, alpha 16 (2 seeds, cpu)" in told
    (row,) = [row for row in told.splitlines() if row.startswith("| rank 1 ")]
    assert row.split("|")[2].startswith(" +40.50 ±") and row.split("|")[3].startswith(" -0.50 ±")
    assert "CoLA, rank 1, seed 0 (10.0, at DyLoRA's rate 51.0); CoLA, rank 1, seed 1 (10.0, " in told
    assert "QQP, rank 1" in told and "rank 2, seed" not in told and "the seeds 0-1 were run" in told
    (row,) = [row for row in told.splitlines() if row.startswith("| mean of the ranks, failed LoRAs replaced ")]
    assert row.split("|")[2].startswith(" -0.50 ±") and row.endswith("|  |")  # its runs there are the plain ones
    (row,) = [row for row in averages.average_tables(founds["cpu"], lines, "sweep")[0].splitlines() if "plain" in row]
    assert "| 4 | 16, 8, 4, 2 | 0.001 | 51.0 | 51.0 | 51.0 | 51.0 | 51.0 |" in row


def test_the_headline_says_in_which_precision_the_compared_runs_were():
    lines = [line for seed in (0, 1) for r in (1, 2, 4, 8) for line in curve_lines(f"lora-{r}", seed, {r: 50.0})]
    ours = [
        line for seed in (0, 1, 2) for line in curve_lines(study_methods.DEFAULT, seed, dict.fromkeys((1, 2, 4, 8), 51))
    ]

    def told():
        records = lines + ours
        return "\n".join(headline.headline(shown.scores_by_device(records), records))

    assert "precision" not in told()
    ours[0]["precision"], ours[-1]["precision"] = "fp32", "bf16"  # the last is of a seed that the sweep has not
    assert (
        "of the sweep's 40 runs 40 of a precision that was not recorded; of DyLoRA's 10 runs 1 fp32 and 9 of a "
        in told()
    )


def test_leads_are_paired_differences_from_the_reduction_by_svd():
    def line(method, run, score, **others):
        task, seed = cells.LEAD_RUNS[run]
        own = {"task": task, "seed": seed, "method": method, "split": "held_out", "rate": cells.TRIED_RATE}
        return own | {"scores": dict.fromkeys("1248", score)} | others

    lines = [line("cut-svd", 0, 50.0), line("cut-svd", 1, 70.0), line("mixed-0.8", 0, 51.0), line("mixed-0.8", 1, 74.0)]
    lines += [line("mixed-0.8", 2, 99.0)]  # without its peer
    lines += [line("mixed-0.8", 0, 0.0, split="validation"), line("halves-0.8", 0, 9.0), line("lora-8", 0, 9.0)]
    (row,) = [text for text in "\n".join(held_out.lead_table(lines)).splitlines() if "+" in text or "-0" in text]
    assert "(our default)" in row and row.count("+2.50 ± 1.50") == 4 and row.endswith("| 2 |")
    assert held_out.lead_table(lines[:1]) == []
    # A run in another precision is beside the reduction in that precision.
    again = {"precision": "fp32"}
    lines += [line("cut-svd", run, 60.0, **again) for run in (0, 1)]
    lines += [line("thirds-0.8", run, 61.0, **again) for run in (0, 1)]
    rows = "\n".join(held_out.lead_table(lines)).splitlines()
    assert row in rows and any("thirds of the" in text and text.count("+1.00 ± 0.00") == 4 for text in rows)


def test_averages_are_over_methods_that_every_task_has():
    lines = curve_lines("example", 0, dict.fromkeys((1, 2, 4, 8), 40.0))
    lines.append(lines[0] | {"task": "rte", "scores": dict.fromkeys("1248", 90.0)})
    found = shown.scores_by_device(lines + curve_lines("step", 0, dict.fromkeys((1, 2, 4, 8), 1.0))[1:])["cpu"]
    assert averages.averaged(found, "example") == {0: dict.fromkeys((1, 2, 4, 8), 40.0)}  # RTE does not count
    assert averages.averaged(found, "step") == {}


def test_main_tables_hold_the_usual_runs_alone(tmp_path):
    cell = cells.Cell("cola", "lora-8", 0, 1e-3)
    others = [
        cells.Cell("cola", "lora-8", 0, 1e-3, r_max=64),
        cells.Cell("cola", "lora-8", 0, 1e-3, targets=cells.ALL_LINEAR),
        cells.Cell("webnlg", "lora-8", 0, 1e-3),
    ]
    file = tmp_path / "runs.jsonl"
    old = {name: value for name, value in vars(cell).items() if name not in ("r_max", "targets")}
    file.write_text("".join(json.dumps(line) + "\n" for line in [old, *map(vars, others)]))
    records = cells.read_records(file)
    assert cells.usual_records(records) == [vars(cell)]
    assert all(each.done(records) for each in (cell, *others))
    assert not cells.Cell("cola", "lora-8", 0, 1e-3, r_max=16).done(records)


def test_first_tries_stand_where_choices_are_told(tmp_path):
    scores = dict.fromkeys("1248", 40.0)
    tried = vars(cells.Cell("cola", "lora-8", 0, 1e-3, "held_out")) | {"scores": scores}
    study_tables.write_tables(tmp_path, [tried | {"scores": {"8": 27.2}}, tried | {"method": "example"}])
    rows = [line for line in (tmp_path / "choosing.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[-2:] == ["| LoRA r=8, strength 2 | 27.2 |  |", "| DyLoRA, per example | 40.0 |  |"]


def test_wide_tables_pair_the_default_with_the_sweep_and_svd():
    def line(method, seed, scores, **apart):
        own = vars(cells.Cell("sst2", method, seed, 1e-3)) | {"evaluation_seconds": 2.0 if "lora" in method else 9.0}
        return own | {"scores": {str(b): v for b, v in scores.items()}, "metric": "accuracy"} | apart

    ranks = study_methods.shown_up_to(16)
    lines = [line(f"lora-{b}", 0, {b: 80.0 + b}) for b in (1, 2, 4, 8)]
    lines += [line("lora-8", 0, {16: 96.0}, r_max=16), line("cut-svd", 0, dict.fromkeys(ranks, 70.0), r_max=16)]
    lines += [line(study_methods.DEFAULT, 0, {b: 81.5 + b for b in ranks}, r_max=16)]
    text = "\n".join(wide.rank_tables(lines))
    assert "| the default minus the sweep | +1.5 | +1.5 | +1.5 | +1.5 | +1.5 |" in text
    assert "| +12.5 | +13.5 | +15.5 | +19.5 | +27.5 |" in text and "Measuring 5 ranks took 4.5 times" in text
    assert "LoRA r=16, reduced by SVD" in text and "r_max 64" not in text
    assert not wide.target_tables(lines) + language_tables.held_out_tables(lines)
    assert not language_tables.validation_tables(lines)
    assert "none was searched" in text
    # At rates of their own: the search's runs choose them, and the runs at those are shown.
    for rate, score in ((5e-4, 30.0), (1e-3, 20.0), (2.5e-4, 25.0), (2e-3, 10.0)):
        searched = [cells.Cell(task, "lora-8", seed, rate, "held_out", 16) for task, seed in cells.RATE_RUNS]
        lines += [vars(cell) | {"scores": {"16": score}} for cell in searched]
    assert cells.wide_cells(lines)[0].rate == 5e-4 and cells.wide_cells(lines)[1].rate == 1e-3
    assert not cells.rate_cells(["lora-8"], lines, r_max=16) and cells.rate_cells(["lora-8"], lines)
    lines += [line("lora-8", 0, {16: 97.0}, r_max=16, rate=5e-4)]
    text = "\n".join(wide.rank_tables(lines))
    assert "at r_max 16 LoRA r=16, strength 2: 0.0005." in text and "| 97.0 |" in text and "| 96.0 |" not in text
    assert "| LoRA r=16, strength 2 | 25.0, 25.0 / 25.0, 25.0 | 30.0" in "\n".join(held_out.wide_rate_tables(lines))
    lines = [
        line(name, seed, scores, targets=cells.ALL_LINEAR)
        for seed, more in ((0, 0.0), (1, 2.0))
        for name, scores in (
            *((f"lora-{b}", {b: 80.0 + more}) for b in (1, 2, 4, 8)),
            ("cut-svd", dict.fromkeys((1, 2, 4, 8), 79.0)),
            (study_methods.DEFAULT, dict.fromkeys((1, 2, 4, 8), 81.0 + 2 * more)),
        )
    ]
    text = "\n".join(wide.target_tables(lines))
    assert text.count("+2.0 ± 1.0") == 4 and text.count("+4.0 ± 2.0") == 4 and "2 seeds" in text


def test_a_language_models_best_rate_has_the_lowest_loss():
    def run(method, rate, loss, split="held_out"):
        ranks = [method[5:6]] if method.startswith("lora") else "1248"
        cell = cells.Cell("webnlg", method, 0, rate, split, targets=cells.ALL_LINEAR)
        return vars(cell) | {"metric": "loss", "scores": dict.fromkeys(ranks, loss)}

    lines = [run("lora-8", rate, loss) for rate, loss in ((5e-4, 1.2), (1e-3, 1.0), (2e-3, 1.1))]
    lines += [run("lora-1", rate, loss) for rate, loss in ((1e-3, 1.3), (2e-3, 1.2))]
    lines += [run("lora-1-strength-2", 1e-3, 1.35)]
    assert cells.chosen_rates(lines, cells.LANGUAGE_RATE_RUNS) == {"lora-8": 1e-3}
    text = "\n".join(language_tables.held_out_tables(lines))
    assert "| 1.2000 | 1.0000 | 1.1000 | 0.001 |" in text and "the default minus" not in text
    assert "|  | 1.3000 | 1.2000 | 0.002 (open: 0.0005) |" in text and "left: above strength 16/r at each" in text
    assert not language_tables.validation_tables(lines)
    lines += [run(study_methods.DEFAULT, rate, loss) for rate, loss in ((5e-4, 2.0), (1e-3, 1.5))]
    lines += [run("paces-sqrt", 1e-3, 1.25), run("paces-sqrt", 5e-4, 1.75)]
    text = "\n".join(language_tables.held_out_tables(lines))  # each at its own rate
    for rate, loss in (("0.001", "1.2500"), ("0.0005", "1.7500")):
        assert f"4/sqrt(k) times as fast once ordered | {rate} | {loss} | {loss} |" in text
    assert "| the default minus the sweep | +0.3000 |  |  | +0.5000 |" in text
    lines += [run(study_methods.DEFAULT, 1e-3, 1.6, "validation"), run("lora-1", 2e-3, 1.5, "validation")]
    text = "\n".join(language_tables.validation_tables(lines))
    assert (
        "200 entries of validation, seed 0, mean" in text
        and "| the default minus the sweep | +0.1000 |  |  |  |" in text
    )
    # What else ran, at its own rate.
    lines += [run("halving", 2e-3, 1.1)] + [run("halving", rate, 1.7, "validation") for rate in (1e-3, 2e-3)]
    lines[-1]["scores"] = dict.fromkeys("1248", 1.7777)
    text = "\n".join(language_tables.validation_tables(lines))
    assert "| DyLoRA, halving | 1.7777 | 1.7777 |" in text and "1.7000" not in text
    assert "not so DyLoRA, halving at 0.002, the only rate tried." in text
    lines += [run("halving", 1e-3, 1.2)]
    assert "the only rate tried" not in "\n".join(language_tables.validation_tables(lines))


def test_a_grid_is_closed_once_the_best_has_both_neighbours():
    assert cells.next_rates({5e-4: 1.0, 2e-3: 3.0, 4e-3: 4.0, 8e-3: 2.0}) == []
    assert cells.next_rates({5e-4: 1.0, 2e-3: 5.0, 4e-3: 4.0, 8e-3: 2.0}) == [1e-3]


def test_a_score_counts_at_its_rank_in_whatever_order_ranks_come():
    assert cells.area({"8": 40.0, "1": 10.0, "2": 20.0, "4": 30.0}) == cells.area({1: 10.0, 2: 20.0, 4: 30.0, 8: 40.0})
    assert cells.area({8: 9.0, 1: 2.0}) == 5.5
    with pytest.raises(ValueError, match="rising"):
        aurac([8, 1], [9.0, 2.0])


def test_differences_task_by_task_are_paired_by_seed():
    found = {
        (task, method): {seed: dict.fromkeys((1, 2, 4, 8), value + 10.0 * seed) for seed in seeds}
        for task, ours in (("cola", 3.0), ("sst2", 1.0))
        for method, value, seeds in ((study_methods.DEFAULT, ours, (0, 1)), ("cut-svd", 0.0, (0, 1, 2)))
    }
    rows = averages.task_by_task(found, "cpu", "cut-svd")[0].splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["+3.0 ± 0.0", "+1.0 ± 0.0"]


def test_the_default_stands_beside_every_peer_on_the_device_with_the_most_pairs():
    ranks = (1, 2, 4, 8)
    lines = [
        line | {"scores": {str(b): 50.0 + (line["task"] == "cola") * 5 + seed for b in ranks}}
        for seed in (0, 1, 2)
        for line in curve_lines(study_methods.DEFAULT, seed, {1: 0})
    ]
    lines += [line for seed in (0, 1) for line in curve_lines("cut-svd", seed, dict.fromkeys(ranks, 49.0 + seed))]
    lines += [line | {"device": "some GPU"} for line in lines]
    lines += [line | {"device": "some GPU"} for line in curve_lines("cut-svd", 2, dict.fromkeys(ranks, 51.0))]
    (row,) = averages.beside_each(shown.scores_by_device(lines))[0].splitlines()[2:]
    apart = "+2.0 ± 0.0 | " * 5  # a point, and five more on one of five tasks
    assert row == f"| LoRA r=8, reduced by SVD | 1 | {apart}+1.0 ± 0.0 | 3 | some GPU |"


def test_of_a_cell_that_ran_again_on_one_device_the_first_line_counts():
    ranks = (1, 2, 4, 8)
    lines = [line for seed in (0, 1) for b in ranks for line in curve_lines(f"lora-{b}", seed, {b: 50.0})]
    lines += [line for seed in (0, 1) for line in curve_lines(study_methods.DEFAULT, seed, dict.fromkeys(ranks, 51.0))]
    lines[0]["precision"] = "fp32"
    again = [line | {"precision": "bf16", "scores": {"8": 0.0}} for line in curve_lines("lora-8", 0, {8: 0.0})]
    text = "\n".join(headline.headline(shown.scores_by_device(lines + again), lines + again))
    assert text.count("+1.00 ± 0.00 ✓") == 6 and "of the sweep's 40 runs 1 fp32 and 39 of" in text


def test_rates_of_the_sweep_are_told_by_rank(monkeypatch):
    monkeypatch.setattr(shown, "run_enough", lambda *_: True)
    lines = [line | {"rate": 1e-3 * r} for r in (1, 2, 4, 8) for line in curve_lines(f"lora-{r}", 0, {r: 50.0})]
    (row,) = averages.average_tables(shown.scores_by_device(lines)["cpu"], lines, "sweep")[0].splitlines()[2:]
    assert row.startswith("| a LoRA for each rank (the sweep) | 4 | 16, 8, 4, 2 | 0.001, 0.002, 0.004, 0.008 | 50.0 |")


def test_pairs_are_of_one_device_that_with_the_most_seeds():
    def run(method, seed, score, **device):
        ranks = [method[-1]] if method.startswith("lora") else list("1248")
        return [line | device | {"scores": dict.fromkeys(ranks, score)} for line in curve_lines(method, seed, {1: 0.0})]

    gpu = {"device": "some GPU"}
    lines = [line for seed in (0, 1) for b in (1, 2, 4, 8) for line in run(f"lora-{b}", seed, 50.0 + seed)]
    lines += [line for seed in (0, 1) for line in run(study_methods.DEFAULT, seed, 52.0 + seed)]
    lines += [line for seed in (0, 1, 2) for line in run(study_methods.DEFAULT, seed, 70.0 + seed, **gpu)]
    lines += [line for seed in (0, 1, 2) for line in run("cut-svd", seed, 69.0 + seed, **gpu)]
    founds = shown.scores_by_device(lines)
    assert list(founds) == ["cpu", "some GPU"]
    assert averages.with_most_seeds(founds, "sweep") == ["cpu"] and averages.with_most_seeds(founds, "cut-svd") == [
        "some GPU"
    ]
    text = "\n".join(headline.headline(founds, lines))
    assert text.count("| +2.00 ± 0.00 ✓ | +1.00 ± 0.00 ✓ |") == 6 and "(3 seeds, some GPU)" in text
    means, _, apart, _ = averages.average_tables(founds["some GPU"], lines, "cut-svd")
    assert "70.0 | 70.0 | 70.0 | 70.0 | 70.0 |" in means and "+1.0 ± 0.0 | 3 |" in apart


def test_each_cut_in_the_repository_is_of_the_training_whose_line_is_there():
    records = cells.read_records(ROOT / "results" / "study" / "runs.jsonl")
    place = [name for name in cells.Cell.__dataclass_fields__ if name != "method"]
    place += ["device", "precision"]
    records = [{"device": shown.PROCESSOR, "precision": None} | r for r in records]
    trained = {(r["method"], *(r[name] for name in place)): r for r in records}
    for r in records:
        if r["method"] in study_methods.CUTS:
            whole = trained[(study_methods.CUTS[r["method"]].of, *(r[name] for name in place))]
            fitted = study_methods.CUTS[r["method"]].by == "strengths"  # whose time counts too
            assert r["seconds"] > whole["seconds"] if fitted else r["seconds"] == whole["seconds"], r


def test_of_a_cell_on_two_devices_the_first_line_counts():
    low, middle, high = cells.RATES
    lines = lines_of("example", {low: 1, middle: 3, high: 2})
    again = [line | {"device": "some GPU", "scores": {"1": 9.0}} for line in lines if line["rate"] == high]
    assert cells.chosen_rates(lines + again) == {"example": middle}
    told = "\n".join(held_out.rate_table(lines)).splitlines()[-2:]
    assert f"{middle:g}: 3.0" in "".join(told)
    assert choosing.searched_on(lines + again) == "Of these runs 12 are on cpu, 4 are on some GPU."


def test_the_page_says_what_the_default_shares_and_what_lies_between(tmp_path):
    lines = curve_lines(study_methods.DEFAULT, 0, dict(zip(range(1, 9), range(50, 58), strict=True)))
    lines = [line | vars(cells.Cell("cola", "", 0, 0)) | line for line in lines]
    lines[0]["from"] = "lora-8"
    study_tables.write_tables(tmp_path, lines)
    text = " ".join((tmp_path / "tables.md").read_text().split())
    assert "shares 0.8 of the training with it: 1 of 5 on cpu." in text
    assert "5 runs of the default on validation were measured at all of 1 to 8, in the mean 50.0, 51.0, 52.0" in text
