"""From predictions of all ranks to flat metrics, and back."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from ..report.choice import aurac


def rank_metrics(
    prediction: EvalPrediction, ranks: list[int], task_metrics: Callable[[EvalPrediction], dict] | None = None
) -> dict[str, float]:
    """The scores of every rank under one name each: ``r1_accuracy`` .. ``r8_accuracy``, ``mean_accuracy``,
    ``aurac_accuracy`` (area under the rank-quality curve), ``r1_loss`` .. ``r8_loss``, and ``loss``, their mean.

    Args:
        prediction: predictions (samples, ranks, ...), labels and whatever else the metrics are to see; or predictions
            (samples, ranks) without labels: each example's loss at each rank.
        task_metrics: a Trainer's ``compute_metrics``, called once per rank and unchanged.
    """
    scores = []
    for k in range(len(ranks)):
        at_rank = np.asarray(prediction.predictions)[:, k]
        if prediction.label_ids is None:
            scores.append({"loss": float(at_rank.mean())})
            continue
        of_rank = EvalPrediction(at_rank, prediction.label_ids, inputs=prediction.inputs, losses=prediction.losses)
        named = dict(task_metrics(of_rank)) if task_metrics else {}
        loss = mean_loss(at_rank, prediction.label_ids)
        scores.append(named | ({} if loss is None else {"loss": loss}))
    metrics = {f"r{b}_{name}": value for b, named in zip(ranks, scores, strict=True) for name, value in named.items()}
    for name in scores[0]:
        curve = [named[name] for named in scores]
        mean = float(np.mean(curve))
        metrics |= {"loss": mean} if name == "loss" else {f"mean_{name}": mean, f"aurac_{name}": aurac(ranks, curve)}
    return metrics


def by_rank(metrics: dict[str, Any], prefix: str) -> dict[int, dict[str, Any]]:
    """The way back: {rank: {name: value}} from the ``<prefix>_r<rank>_<name>`` among a trainer's flat metrics."""
    scores: dict[int, dict[str, Any]] = {}
    for key, value in metrics.items():
        match = re.fullmatch(rf"{re.escape(prefix)}_r(\d+)_(.+)", key)
        if match:
            scores.setdefault(int(match[1]), {})[match[2]] = value
    return scores


def mean_loss(logits: np.ndarray, labels) -> float | None:
    """The mean loss of a classifier (cross-entropy) or of a regression with one output (squared error), from its logits.

    None where the shapes are neither's.
    """
    if labels is None or logits.ndim != 2 or np.ndim(labels) != 1:
        return None
    scores, wanted = torch.as_tensor(logits).float(), torch.as_tensor(labels)
    if scores.shape[1] == 1:
        return F.mse_loss(scores[:, 0], wanted.float()).item()
    return F.cross_entropy(scores, wanted.long()).item()


@dataclass
class Gathered:
    """A Trainer's ``compute_metrics`` that keeps what the evaluation gathered and scores nothing."""

    prediction: EvalPrediction | None = None

    def __call__(self, prediction: EvalPrediction, **_) -> dict:
        self.prediction = prediction
        return {}


def in_order(values, order: list[int] | None):
    """Put what was computed in ``order`` (indices of the data) back into the data's order; None stays None."""
    if order is None or values is None:
        return values
    if isinstance(values, (tuple, list)):
        return type(values)(in_order(value, order) for value in values)
    if isinstance(values, dict):
        return {name: in_order(value, order) for name, value in values.items()}
    back = np.empty_like(values)
    back[order[: len(values)]] = values
    return back
