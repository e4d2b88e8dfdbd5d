"""The part of the trainer that weighs a micro-batch's loss by its share in the update."""

import contextlib
import math
from typing import Any

import torch

from .batching import Place
from .part import TrainerPart, without_notes


class WeighedLosses(TrainerPart):
    """Of ``DyLoRAMixin``: every example weighs 1/n in an update of n, however the update is split."""

    place: Place
    knows_loss: bool  # whether the loss was asked if it divides by num_items_in_batch, and
    loss_divides: bool  # whether it does

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (self.model_accepts_loss_kwargs or self.compute_loss_func is not None) and not self.knows_loss:
            self._ask_loss(model, inputs)
        # By keywords, as Trainer calls it, and outputs only where wanted: TRL's cost a pass more.
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    @contextlib.contextmanager
    def weighed(self):
        """Within the body what ``compute_loss`` gives is weighed, a subclass's own too, and Trainer divides it no more.

        A class that has a loss of its own may say ``loss_is_scaled_for_ga``: True, it is scaled already; False, it is
        the micro-batch's mean.
        """
        compute, own = self.compute_loss, vars(self).get("compute_loss")
        told = type(self).loss_is_scaled_for_ga

        def weighing(model, inputs, return_outputs=False, num_items_in_batch=None):
            says_nothing = counts_nothing(inputs.get("labels"))  # before Trainer takes them out
            found = compute(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            loss, *outputs = found if return_outputs else (found,)
            if says_nothing:
                loss = loss.nan_to_num(nan=0.0)  # a mean over nothing
            if self._is_empty():
                loss = loss * 0.0
            elif not told:
                loss = loss * self._weight(num_items_in_batch if told is None else None)
            self.loss_is_scaled_for_ga = True
            return (loss, *outputs) if return_outputs else loss

        self.compute_loss = weighing
        try:
            yield
        finally:
            del self.compute_loss
            if own is not None:
                self.compute_loss = own

    def _ask_loss(self, model, inputs) -> None:
        """Trainer takes a forward with **kwargs, and any compute_loss_func, for one that divides its loss by
        num_items_in_batch, and few do. One whose loss is the same for 1 item and for 2 does not."""
        compute, training, found = super().compute_loss, model.training, []
        with torch.no_grad(), without_notes(self):
            model.eval()
            for n in (1, 2):
                with torch.random.fork_rng():  # a loss that draws draws the same both times
                    items = torch.tensor(n, device=self.args.device)
                    found.append(compute(model, {**inputs}, num_items_in_batch=items))
            model.train(training)
        one, two = found
        # All processes together, so that none asks again alone.
        one, two = self.accelerator.reduce(torch.stack([one, two]).detach().float(), "sum").tolist()
        # A loss of 0, or of labels that do not count (nan), says nothing: the next batch is asked.
        self.knows_loss = math.isfinite(one) and math.isfinite(two) and (bool(one) or bool(two))
        if self.knows_loss:
            self.loss_divides = one != two
            if self.compute_loss_func is None:
                self.model_accepts_loss_kwargs = self.loss_divides

    def _is_empty(self) -> bool:
        """Whether the micro-batch only keeps this process in step with the others."""
        places = self.place.places()
        return places is not None and not len(places)

    def _weight(self, items) -> float:
        """This micro-batch's weight in the update's loss, ``items`` being the update's, where Trainer counts them."""
        counted = items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        if counted and self.loss_divides:
            return 1.0  # scaled by num_items_in_batch
        # Trainer multiplies what it takes for divided by all processes' items.
        times = self.accelerator.num_processes if counted and self.args.average_tokens_across_devices else 1
        return self.place.weight(self.args.world_size) / times


def counts_nothing(labels: Any) -> bool:
    """Whether all labels are -100: a micro-batch of masked language modelling without a masked token."""
    whole = isinstance(labels, torch.Tensor) and not labels.is_floating_point() and bool(labels.numel())
    return whole and bool((labels == -100).all())
