"""RankResults: what is written is read back; what is no result is one sentence."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralib.report.choice import choose
from loralib.report.results import Choice, RankResults, RankRow
from loralib.report.tables import to_csv, to_markdown

ROOT = Path(__file__).parents[3]
NUMBER = st.floats(-1, 1) | st.just(math.nan)


@st.composite
def results(draw):
    ranks = sorted(draw(st.sets(st.integers(0, 64), min_size=1, max_size=5)))
    names = draw(st.lists(st.sampled_from(["accuracy", "f1", "pearson"]), min_size=1, unique=True))
    with_loss = draw(st.booleans())
    splits = {
        name: [
            RankRow(
                b, {n: draw(NUMBER) for n in names}, draw(NUMBER) if with_loss else None, draw(st.integers(0, 9)), 8 * b
            )
            for b in ranks
        ]
        for name in draw(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=2, unique=True))
    }
    chosen = draw(
        st.none() | st.builds(Choice, st.sampled_from(ranks), st.text(), NUMBER, st.none() | st.floats(0, 1), st.text())
    )
    return RankResults(
        "a task", draw(st.text()), names[0], splits, {name: draw(NUMBER) for name in splits}, chosen, metrics=tuple(names),
        seed=draw(st.none() | st.integers()), frozen=draw(st.none() | st.booleans()), lora_alpha=draw(st.none() | st.floats(1, 9)),
    )  # fmt: skip


@given(results())
def test_written_and_read_it_is_the_same(found):
    text = json.dumps(found.to_json(), allow_nan=False)
    again = RankResults.from_json(json.loads(text))
    assert repr(again) == repr(found)  # nan is not equal to itself
    assert to_markdown(again) == to_markdown(found) and to_csv(again) == to_csv(found)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_score_is_none(value, tmp_path):
    rows = [RankRow(1, {"perplexity": value}, value, 3, 8), RankRow(2, {"perplexity": 7.0}, 0.5, 3, 16)]
    found = RankResults("t", "m", "perplexity", {"validation": rows}, {"validation": value})
    text = json.dumps(found.to_json())
    assert "Infinity" not in text and "inf" not in to_csv(found) + to_markdown(found)
    again = RankResults.from_json(json.loads(text))
    assert to_csv(again) == to_csv(found) and choose(again, within=1).rank == 2


@pytest.mark.parametrize("file", sorted(ROOT.glob("results/*/rank_results.json")), ids=lambda file: file.parent.name)
def test_results_of_earlier_runs_are_read_and_written_alike(file):
    found = RankResults.read(file.parent)
    stored = json.loads(file.read_text())
    written = found.to_json()
    assert {name: written[name] for name in stored} == stored
    assert found.directory == str(file.parent) and found.selected_rank.rank in found.curve(found.selected_rank.split)[0]


ROW = {"rank": 1, "accuracy": 0.5, "samples": 3, "adapter_parameters": 8}
GOOD = {"task": "rte", "method": "m", "metric": "accuracy", "splits": {"validation": [ROW]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it holds no table"),
        ("{", "Expecting property name"),
        ("{}", "it has no 'task'"),
        (GOOD | {"splits": {}}, "it has no splits"),
        (GOOD | {"splits": {"validation": []}}, "split 'validation' has no rows"),
        (GOOD | {"splits": {"validation": [ROW | {"rank": "1"}]}}, "rank is '1'"),
        (GOOD | {"splits": {"validation": [ROW | {"rank": True}]}}, "rank is True"),
        (GOOD | {"splits": {"validation": [ROW, ROW]}}, r"do not rise: \[1, 1\]"),
        (GOOD | {"splits": {"validation": [ROW, ROW | {"rank": 2, "f1": 1.0}]}}, "lacks 'accuracy' at some rank"),
        (GOOD | {"metric": "f1"}, "lacks 'f1'"),
        (GOOD | {"splits": {"validation": [ROW | {"accuracy": "high"}]}}, "accuracy is 'high'"),
        ('{"task": "t", "method": "m", "metric": "a", "splits": {"v": [{"rank": 1, "a": Infinity, "samples": 1, '
         '"adapter_parameters": 1}]}}', "a is inf; a finite number or null"),
        (GOOD | {"selected_rank": 3}, "is no result of a run"),
    ],
)  # fmt: skip
def test_what_is_no_result_is_one_sentence(content, message, tmp_path):
    (tmp_path / "rank_results.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        RankResults.read(tmp_path)
    assert str(tmp_path) in str(caught.value) and "run the evaluation again" in str(caught.value)


def test_a_directory_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no rank_results\.json"):
        RankResults.read(tmp_path)
    with pytest.raises(ValueError, match="has no split 'test'; choose one of validation"):
        RankResults.from_json(GOOD).split("test")
