"""The area under a curve and the choice of a rank."""

import math

import numpy as np
import pytest

from loralib.report import choice
from loralib.report.scores import score


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
