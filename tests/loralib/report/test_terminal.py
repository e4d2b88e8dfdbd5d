"""The tables in the terminal: numbers whole, nothing beyond the width, text from outside as it is."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from loralib.cli import main
from loralib.report.results import Choice, RankResults, RankRow
from loralib.report.tables import print_grid, print_table


def shown(width, draw):
    console = Console(record=True, width=width, file=io.StringIO())
    draw(console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(
    "metrics", [("accuracy",), ("matthews_correlation",), ("combined_score", "pearson", "spearmanr")]
)
def test_a_run_at_eighty_columns(metrics, width):
    rows = [RankRow(b, dict.fromkeys(metrics, 0.87654321), 0.12345, 390_965, 12_345_678 * b) for b in (1, 8)]
    results = RankResults(
        "[bold]a task[/] " + "with a very long name " * 4, "a method " * 12, metrics[0], {"validation": rows},
        {"validation": 0.8}, Choice(8, "why", split="validation"),
    )  # fmt: skip
    text = shown(width, lambda console: print_table(results, console))
    assert all(len(line) <= width for line in text.splitlines())
    for number in ("87.65", "0.1235", "390965", "12,345,678", "98,765,424", "→ 8"):
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,])", text), number
    assert "[bold]a task[/]" in text


@given(
    st.integers(40, 200),
    st.integers(1, 20),
    st.lists(st.text("ab cdefghij", min_size=1, max_size=60), min_size=1, max_size=3),
)
def test_all_numbers_are_there_whole_at_any_width(width, count, names):
    head = ["name", *(f"r={b}" for b in range(count))]
    rows = [[name, *(f"{10 * k + 1000 * j}.25 ± 1.00" for j in range(count))] for k, name in enumerate(names)]
    text = shown(width, lambda console: print_grid("a", head, rows, left=(0,), console=console))
    assert all(len(line) <= width for line in text.splitlines())
    for row in rows:
        assert all(cell in text for cell in row[1:])


def test_a_report_over_runs_fits(tmp_path, capsys, monkeypatch):
    from loralib.report.writing import write_run

    monkeypatch.setenv("COLUMNS", "80")
    for task in ("cola", "mnli"):
        for seed in (0, 1):
            rows = [RankRow(b, {"accuracy": 0.6 + 0.01 * b + 0.001 * seed}, 0.5, 10, b) for b in range(1, 9)]
            results = RankResults(
                task, "DyLoRA, components ordered after 80 % of the steps, then rank 1 or ranks 1, 2, 4 and 8 together", "accuracy",
                {"validation_matched": rows}, {"validation_matched": 0.6}, seed=seed, sampling="example",
                distribution="mixed", full_rank_share=0.8, max_rank=8,
            )  # fmt: skip
            write_run(results, tmp_path / f"{task}{seed}")
    assert main(["report", *map(str, sorted(tmp_path.iterdir())), "--to", str(tmp_path / "report")]) == 0
    text = capsys.readouterr().out
    summary = text[text.index("mean over seeds") :].splitlines()[:-1]
    assert all(len(line) <= 80 for line in summary if "written to" not in line)
    assert "61.05 ± 0.05" in text and "average of 2 tasks" in text
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "rank_results.md", "rank_results.csv", "rank_curve.png", "rank_curve.svg", "rank_curve.pdf", "report.html"
    }  # fmt: skip
