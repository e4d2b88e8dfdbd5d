"""The part of the trainer that evaluates: all ranks in one pass over the data, scored in the data's order."""

import contextlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map
from transformers.trainer_pt_utils import nested_truncate
from transformers.trainer_utils import denumpify_detensorize, has_length

from ..adapters.kinds import task_type
from ..all_ranks import at_ranks, share_between_ranks
from ..layout import examples_in
from ..schedule import BoundSchedule
from .batching import order_within
from .metrics import Gathered, Scored, counted_tokens, in_order, losses_of, of_several, rank_metrics
from .part import TrainerPart, without_notes

# The most that logits of tokens may take over an evaluation, in bytes: predictions of all ranks are held until its end.
LOGITS_BUDGET = 4 * 2**30


class EvaluationOfRanks(TrainerPart):
    """Of ``DyLoRAMixin``: logits and scores of every rank in ``eval_ranks``."""

    bound: BoundSchedule | None
    eval_ranks: list[int]
    to_evaluate: int = 0  # examples of the evaluation that runs
    scored: Scored | None = None  # what the last one gathered
    rank_logits: Any = None  # its preprocess_logits_for_metrics
    labels_are_tokens = False  # in its last batch
    loss_follows: bool | None = None  # whether a classifier's loss is the one that its logits say; None: not yet seen
    first_batch: int | None = None  # how many examples its first batch has, and
    rows_each: int | None = None  # how many rows a collator makes of each: pairs of preferences are two

    @torch.no_grad()  # Trainer's own step says so inside; ranks share what they can only without gradients
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """What every rank in ``eval_ranks`` gives, ranks in the last dimension: {"logits": a tensor or several, (batch,
        .., ranks), "losses": (batch, ranks + 1), "contradicted": (batch,)}, and the labels.

        Each example's losses are its own, where they follow from a classifier's logits, else its batch's; the last
        column is its weight, the number of its tokens that count. "contradicted": whether they were taken to follow,
        and in this batch do not.
        Logits are what ``preprocess_logits_for_metrics`` makes of a rank's. Where losses alone are wanted there are no
        logits.
        """
        if not self.eval_ranks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        rows, step = examples_in(inputs), super().prediction_step
        size = self._examples_of(rows)
        given = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        has_loss = bool(given) or (not self.label_names and inputs.get("return_loss", self.can_return_loss))
        agree: list[bool] = []  # pass by pass

        def run(batch):
            loss, scores, labels = step(model, batch, prediction_loss_only, ignore_keys=ignore_keys)
            of_logits = None if self.loss_follows is False else losses_of(scores, labels, examples_in(batch))
            if loss is not None and of_logits is not None:
                whole = loss.detach().float().cpu().mean()
                agree.append(torch.allclose(of_logits.nanmean(), whole, rtol=1e-4, atol=1e-5, equal_nan=True))
            return loss, scores, labels

        # A model trained with a rank per example takes them in evaluation too. A pass of several ranks has no loss of
        # one: it must follow from the logits, and whether it does a first batch shows, rank by rank.
        stack = self.bound.schedule.sampling == "example" and not prediction_loss_only
        stack = stack and (not has_loss or bool(self.loss_follows))
        of_batches, of_logits, logits, labels = [], [], [], None
        for _, (loss, scores, labels) in at_ranks(self.model, inputs, self.eval_ranks, run, stack):
            of_batches.append(_for_each(loss, size))
            of_logits.append(losses_of(scores, labels, size))
            if not prediction_loss_only:
                labels = None if labels is None else nested_truncate(labels, rows)
                if self.rank_logits is not None:
                    scores = self.rank_logits(scores, labels)
                logits.append(scores)
        if self.loss_follows is None and has_loss and not prediction_loss_only:
            self._settle(bool(agree) and all(agree) and of_logits[-1] is not None, labels)
        if has_loss and not self.loss_follows and (own := self._own_of_last_batch(size)):
            of_batches = self._losses_of_first(own, inputs, rows, size)
        losses = of_logits if self.loss_follows else of_batches
        target = inputs.get("labels", given[0] if len(given) == 1 else None)
        self.labels_are_tokens = getattr(target, "ndim", 0) > 1
        of_examples = isinstance(target, torch.Tensor) and target.shape[:1] == (size,)
        weights = counted_tokens(target if of_examples else None, size, task_type(self.model) == "CAUSAL_LM")
        contradicted = torch.full((size,), float(bool(self.loss_follows) and not all(agree)), device="cpu")
        found = {
            "losses": torch.stack([*losses, weights.cpu()], dim=-1).to(self.args.device),
            "contradicted": contradicted.to(self.args.device),
        }
        if logits:
            found["logits"] = tree_map(_at_all_ranks, *logits)
            self._check_size(found["logits"], size)
        return None, found, labels

    def _settle(self, follows: bool, labels: Any) -> None:
        """Whether losses follow from logits, by the batch at hand; left open where it has one class alone, in which
        weights of classes do not show. All processes together: one that ran its ranks another way than the others
        would wait for them (FSDP)."""
        verdict = torch.tensor([follows, follows and of_several(labels)], device=self.args.device)
        follows, says = (self.accelerator.reduce(verdict.float(), "mean") == 1).tolist()
        self.loss_follows = False if not follows else True if says else None

    def _examples_of(self, rows: int) -> int:
        """How many examples a batch of so many rows has."""
        if self.rows_each is None:
            self.rows_each = rows // self.first_batch if self.first_batch and rows % self.first_batch == 0 else 1
            together = (self.first_batch or 1) * self.args.world_size
            if self.rows_each > 1 and self.args.world_size > 1 and self.to_evaluate % together:
                raise ValueError(
                    f"{self.to_evaluate} examples of {self.rows_each} rows each cannot be shared out evenly to "
                    f"{self.args.world_size} processes in batches of {self.first_batch}: evaluate a multiple of "
                    f"{together} examples, or in one process."
                )
        return rows // self.rows_each

    def _own_of_last_batch(self, size: int) -> int:
        """How many examples of a last batch are this process's own, at least 1; 0 where the batch is another one.
        Accelerate fills up the last batches of several processes with examples that come a second time."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return 0
        return min(max(state.remainder - self.args.process_index * size, 1), size)

    def _losses_of_first(self, n: int, inputs: dict, rows: int, size: int) -> list[torch.Tensor]:
        """The losses of the first n examples of a batch, in the place of the batch's, at each rank."""
        first = {
            name: value[:n] if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows else value
            for name, value in inputs.items()
        }
        step = super().prediction_step
        with without_notes(self):
            found = at_ranks(self.model, first, self.eval_ranks, lambda batch: step(self.model, batch, True), False)
            return [_for_each(loss, size) for _, (loss, _, _) in found]

    def _losses_are_of_tokens(self) -> bool:
        """Whether the losses are a language model's own, of each token that follows; preferences (DPO), smoothed labels
        and losses of the user's have no perplexity."""
        language = task_type(self.model) in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        computing = [kind for kind in type(self).__mro__ if "compute_loss" in vars(kind)]
        known = all(kind.__module__.split(".")[0] in ("loralib", "transformers", "trl") for kind in computing)
        own = self.label_smoother is None and self.compute_loss_func is None and known
        return language and own and self.labels_are_tokens and f"{getattr(self.args, 'loss_type', 'nll')}"[-3:] == "nll"

    def _check_size(self, logits: Any, size: int) -> None:
        """Raise ValueError for logits of tokens that an evaluation could not hold, at its first batch."""
        leaves = [leaf for leaf in tree_leaves(logits) if leaf.ndim > 3 or not leaf.is_floating_point()]
        needed = sum(leaf.numel() * leaf.element_size() for leaf in leaves) / size * self.to_evaluate
        if needed > LOGITS_BUDGET:
            raise ValueError(
                f"The logits of {self.to_evaluate:,} examples at {len(self.eval_ranks)} ranks would take "
                f"{needed / 2**30:.1f} GiB; give preprocess_logits_for_metrics (for example their argmax), or measure "
                "fewer ranks."
            )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        task_metrics, gathered = self.compute_metrics, Gathered()
        self.rank_logits, self.loss_follows = self.preprocess_logits_for_metrics, None
        self.to_evaluate = len(dataloader.dataset) if has_length(dataloader.dataset) else 0
        self.first_batch, self.rows_each = self._first_of(dataloader), None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "compute_metrics", task_metrics)
            self.compute_metrics = gathered
            # A batch's loss is its own tokens' mean, not its share in those of all processes.
            stack.callback(setattr, self.args, "average_tokens_across_devices", self.args.average_tokens_across_devices)
            self.args.average_tokens_across_devices = False
            # A data loader draws a seed from the global generator; training must not depend on when it is evaluated.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self.eval_ranks:
                stack.callback(setattr, self, "preprocess_logits_for_metrics", self.rank_logits)
                self.preprocess_logits_for_metrics = None  # each rank's are, in prediction_step
                stack.enter_context(share_between_ranks(self.model))
                stack.enter_context(self._savings())

            def evaluate():
                return super(EvaluationOfRanks, self).evaluation_loop(
                    dataloader, description, loss_only, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
                )

            output = evaluate()
            if _contradicted(output.predictions):
                self.loss_follows = False  # for all of it: rank by rank, with the loss that the trainer computes
                output = evaluate()
        order, kept = order_within(dataloader), gathered.prediction
        predictions, labels = in_order(output.predictions, order), in_order(output.label_ids, order)
        inputs = None if kept is None else in_order(kept.inputs, order)
        self.scored = scored = Scored.of(predictions, labels, inputs) if self.eval_ranks else None
        metrics = {}
        if scored is not None:
            with_losses = "loss" in self.args.include_for_metrics

            def unprefixed(prediction):
                return {name.removeprefix(f"{metric_key_prefix}_"): v for name, v in task_metrics(prediction).items()}

            scores = None if task_metrics is None else unprefixed
            metrics = rank_metrics(scored, self.eval_ranks, scores, self._losses_are_of_tokens(), with_losses)
            predictions = scored.losses if loss_only else scored.predictions
        elif labels is not None and task_metrics is not None:
            metrics = task_metrics(Scored(predictions, labels, inputs).prediction())
        named = {f"{metric_key_prefix}_{key.removeprefix(f'{metric_key_prefix}_')}": v for key, v in metrics.items()}
        return output._replace(
            predictions=predictions, label_ids=labels, metrics=denumpify_detensorize(named) | output.metrics
        )

    def _first_of(self, dataloader) -> int | None:
        """How many examples the first batch of a loader has; None where it does not say."""
        sampler = getattr(dataloader, "batch_sampler", None)
        size = getattr(sampler, "batch_size", None) or getattr(dataloader, "batch_size", None)
        return min(size, self.to_evaluate) if size and self.to_evaluate and self.args.world_size == 1 else size


def _for_each(loss: torch.Tensor | None, size: int) -> torch.Tensor:
    """A batch's loss as that of each of its examples."""
    return (
        torch.full((size,), torch.nan, device="cpu")
        if loss is None
        else loss.detach().float().mean().cpu().expand(size)
    )


def _contradicted(gathered: Any) -> bool:
    return isinstance(gathered, dict) and bool(np.any(gathered.get("contradicted", 0)))


def _at_all_ranks(*values: Any) -> Any:
    """One tensor of what the ranks gave, ranks in the last dimension; generated tokens are padded to the longest."""
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    if not values[0].ndim:  # one number for the batch: a row
        return torch.stack(values)[None]
    longest = max(value.shape[1] for value in values) if values[0].ndim > 1 else 0
    if any(value.ndim > 1 and value.shape[1] != longest for value in values):
        padding = [0, 0] * (values[0].ndim - 2)
        values = tuple(F.pad(value, [*padding, 0, longest - value.shape[1]], value=-100) for value in values)
    return torch.stack(values, dim=-1)
