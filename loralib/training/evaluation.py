"""The part of the trainer that evaluates: all ranks in one pass over the data, scored in the data's order."""

import contextlib

import torch
from transformers import EvalPrediction
from transformers.trainer_pt_utils import nested_truncate
from transformers.trainer_utils import denumpify_detensorize

from ..all_ranks import at_ranks, batch_size, share_between_ranks
from ..schedule import BoundSchedule
from .batching import order_within
from .metrics import Gathered, in_order, rank_metrics
from .part import TrainerPart


class EvaluationOfRanks(TrainerPart):
    """Of ``DyLoRAMixin``: logits and scores of every rank in ``eval_ranks``."""

    bound: BoundSchedule | None
    eval_ranks: list[int]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Logits (batch, ranks, ...) of every rank in ``eval_ranks``; the losses come from them at the end.

        Where losses alone are wanted they take the logits' place, (batch, ranks), so that they are gathered alike.
        """
        if not self.eval_ranks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        size, step = batch_size(inputs), super().prediction_step
        # A model trained with a rank per example takes them in evaluation too; a pass of one rank alone gives its loss.
        stack = self.bound.schedule.sampling == "example" and not prediction_loss_only
        outputs, labels = [], None
        for _, (loss, logits, labels) in at_ranks(  # noqa: B007  # the labels of the last rank are those of all
            self.model,
            inputs,
            self.eval_ranks,
            lambda batch: step(model, batch, prediction_loss_only, ignore_keys),
            stack,
        ):
            output = loss.expand(size) if prediction_loss_only else _first(logits)
            if output.ndim > 2:
                raise ValueError(
                    f"The logits have shape {tuple(output.shape)}; ranks are scored on one prediction an example, "
                    f"(batch, classes). Leave out compute_metrics to have every rank's loss."
                )
            outputs.append(output)
        return None, torch.stack(outputs, dim=1), None if labels is None else nested_truncate(labels, size)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        task_metrics, gathered = self.compute_metrics, Gathered()
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "compute_metrics", task_metrics)
            self.compute_metrics = gathered
            # A data loader draws a seed from the global generator; training must not depend on when it is evaluated.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.eval_ranks:
                stack.enter_context(share_between_ranks(self.model))
                stack.enter_context(self._savings())
            output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
        order, kept = order_within(dataloader), gathered.prediction
        predictions, labels = in_order(output.predictions, order), in_order(output.label_ids, order)
        extra = {} if kept is None else {k: in_order(getattr(kept, k), order) for k in ("inputs", "losses")}
        scored = EvalPrediction(predictions, labels, **extra)
        metrics = {}
        if self.eval_ranks and (labels is not None or (loss_only and predictions is not None)):
            metrics = rank_metrics(scored, self.eval_ranks, task_metrics)
        elif labels is not None and task_metrics is not None:
            metrics = task_metrics(scored)
        named = {f"{metric_key_prefix}_{key.removeprefix(f'{metric_key_prefix}_')}": v for key, v in metrics.items()}
        return output._replace(
            predictions=predictions, label_ids=labels, metrics=denumpify_detensorize(named) | output.metrics
        )


def _first(logits):
    return logits[0] if isinstance(logits, (tuple, list)) else logits
