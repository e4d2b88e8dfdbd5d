"""The part of the trainer that fits strengths of each rank's own, once a training is over."""

import warnings
from typing import Any

import torch

from ..schedule import BoundSchedule
from ..strengths import RATE, UPDATES, fit_strengths
from .batching import Place
from .part import TrainerPart, without_notes
from .weighing import counts_nothing


class Fitting(TrainerPart):
    """Of ``DyLoRAMixin``: ``fit_strengths``."""

    bound: BoundSchedule | None
    train_dataset: Any
    place: Place

    def fit_strengths(self, dataset=None, updates: int = UPDATES, rate: float = RATE) -> None:
        """``loralib.fit_strengths`` of the trained model, on the batches and the loss of a training. Measure and save
        the model afterwards.

        Args:
            dataset: default ``train_dataset``.
            updates, rate: as there.

        Raises ValueError for a model without adapter and without data, and as ``loralib.fit_strengths``.
        """
        if self.bound is None:
            raise ValueError("The model has no loralib layer, so there are no strengths to fit; call loralib.inject.")
        before = self.train_dataset, self.place
        self.train_dataset, self.place = self.train_dataset if dataset is None else dataset, Place()
        try:
            if self.train_dataset is None or isinstance(self.train_dataset, (str, dict)):
                raise ValueError(
                    f"Strengths are fitted on training data, which are {self.train_dataset!r:.60}; give one dataset."
                )
            batches, accumulate = self.get_train_dataloader(), self.args.gradient_accumulation_steps
            with self._savings(), without_notes(self), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "PEFT's save_pretrained")  # which this trainer does not use
                fit_strengths(self.model, batches, self._loss_of, updates, rate, accumulate)
        finally:
            self.train_dataset, self.place = before

    def _loss_of(self, model, batch: dict) -> torch.Tensor:
        says_nothing = counts_nothing(batch.get("labels"))
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        return loss.nan_to_num(nan=0.0) if says_nothing else loss  # as in training
