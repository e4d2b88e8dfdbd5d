"""The part of the trainer that leaves results behind: what ``dylora select``, ``report`` and ``export --rank auto``
read."""

import contextlib
import copy
import hashlib
import importlib.metadata
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.directory import hash_of_weights
from ..files import save_npz
from ..model import adapter_parameters
from ..report.choice import aurac, choose, nothing_learnt
from ..report.results import Choice, RankResults, RankRow
from ..report.writing import remove_tables, write_run
from ..schedule import FACTS, BoundSchedule
from ..strengths import has_strengths
from ..titles import title_of
from .metrics import Scored, by_rank
from .part import TrainerPart


class Measurements(TrainerPart):
    """Of ``DyLoRAMixin``: ``measure_ranks``."""

    bound: BoundSchedule | None
    eval_ranks: list[int]
    scored: Scored | None  # the last evaluation's
    compute_metrics: Any
    args: Any
    eval_dataset: Any

    def measure_ranks(
        self, dataset=None, metric: str | None = None, split: str = "validation", task: str | None = None
    ):
        """Evaluate every rank, choose one, and write the adapter and what was found to the output directory: the
        tables, ``rank_results.json`` and ``predictions_<split>.npz``. Returns the ``RankResults``.

        The rank is the smallest within one standard error of the best, by examples drawn anew, where the metric is the
        loss or a score of ``loralib.report.scores``; for other metrics, and scores that are counted in another way
        than these, the best. Another ``split``, measured of the same weights by the same metric, joins the results
        that are there; the rank stays chosen on the first.

        Args:
            dataset: default ``eval_dataset``.
            metric: a name that ``compute_metrics`` gives, higher is better; or "loss" (default without
                compute_metrics). Default: its first name. For "loss" each example makes a batch, so that it has a loss
                of its own.
            task: what the results are called. Default: the output directory's name.

        Raises ValueError for a model without adapter and for a metric that is not there.
        """
        if self.bound is None:
            raise ValueError(
                "The model has no loralib layer, so there are no ranks to measure; call loralib.inject first."
            )
        wants_loss = metric == "loss" or (metric is None and self.compute_metrics is None)
        if isinstance(self.eval_dataset if dataset is None else dataset, dict):
            raise ValueError("There are several evaluation datasets; measure one at a time: measure_ranks(dataset).")
        args, task_metrics = self.args, self.compute_metrics
        self.args = copy.copy(args)
        self.args.dataloader_persistent_workers = False  # they would keep the batches of an earlier evaluation
        if wants_loss:
            self.compute_metrics, self.args.per_device_eval_batch_size = None, 1
        try:
            found = by_rank(self.evaluate(dataset), "eval")
        finally:
            self.args, self.compute_metrics = args, task_metrics
        scored = self.scored
        assert scored is not None and scored.losses is not None
        names = [name for name in found[self.eval_ranks[0]] if name not in ("loss", "perplexity")]
        metric = "loss" if wants_loss else metric or next(iter(names), "loss")
        if metric not in (*names, "loss", "perplexity") or any(metric not in of_rank for of_rank in found.values()):
            raise ValueError(f"metric is {metric!r}; the evaluation gives {', '.join([*names, 'loss'])}.")
        samples = len(scored.losses)
        rows = [
            RankRow(
                b, {name: float(value) for name, value in found[b].items() if name != "loss"}, found[b].get("loss"),
                samples, adapter_parameters(self.model, b),
            )
            for b in self.eval_ranks
        ]  # fmt: skip
        results = self._results(rows, metric, split, task or Path(self.args.output_dir).name)
        before = hash_of_weights(self.args.output_dir)
        self.save_model()  # first: whatever the choice of a rank meets, the adapter is kept
        if self.is_world_process_zero():
            results = replace(results, adapter=hash_of_weights(self.args.output_dir))
            if before not in (None, results.adapter):
                remove_tables(self.args.output_dir)  # of the weights that were there
            results = self._write(results, scored, split)
        return results

    def _results(self, rows: list[RankRow], metric: str, split: str, task: str) -> RankResults:
        bound = self.bound
        assert bound is not None
        curve = [row.value(metric) for row in rows]
        facts = self.training_facts()
        names = ("torch", "transformers", "accelerate")
        versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
        config = getattr(self.model, "config", None)
        return RankResults(
            task=task,
            method=title_of(facts, bound.r_max, has_strengths(self.model)),
            fitted=has_strengths(self.model) or None,
            metric=metric,
            splits={split: rows},
            aurac={split: aurac(self.eval_ranks, curve)},
            metrics=(metric,),
            model_name_or_path=getattr(config, "_name_or_path", None) or None,
            seed=self.args.seed,
            **{name: facts[name] for name in FACTS},
            max_rank=bound.r_max,
            versions=versions,
            directory=str(self.args.output_dir),
        )

    def _write(self, results: RankResults, scored: Scored, split: str) -> RankResults:
        """Write the predictions, choose the rank by them, and write the tables."""
        from ..report.scores import decide  # scikit-learn and scipy: of the report extra

        file = Path(self.args.output_dir) / f"predictions_{split}.npz"
        logits, labels = scored.predictions, scored.labels
        results = self._beside_earlier(results, split)
        _, curve = results.curve(split)
        reason = None if any(map(math.isfinite, curve)) else f"{results.metric} is not defined at any rank"
        if results.metric == "loss":
            save_npz(file, {"losses": scored.losses, "weights": scored.weights})
        elif isinstance(logits, np.ndarray) and logits.ndim == 3 and np.ndim(labels) == 1:
            save_npz(file, {"logits": logits, "labels": labels, "idx": np.arange(len(labels))})
            found = hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest()[:16]
            results = replace(results, data=results.data | {split: f"{len(labels)} labels, {found}"})
            names = [str(k) for k in range(logits.shape[-1])] if logits.shape[-1] > 1 else []
            reason = nothing_learnt(decide(logits), labels, curve, results.metric, names)
        else:
            file.unlink(missing_ok=True)  # an earlier measurement's
        if split == results.split():  # else the rank was chosen on an earlier one
            selected = None if reason else self._chosen(results, split)
            results = replace(results, selected_rank=selected, selected_rank_reason=reason)
        write_run(results, self.args.output_dir)
        return results

    def _chosen(self, results: RankResults, split: str) -> Choice:
        from ..report.scores import SCORES

        if results.metric in ("loss", *SCORES) and Path(self.args.output_dir, f"predictions_{split}.npz").exists():
            with contextlib.suppress(ValueError):  # compute_metrics may mean another score by that name
                return choose(results, split, "1se")
        return choose(results, split, 0)

    def _beside_earlier(self, results: RankResults, split: str) -> RankResults:
        """With the other splits that the output directory's results have of the same weights."""
        try:
            earlier = RankResults.read(self.args.output_dir)
        except (FileNotFoundError, ValueError):
            return results
        of_same = all(getattr(earlier, name) == getattr(results, name) for name in ("adapter", "task", "metric"))
        if not of_same or not earlier.splits.keys() - {split}:
            return results
        splits, aurac = earlier.splits | results.splits, earlier.aurac | results.aurac
        both = replace(results, splits=splits, aurac=aurac, data=earlier.data | results.data)
        if earlier.split() == split:
            return both
        return replace(both, selected_rank=earlier.selected_rank, selected_rank_reason=earlier.selected_rank_reason)
