"""The part of the trainer that fits strengths of each rank's own, once a training is over."""

import copy
from typing import Any

import torch
from torch.utils.data import Subset

from ..schedule import BoundSchedule
from ..strengths import fit_strengths
from .part import TrainerPart, without_notes


class Fitting(TrainerPart):
    """Of ``DyLoRAMixin``: ``fit_strengths``."""

    bound: BoundSchedule | None
    args: Any

    def fit_strengths(self, dataset=None, updates: int = 60, rate: float = 0.02) -> None:
        """``loralib.fit_strengths`` of the trained model, in updates of as many examples as the training's, drawn at
        random; the loss is the trainer's. Measure and save the model afterwards.

        Args:
            dataset: default ``train_dataset``.
            updates, rate: as there.

        Raises ValueError for a model without adapter, for data without a length, and as ``loralib.fit_strengths``.
        """
        data = self.train_dataset if dataset is None else dataset
        if self.bound is None:
            raise ValueError("The model has no loralib layer, so there are no strengths to fit; call loralib.inject.")
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(f"Strengths are fitted on examples drawn at random; {type(data).__name__} has no length.")
        each, accumulate = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        count = updates * accumulate * each * self.args.world_size
        order = torch.randperm(len(data), generator=torch.Generator("cpu").manual_seed(self.args.seed), device="cpu")
        args = self.args
        self.args = copy.copy(args)
        self.args.per_device_eval_batch_size, self.args.dataloader_persistent_workers = each, False
        try:
            batches = self.get_eval_dataloader(Subset(data, order[:count].tolist()))
            with self._savings(), without_notes(self):
                fit_strengths(self.model, batches, self._loss_of, updates, rate, accumulate)
        finally:
            self.args = args

    def _loss_of(self, model, batch: dict) -> torch.Tensor:
        with self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(batch))
