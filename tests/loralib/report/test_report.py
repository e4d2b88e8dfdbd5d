import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from loralib.report import tables as report
from loralib.report.scores import decide, score


def results(**changes):
    rows = [
        {"rank": b, "accuracy": a, "loss": 0.5, "samples": 4, "adapter_parameters": 10 * b}
        for b, a in ((1, 0.5), (2, 0.75), (4, math.nan))
    ]
    return {
        "task": "rte", "method": "DyLoRA", "max_rank": 4, "metric": "accuracy", "command": "run", "splits": {"validation": rows},
        "aurac": {"validation": 0.6}, "selected_rank": {"rank": 2, "rule": "why", "split": "validation"},
    } | changes  # fmt: skip


def test_aurac_is_the_mean_height_of_the_curve():
    assert report.aurac([1, 2, 3], [0.2, 0.4, 0.6]) == pytest.approx(0.4)
    assert report.aurac([1, 2, 8], [0.0, 1.0, 1.0]) == pytest.approx((0.5 + 6) / 7)
    assert report.aurac([3], [0.7]) == 0.7


def test_selection_by_a_margin():
    choose = lambda scores, within: report.select_rank([1, 2, 4, 8], scores, within=within)["rank"]  # noqa: E731
    assert choose([0.5, 0.8, 0.81, 0.82], 0) == 8
    assert choose([0.5, 0.8, 0.81, 0.82], 1) == 4
    assert choose([0.5, 0.8, 0.81, 0.82], 2.0) == 2
    assert choose([0.5, 0.8, math.nan, 0.8], 0) == 2
    assert choose([math.nan] * 4, 1) == 8
    with pytest.raises(ValueError, match="within"):
        choose([0.5] * 4, -1)


def test_selection_within_one_standard_error_uses_the_paired_difference():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 2000)
    right = generator.random(2000) < 0.8
    best = np.where(right, labels, 1 - labels)
    near = best.copy()
    near[:3] = 1 - near[:3]  # differs from the best in three examples: a paired difference of almost no variance
    far = np.where(generator.random(2000) < 0.7, labels, 1 - labels)
    predictions = np.stack([far, near, best], axis=1)
    scores = [float((predictions[:, k] == labels).mean()) for k in range(3)]
    resampled = report.bootstrap(predictions, labels, lambda p, y: score("accuracy", p, y), 300)
    chosen = report.select_rank([1, 2, 3], scores, resampled)
    differences = (predictions[:, 2] == labels).astype(float) - (predictions[:, 1] == labels)
    standard_error = differences.std() / math.sqrt(2000)
    expected = 2 if scores[2] - scores[1] <= standard_error else 3
    assert chosen["rank"] == expected
    assert np.std(resampled[:, 2] - resampled[:, 1]) == pytest.approx(standard_error, rel=0.25)
    assert report.select_rank([1, 2, 3], scores, resampled)["rank"] != 1


def test_the_files(tmp_path):
    report.write_report(results(), tmp_path)
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
    report.print_table(results(), console)
    text = console.export_text()
    assert "→ 2" in text and "75.00" in text and "nan" in text


def test_a_report_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    report.write_report(results(), tmp_path)
    before = (tmp_path / "rank_curve.png").read_bytes()

    def broken(curves, path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("loralib.report.plots.plot_curves", broken)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(results(), tmp_path)
    assert (tmp_path / "rank_curve.png").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_decisions_and_scores():
    assert decide(np.array([[[0.1, 0.9], [0.8, 0.2]]])).tolist() == [[1, 0]]
    assert decide(np.array([[[0.3], [2.5]]])).tolist() == [[0.3, 2.5]]
    assert score("combined_score", np.array([1, 1, 0]), np.array([1, 0, 0]), ("accuracy", "f1")) == pytest.approx(2 / 3)
    assert math.isnan(score("pearson", np.zeros(3), np.arange(3)))
