"""The GLUE metrics as an ``evaluate`` module that needs no download."""

import datasets
import evaluate
import numpy as np

from loralib.report.scores import SCORES, decide, score

from .tasks import Task


class GlueMetric(evaluate.Metric):
    """``GlueMetric(task).compute(predictions=..., references=...)``: the task's scores, and ``combined_score``, their
    mean, where there are two."""

    def __init__(self, task: Task, **kwargs):
        self.task = task
        super().__init__(config_name=task.name, **kwargs)

    def _info(self):
        kind = datasets.Value("float64" if self.task.regression else "int64")
        return evaluate.MetricInfo(
            description=f"The scores of {self.task.name}: {', '.join(self.task.metrics)}.",
            citation="",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions, references):
        predictions, references = np.asarray(predictions), np.asarray(references)
        scores = {name: SCORES[name](predictions, references) for name in self.task.metrics}
        if len(scores) > 1:
            scores["combined_score"] = score("combined_score", predictions, references, self.task.metrics)
        return scores


def metrics_function(task: Task):
    """A Trainer's ``compute_metrics``: logits (samples, classes) and labels -> the task's scores."""
    metric = GlueMetric(task)

    def compute(prediction) -> dict[str, float]:
        found = prediction.predictions
        logits = found[0] if isinstance(found, tuple) else found  # some models give more than their logits
        return metric.compute(predictions=decide(logits), references=prediction.label_ids)

    compute.task = task
    return compute
