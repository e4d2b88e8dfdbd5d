"""Numbers over ranks: the area under their curve, the choice of one of them, and how sure it is."""

from __future__ import annotations

import itertools
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from .results import Choice, RankResults


def aurac(ranks: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the rank-quality curve: trapezoids over rank, divided by last minus first rank.

    With one rank it is that rank's score. Raises ValueError if ranks do not rise. Source: MatryoshkaLoRA, arXiv
    2605.07850.
    """
    if any(low >= high for low, high in itertools.pairwise(ranks)):
        raise ValueError(f"ranks are {list(ranks)}; give them in rising order, each with its score.")
    if len(ranks) == 1:
        return float(scores[0])
    return float(np.trapezoid(scores, ranks) / (ranks[-1] - ranks[0]))


def mean_and_error(values) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean over the first dimension and its standard error, s / sqrt(n) (None for n = 1)."""
    values = np.asarray(values, float)
    n = len(values)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(n) if n > 1 else None


def select_rank(
    ranks: Sequence[int],
    scores: Sequence[float],
    resampled: np.ndarray | None = None,
    within: float | str = "1se",
    points: int = 100,
) -> Choice:
    """The smallest rank that is as good as the best one, and why.

    Args:
        scores: the score of each rank, higher is better; what is no finite number never wins.
        resampled: (resamples, ranks), the scores on bootstrap resamples of the evaluation data, the same resample for
            all ranks (see ``bootstrap``); needed by "1se".
        within: "1se" accepts a rank whose score is at most one standard error of its paired difference to the best
            below the best; a number is a margin in points of the 0-100 scale.
        points: how many of these points a score of 1 is.

    The choice's standard error is that of the difference between the chosen and the best rank: None with a margin, and
    where the best is chosen. Raises ValueError where no rank has a score.
    """
    clean = np.asarray(scores, float)
    clean = np.where(np.isfinite(clean), clean, -np.inf)
    best = int(clean.argmax())
    if not np.isfinite(clean[best]):
        raise ValueError("No rank has a score to choose by; evaluate on data whose labels differ.")
    if within == "1se":
        if resampled is None:
            raise ValueError("The rule '1se' needs the evaluation's predictions; give a margin such as within=0.5.")
        margins = np.nan_to_num(np.nanstd(resampled[:, [best]] - resampled, axis=0, ddof=1))
        near = "within one standard error of"
    else:
        margin = float(within)
        if not 0 <= margin < math.inf:
            raise ValueError(f"within is {within!r}; give '1se' or a number of points, 0 or more.")
        margins = np.full(len(ranks), margin / points)
        near = f"within {margin:g}{' points' if points != 1 else ''} of"
    chosen = next(k for k in range(len(ranks)) if clean[best] - clean[k] <= margins[k] + 1e-12)
    # Of the best beside itself there is no difference to be unsure of.
    error = float(margins[chosen]) if within == "1se" and chosen != best else None
    rule = f"smallest rank {near} the best (rank {ranks[best]})"
    if chosen == best:
        rule = f"the best (rank {ranks[best]})" + (f", and no smaller rank is {near} it" if best else "")
    return Choice(ranks[chosen], rule, float(scores[chosen]), error)


def bootstrap(
    predictions: np.ndarray, labels: np.ndarray, score: Callable, resamples: int = 200, seed: int = 0
) -> np.ndarray:
    """``score(predictions, labels)`` of every rank on resamples of the examples: (resamples, ranks).

    ``predictions`` is (samples, ranks). All ranks see the same resample, so that their differences are paired.
    """
    draw = np.random.default_rng(seed)
    scores = np.empty((resamples, predictions.shape[1]))
    for i in range(resamples):
        chosen = draw.integers(0, len(labels), len(labels))
        scores[i] = [score(predictions[chosen, k], labels[chosen]) for k in range(predictions.shape[1])]
    return scores


def nothing_learnt(
    predictions: np.ndarray, labels: np.ndarray, curve: Sequence[float], metric: str, names: Sequence[str]
) -> str | None:
    """Why no rank can be chosen, or None: no score at any rank, or one class, of several, predicted for every example.

    ``predictions`` is (samples, ranks); ``names`` are the classes', none for a regression.
    """
    if all(math.isnan(value) for value in curve):
        return f"{metric} is not defined at any rank"
    several = bool(names) and len(set(labels.tolist())) > 1
    if several and (predictions == predictions[0, 0]).all():
        return f"every rank predicts {names[int(predictions[0, 0])]!r} for every example, so nothing was learnt"
    return None


def choose(
    results: RankResults, split: str | None = None, within: float | str = "1se", max_parameters: int | None = None
) -> Choice:
    """The choice of a rank for a run, see ``select_rank``.

    ``max_parameters`` leaves only ranks whose adapter is no larger. Raises ValueError if none is left, and
    FileNotFoundError if "1se" needs predictions that are not there.
    """
    split = results.split(split)
    if results.selected_rank_reason and split == results.split():
        raise ValueError(f"No rank can be chosen: {results.selected_rank_reason}.")
    ranks, values = results.curve(split)
    sizes = [row.adapter_parameters for row in results.splits[split]]
    fits = [k for k, size in enumerate(sizes) if max_parameters is None or size <= max_parameters]
    if not fits:
        raise ValueError(f"No rank has {max_parameters:,} parameters or fewer; the smallest has {min(sizes):,}.")
    resampled = results.sign * resampled_scores(results, split, fits) if within == "1se" else None
    scores, points = [results.sign * values[k] for k in fits], results.factor(results.metric)
    chosen = select_rank([ranks[k] for k in fits], scores, resampled, within, points)
    return Choice(chosen.rank, chosen.rule, results.sign * chosen.score, chosen.standard_error, split)


def read_predictions(file: Path, results: RankResults, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits (samples, ranks, classes) and labels (samples,) of a run. Raises ValueError if they are not those of its
    table."""
    try:
        with np.load(file) as arrays:
            logits, labels = np.asarray(arrays["logits"]), np.asarray(arrays["labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as a run's predictions ({error}); run the evaluation again.") from None
    rows = results.splits[split]
    wanted = (rows[0].samples, len(rows))
    if logits.ndim != 3 or logits.shape[:2] != wanted or labels.shape != wanted[:1]:
        raise ValueError(
            f"{file} holds logits {logits.shape} and labels {labels.shape}, the table {wanted[0]} samples at "
            f"{wanted[1]} ranks; they are of different runs, run the evaluation again."
        )
    if not (np.issubdtype(logits.dtype, np.floating) and np.isfinite(logits).all() and np.isfinite(labels).all()):
        raise ValueError(f"{file} holds logits or labels that are no finite numbers; run the evaluation again.")
    return logits, labels


def read_losses(file: Path, results: RankResults, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Each example's loss at every rank, (samples, ranks), and its weight (samples,). Raises ValueError if they are not
    those of the table."""
    try:
        with np.load(file) as arrays:
            losses, weights = np.asarray(arrays["losses"]), np.asarray(arrays["weights"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as a run's losses ({error}); run the evaluation again.") from None
    _, told = results.curve(split)
    if weights.ndim == 1 and len(weights) == len(losses):
        losses = np.where(weights[:, None] > 0, losses, 0.0)  # an example without a token that counts has no loss
    right = losses.shape == (results.splits[split][0].samples, len(told)) and weights.shape == losses.shape[:1]
    if not right or not np.allclose((losses * weights[:, None]).sum(0) / weights.sum(), told, rtol=1e-3):
        raise ValueError(
            f"{file} holds other losses than the table; they are of different runs, run the evaluation again."
        )
    return losses, weights


def _there(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there, and 1se resamples it; give a margin such as --within 0.5.")
    return file


def resampled_scores(results: RankResults, split: str, ranks: Sequence[int] | None = None) -> np.ndarray:
    """The main scores, (resamples, ranks), on bootstrap resamples of the run's stored predictions.

    ``ranks`` are places in the run's list of ranks, default all. Raises FileNotFoundError where there are no
    predictions, and ValueError where they are of another run or no bootstrap is known for the score.
    """
    ranks = range(len(results.splits[split])) if ranks is None else ranks
    file = Path(results.directory or "", f"predictions_{split}.npz")
    if results.metric == "loss":
        losses, weights = read_losses(_there(file), results, split)
        return bootstrap(
            losses[:, list(ranks)], weights, lambda loss, weight: float((loss * weight).sum() / weight.sum())
        )
    from .scores import SCORES, decide, score  # scikit-learn and scipy, which a margin does not need

    if results.metric not in (*SCORES, "combined_score"):
        raise ValueError(f"1se knows no {results.metric!r} to resample; give a margin such as --within 0.5.")
    logits, labels = read_predictions(_there(file), results, split)
    predictions = decide(logits)
    all_ranks, told = results.curve(split)
    try:
        found = [score(results.metric, predictions[:, k], labels, results.metrics) for k in range(predictions.shape[1])]
    except ValueError as error:  # scikit-learn's f1 is of two classes
        raise ValueError(
            f"The table's {results.metric} is counted in another way than 1se knows ({error}); give a margin such as "
            "--within 0.5."
        ) from None
    for b, ours, theirs in zip(all_ranks, found, told, strict=True):
        if not np.isclose(ours, theirs, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"{file} gives {results.metric} {ours:.4f} at rank {b}, the table {theirs:.4f}: they are of different "
                f"runs, or the table's {results.metric} is counted in another way. Run the evaluation again, or give a "
                "margin such as --within 0.5."
            )
    return bootstrap(predictions[:, list(ranks)], labels, lambda p, y: score(results.metric, p, y, results.metrics))
