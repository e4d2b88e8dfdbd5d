"""From predictions of all ranks to flat metrics, and back."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers import EvalPrediction

from ..report.choice import aurac


@dataclass
class Scored:
    """What an evaluation gathered, in the data's order.

    Args:
        predictions: (samples, ranks, ..), or several of these; None where losses alone were wanted.
        losses: (samples, ranks), each example's, or that of its batch; nan where there is none.
        weights: (samples,), by which losses count: the tokens of an example that its loss is the mean of, else 1.
    """

    predictions: Any
    labels: Any
    inputs: Any = None
    losses: np.ndarray | None = None
    weights: np.ndarray | None = None

    @classmethod
    def of(cls, gathered: Any, labels: Any, inputs: Any) -> "Scored | None":
        """From what ``prediction_step`` left behind, ranks in the last dimension; None if nothing was evaluated. Raises
        ValueError for what another step left."""
        if gathered is None:
            return None
        if not isinstance(gathered, dict) or "losses" not in gathered:
            raise ValueError(
                f"prediction_step left {type(gathered).__name__}, of one rank: put a class that has a prediction_step "
                "of its own after the mixin, class Mine(DyLoRAMixin, Base), where it is called once for each rank."
            )
        losses = np.asarray(gathered["losses"])
        predictions = tree_map(
            lambda x: np.moveaxis(x, -1, 1) if isinstance(x, np.ndarray) else x, gathered.get("logits")
        )
        return cls(predictions, labels, inputs, losses[:, :-1], losses[:, -1])

    def at(self, k: int) -> Any:
        """The predictions at the rank in place k."""
        return tree_map(lambda x: x[:, k] if isinstance(x, np.ndarray) else x, self.predictions)

    def loss(self, k: int) -> float | None:
        """The loss at a rank: the mean by what counts in each example; None where there is none."""
        assert self.losses is not None and self.weights is not None
        counts = self.weights > 0
        losses, weights = self.losses[counts, k], self.weights[counts]
        return None if not len(losses) or np.isnan(losses).any() else float((losses * weights).sum() / weights.sum())

    def prediction(self, k: int | None = None, with_losses: bool = False) -> EvalPrediction:
        """What a Trainer's ``compute_metrics`` is given, of one rank."""
        losses = self.losses[:, k] if with_losses and self.losses is not None and k is not None else None
        predictions = self.predictions if k is None else self.at(k)
        return EvalPrediction(predictions, self.labels, inputs=self.inputs, losses=losses)


def rank_metrics(
    scored: Scored,
    ranks: list[int],
    task_metrics: Callable[[EvalPrediction], dict] | None = None,
    of_tokens: bool = False,
    with_losses: bool = False,
) -> dict[str, float]:
    """The scores of every rank under one name each: ``r1_accuracy`` .. ``r8_accuracy``, ``mean_accuracy``,
    ``aurac_accuracy`` (area under the rank-quality curve), ``r1_loss`` .. ``r8_loss``, and ``loss``, their mean.

    Args:
        task_metrics: a Trainer's ``compute_metrics``, called once per rank and unchanged.
        of_tokens: the losses are a language model's; add ``r1_perplexity`` .., their exponentials.
        with_losses: whether the metrics see each example's loss.
    """
    scores = []
    for k in range(len(ranks)):
        named = {}
        if task_metrics and scored.labels is not None and scored.predictions is not None:
            named = {name: _plain(value) for name, value in task_metrics(scored.prediction(k, with_losses)).items()}
        loss = scored.loss(k)
        if loss is not None:
            named["loss"] = loss
            if of_tokens:
                named["perplexity"] = math.exp(min(loss, 700.0))
        scores.append(named)
    metrics = {f"r{b}_{name}": value for b, named in zip(ranks, scores, strict=True) for name, value in named.items()}
    for name in scores[0]:
        curve: list[Any] = [named.get(name) for named in scores]
        if not all(isinstance(value, (int, float, np.number)) for value in curve):
            continue  # a table, a list: each rank's stands for itself
        if name == "loss":
            metrics["loss"] = float(np.mean(curve))
        elif name != "perplexity":
            metrics |= {f"mean_{name}": float(np.mean(curve)), f"aurac_{name}": aurac(ranks, curve)}
    return metrics


def _plain(value: Any) -> Any:
    """A number for an array or tensor that holds one (torchmetrics')."""
    return value.item() if isinstance(value, (torch.Tensor, np.ndarray)) and not value.ndim else value


def counted_tokens(labels: Any, size: int, causal: bool) -> torch.Tensor:
    """How many tokens of each example its loss is the mean of, float (batch,); where a label is one for the example, 1.

    -100 marks a token that does not count; a causal model's first token is predicted from nothing.
    """
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or not labels.ndim:
        return torch.ones(size, device="cpu")
    if labels.ndim == 1:
        return labels.ne(-100).float() if len(labels) == size else torch.ones(size, device="cpu")
    return (labels[:, 1:] if causal else labels).ne(-100).flatten(1).sum(1).float()


def by_rank(metrics: dict[str, Any], prefix: str) -> dict[int, dict[str, Any]]:
    """The way back: {rank: {name: value}} from the ``<prefix>_r<rank>_<name>`` among a trainer's flat metrics."""
    scores: dict[int, dict[str, Any]] = {}
    for key, value in metrics.items():
        match = re.fullmatch(rf"{re.escape(prefix)}_r(\d+)_(.+)", key)
        if match:
            scores.setdefault(int(match[1]), {})[match[2]] = value
    return scores


def losses_of(logits: Any, labels: Any, size: int) -> torch.Tensor | None:
    """Each example's loss, float (size,), on the CPU: a classifier's cross-entropy (nan for a label of -100), or the
    squared error of a regression with one output. None where the shapes are neither's."""
    logits = logits[0] if isinstance(logits, (tuple, list)) and logits else logits  # further outputs follow the logits
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return None
    if logits.ndim != 2 or len(logits) != size or labels.shape != (size,) or not logits.is_floating_point():
        return None
    scores, labels = logits.detach().float().cpu(), labels.detach().cpu()
    if scores.shape[1] == 1:
        return (scores[:, 0] - labels.float()).square()
    if labels.is_floating_point() or not ((labels < scores.shape[1]) & ((labels >= 0) | (labels == -100))).all():
        return None
    return F.cross_entropy(scores, labels.long(), reduction="none").masked_fill(labels == -100, torch.nan)


def of_several(labels: Any) -> bool:
    """Whether examples of more than one class are among them; values always count as such."""
    return labels.is_floating_point() or len(labels[labels != -100].unique()) > 1


@dataclass
class Gathered:
    """A Trainer's ``compute_metrics`` that keeps what the evaluation gathered and scores nothing."""

    prediction: EvalPrediction | None = None

    def __call__(self, prediction: EvalPrediction, **_) -> dict:
        self.prediction = prediction
        return {}


def in_order(values, order: list[int] | None):
    """Put what was computed in ``order`` (indices of the data) back into the data's order; None stays None.

    So does what has not one row for each example, as padding-free batches give it.
    """
    if order is None or values is None:
        return values
    if isinstance(values, (tuple, list)):
        return type(values)(in_order(value, order) for value in values)
    if isinstance(values, dict):
        return {name: in_order(value, order) for name, value in values.items()}
    if len(values) != len(order):
        return values
    back = np.empty_like(values)
    back[order] = values
    return back
