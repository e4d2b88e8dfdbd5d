"""The part of the trainer that weighs a micro-batch's loss by its share in the update."""

import copy

import torch

from .batching import Place
from .part import TrainerPart


class WeighedLosses(TrainerPart):
    """Of ``DyLoRAMixin``: every example weighs 1/n in an update of n, however the update is split."""

    place: Place
    knows_loss: bool  # whether the loss was asked if it divides by num_items_in_batch, and
    loss_divides: bool  # whether it does

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (self.model_accepts_loss_kwargs or self.compute_loss_func is not None) and not self.knows_loss:
            self._ask_loss(model, inputs)
        found = super().compute_loss(
            model, inputs, return_outputs, num_items_in_batch
        )  # TRL's outputs cost a pass more
        weight = 1.0
        if model.training:
            weight, self.loss_is_scaled_for_ga = self._weight(num_items_in_batch), True
        return (found[0] * weight, *found[1:]) if return_outputs else found * weight

    def _ask_loss(self, model, inputs) -> None:
        """Trainer takes a forward with **kwargs, and any compute_loss_func, for one that divides its loss by
        num_items_in_batch, and few do. One whose loss is the same for 1 item and for 2 does not."""
        compute, training, found = super().compute_loss, model.training, []
        noted = copy.deepcopy(getattr(self, "_metrics", None))  # what TRL's trainers note of each loss
        with torch.no_grad():
            model.eval()
            for n in (1, 2):
                with torch.random.fork_rng():  # a loss that draws draws the same both times
                    items = torch.tensor(n, device=self.args.device)
                    found.append(compute(model, {**inputs}, num_items_in_batch=items))
            model.train(training)
        if noted is not None:
            self._metrics = noted
        one, two = found
        # All processes together, so that none asks again alone.
        one, two = self.accelerator.reduce(torch.stack([one, two]).detach().float(), "sum").tolist()
        self.knows_loss = bool(one) or bool(two)  # a loss of 0 says nothing: the next batch is asked
        if self.knows_loss:
            self.loss_divides = one != two
            if self.compute_loss_func is None:
                self.model_accepts_loss_kwargs = self.loss_divides

    def _weight(self, items) -> float:
        """This micro-batch's weight in the update's loss, ``items`` being the update's, where Trainer counts them."""
        places = self.place.places()
        if places is not None and not len(places):
            return 0.0
        counted = items is not None and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        if counted and self.loss_divides:
            return 1.0  # scaled by num_items_in_batch
        # Trainer multiplies what it takes for divided by all processes' items.
        times = self.accelerator.num_processes if counted and self.args.average_tokens_across_devices else 1
        return self.place.weight(self.args.world_size) / times
