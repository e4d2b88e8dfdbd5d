"""The part of the trainer that evaluates: all ranks in one pass over the data, scored in the data's order."""

import contextlib
from typing import Any

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
from .part import TrainerPart

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

    @torch.no_grad()  # Trainer's own step says so inside; ranks share what they can only without gradients
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """What every rank in ``eval_ranks`` gives, ranks in the last dimension: {"logits": a tensor or several, (batch,
        .., ranks), "losses": (batch, ranks + 1)}, and the labels.

        Each example's losses are its own, where they follow from a classifier's logits, else its batch's; the last
        column is its weight, the number of its tokens that count.
        Logits are what ``preprocess_logits_for_metrics`` makes of a rank's. Where losses alone are wanted there are no
        logits.
        """
        if not self.eval_ranks:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        size, step = examples_in(inputs), super().prediction_step
        given = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        # A model trained with a rank per example takes them in evaluation too. A pass of several ranks has no loss of
        # one: it must follow from the logits, and whether it does a first batch shows, rank by rank.
        stack = self.bound.schedule.sampling == "example" and not prediction_loss_only
        stack = stack and (not given or bool(self.loss_follows))
        losses, logits, labels, follows = [], [], None, []
        for _, (loss, scores, labels) in at_ranks(  # the labels of the last rank are those of all
            self.model,
            inputs,
            self.eval_ranks,
            lambda batch: step(model, batch, prediction_loss_only, ignore_keys),
            stack,
        ):
            of_batch = torch.full((size,), torch.nan) if loss is None else loss.detach().float().cpu().expand(size)
            of_logits = None if self.loss_follows is False else losses_of(scores, labels, size)
            # Where a batch has one class alone, weights of classes do not show.
            if of_logits is not None and loss is not None and of_several(labels):
                follows.append(torch.allclose(of_logits.nanmean(), of_batch[0], rtol=1e-4, atol=1e-5))
            losses.append((of_batch, of_batch if of_logits is None else of_logits))
            if not prediction_loss_only:
                labels = None if labels is None else nested_truncate(labels, size)
                if self.rank_logits is not None:
                    scores = self.rank_logits(scores, labels)
                logits.append(scores)
        if self.loss_follows is None and given and not prediction_loss_only:
            says = of_logits is None or of_several(labels)
            # All processes together: one that ran its ranks another way than the others would wait for them (FSDP).
            verdict = torch.tensor([says, len(follows) == len(losses) and all(follows)], device=self.args.device)
            says, agrees = (self.accelerator.reduce(verdict.float(), "mean") == 1).tolist()
            self.loss_follows = agrees if says else None
        losses = [of_logits if self.loss_follows else of_batch for of_batch, of_logits in losses]
        self.labels_are_tokens = getattr(inputs.get("labels"), "ndim", 0) > 1
        weights = counted_tokens(inputs.get("labels"), size, task_type(self.model) == "CAUSAL_LM")
        found = {"losses": torch.stack([*losses, weights.cpu()], dim=-1).to(self.args.device)}
        if logits:
            found["logits"] = tree_map(_at_all_ranks, *logits)
            self._check_size(found["logits"], size)
        return None, found, labels

    def _losses_are_of_tokens(self) -> bool:
        """Whether the losses are a language model's own, of each token that follows; preferences (DPO), smoothed labels
        and losses of the user's have no perplexity."""
        language = task_type(self.model) in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
        own = self.label_smoother is None and self.compute_loss_func is None
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
            output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
        order, kept = order_within(dataloader), gathered.prediction
        predictions, labels = in_order(output.predictions, order), in_order(output.label_ids, order)
        inputs = None if kept is None else in_order(kept.inputs, order)
        self.scored = scored = Scored.of(predictions, labels, inputs) if self.eval_ranks else None
        metrics = {}
        if scored is not None:
            with_losses = "loss" in self.args.include_for_metrics
            metrics = rank_metrics(scored, self.eval_ranks, task_metrics, self._losses_are_of_tokens(), with_losses)
            predictions = scored.losses if loss_only else scored.predictions
        elif labels is not None and task_metrics is not None:
            metrics = task_metrics(Scored(predictions, labels, inputs).prediction())
        named = {f"{metric_key_prefix}_{key.removeprefix(f'{metric_key_prefix}_')}": v for key, v in metrics.items()}
        return output._replace(
            predictions=predictions, label_ids=labels, metrics=denumpify_detensorize(named) | output.metrics
        )


def _at_all_ranks(*values: Any) -> Any:
    """One tensor of what the ranks gave, ranks in the last dimension; generated tokens are padded to the longest."""
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    longest = max(value.shape[1] for value in values) if values[0].ndim > 1 else 0
    if any(value.ndim > 1 and value.shape[1] != longest for value in values):
        padding = [0, 0] * (values[0].ndim - 2)
        values = tuple(F.pad(value, [*padding, 0, longest - value.shape[1]], value=-100) for value in values)
    return torch.stack(values, dim=-1)
