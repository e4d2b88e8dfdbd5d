"""Quality scores by their GLUE names, each a function of (predictions, labels) -> float in [-1, 1]."""

import math

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _correlation(function):
    def score(predictions, labels) -> float:
        # A constant has no correlation: nan, without scipy's warning.
        if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return math.nan
        return float(function(predictions, labels)[0])

    return score


SCORES = {
    "accuracy": lambda predictions, labels: float(accuracy_score(labels, predictions)),
    "f1": lambda predictions, labels: float(f1_score(labels, predictions, zero_division=0)),
    "matthews_correlation": lambda predictions, labels: float(matthews_corrcoef(labels, predictions)),
    "pearson": _correlation(pearsonr),
    "spearmanr": _correlation(spearmanr),
}


def score(name: str, predictions, labels, parts: tuple[str, ...] = ()) -> float:
    """The score called ``name``; ``combined_score`` is the mean of ``parts``."""
    if name == "combined_score":
        return float(np.mean([SCORES[part](predictions, labels) for part in parts]))
    return SCORES[name](predictions, labels)


def decide(logits: np.ndarray) -> np.ndarray:
    """Predictions from logits (..., classes): the largest class, or the value itself where there is one output. Raises
    ValueError where one is nan."""
    if np.isnan(logits).any():
        raise ValueError("The model gives outputs that are no numbers (nan), so there is nothing to score.")
    return logits[..., 0] if logits.shape[-1] == 1 else logits.argmax(-1)
