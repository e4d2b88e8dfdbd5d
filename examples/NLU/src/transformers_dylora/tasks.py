"""The nine GLUE tasks: their columns, labels and scores."""

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Task:
    """What distinguishes a task. ``labels`` is empty for a regression."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def main_metric(self) -> str:
        """The score that the table leads with: the mean of both where GLUE reports two."""
        return self.metrics[0] if len(self.metrics) == 1 else "combined_score"

    def splits(self, kind: str) -> tuple[str, ...]:
        """The names of the splits of a kind ("train", "validation", "test"): MNLI has two but for training."""
        if self.name == "mnli" and kind != "train":
            return f"{kind}_matched", f"{kind}_mismatched"
        return (kind,)


_PAIR = ("sentence1", "sentence2")
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        Task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        Task("rte", _PAIR, ("entailment", "not_entailment"), ("accuracy",)),
        Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        Task("stsb", _PAIR, (), ("pearson", "spearmanr")),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    )
}


def glue_task(name: str) -> Task:
    task = TASKS.get(name.lower())
    if task is None:
        raise UsageError(
            f"--task_name is {name!r}; choose one of {', '.join(TASKS)}, or give --train_file and --validation_file."
        )
    return task
