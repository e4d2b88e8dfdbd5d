"""The area under a curve and the choice of a rank."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loralib.report import choice
from loralib.report.results import RankResults, RankRow
from loralib.report.scores import score
from loralib.report.tables import summary


def test_aurac_is_the_mean_height_of_the_curve():
    assert choice.aurac([1, 2, 3], [0.2, 0.4, 0.6]) == pytest.approx(0.4)
    assert choice.aurac([1, 2, 8], [0.0, 1.0, 1.0]) == pytest.approx((0.5 + 6) / 7)
    assert choice.aurac([3], [0.7]) == 0.7


def test_selection_by_a_margin():
    choose = lambda scores, within: choice.select_rank([1, 2, 4, 8], scores, within=within).rank  # noqa: E731
    assert choose([0.5, 0.8, 0.81, 0.82], 0) == 8
    assert choose([0.5, 0.8, 0.81, 0.82], 1) == 4
    assert choose([0.5, 0.8, 0.81, 0.82], 2.0) == 2
    assert choose([0.5, 0.8, math.nan, 0.8], 0) == 2
    with pytest.raises(ValueError, match="No rank has a score"):
        choose([math.nan] * 4, 1)
    with pytest.raises(ValueError, match="within"):
        choose([0.5] * 4, -1)
    for none in (math.nan, math.inf, -math.inf):
        assert choose([none, 0.8, 0.8, none], 0) == 2
        with pytest.raises(ValueError, match="No rank has a score"):
            choose([none] * 4, 1)
    with pytest.raises(ValueError, match="within is inf; give '1se' or a number of points"):
        choose([math.nan, 0.5, 0.5, 0.5], math.inf)


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
    resampled = choice.bootstrap(predictions, labels, lambda p, y: score("accuracy", p, y), 300)
    chosen = choice.select_rank([1, 2, 3], scores, resampled)
    differences = (predictions[:, 2] == labels).astype(float) - (predictions[:, 1] == labels)
    standard_error = differences.std() / math.sqrt(2000)
    expected = 2 if scores[2] - scores[1] <= standard_error else 3
    assert chosen.rank == expected
    assert np.std(resampled[:, 2] - resampled[:, 1]) == pytest.approx(standard_error, rel=0.25)
    assert choice.select_rank([1, 2, 3], scores, resampled).rank != 1


def test_the_mean_and_its_standard_error():
    mean, error = choice.mean_and_error([[1.0, 2.0], [3.0, 2.0]])
    assert mean.tolist() == [2.0, 2.0] and error.tolist() == [1.0, 0.0]
    assert choice.mean_and_error([[1.0, 2.0]])[1] is None


def a_run(directory, **changes):
    """A table of 4 samples at ranks 1 and 2, and its predictions."""
    logits, labels = np.random.default_rng(0).normal(size=(4, 2, 2)), np.array([0, 1, 0, 1])
    accuracies = (logits.argmax(-1) == labels[:, None]).mean(0)
    rows = [RankRow(b, {"accuracy": accuracies[b - 1]}, None, 4, b) for b in (1, 2)]
    results = RankResults("rte", "m", "accuracy", {"validation": rows}, directory=str(directory))
    arrays = {"logits": logits, "labels": labels} | changes
    np.savez(
        directory / "predictions_validation.npz", **{name: value for name, value in arrays.items() if value is not None}
    )
    return results


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": np.zeros((4, 3, 2))}, "the table 4 samples at 2 ranks; they are of different runs"),
        ({"logits": np.zeros((5, 2, 2))}, "of different runs"),
        ({"labels": np.zeros(3)}, "of different runs"),
        ({"logits": np.zeros((4, 2))}, "of different runs"),
        ({"logits": np.full((4, 2, 2), math.nan)}, "no finite numbers"),
        ({"logits": np.array([[["a", "b"]] * 2] * 4)}, "no finite numbers"),
        ({"labels": np.array([1, 1, 1, 1])}, "at rank 1, the table .*: they are of different runs"),
        ({"logits": None}, "cannot be read as a run's predictions"),
        ({"logits": np.array([None])}, "cannot be read"),
    ],
)
def test_predictions_that_do_not_belong_to_the_table(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        choice.choose(a_run(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive"])
def test_a_file_that_is_no_archive(content, tmp_path):
    results = a_run(tmp_path)
    assert choice.choose(results).rank in (1, 2)
    (tmp_path / "predictions_validation.npz").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a run's predictions"):
        choice.choose(results)


def test_a_run_that_learnt_nothing_offers_no_rank(tmp_path):
    results = replace(
        a_run(tmp_path), selected_rank_reason="every rank predicts 'no' for every example, so nothing was learnt"
    )
    with pytest.raises(ValueError, match="No rank can be chosen: every rank predicts 'no'"):
        choice.choose(results, within=1)
    assert "no rank is selected: every rank predicts" in summary(
        replace(results, aurac={"validation": 0.5}), "validation"
    )
    assert RankResults.from_json(results.to_json()).selected_rank_reason == results.selected_rank_reason
